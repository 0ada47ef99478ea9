"""Tasks: what a model is asked to remember, as small values that say all that their examples depend on."""

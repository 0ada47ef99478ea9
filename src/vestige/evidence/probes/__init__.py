"""Probes: what a model does with its context, measured from the inside."""

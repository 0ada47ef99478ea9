"""Tasks: small deterministic descriptions of prompts whose answers are known."""

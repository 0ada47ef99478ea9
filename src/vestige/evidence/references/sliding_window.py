"""Sliding-window attention: a token sees the last ``window`` tokens only, itself included."""

from __future__ import annotations

from vestige.evidence.references.softmax import mix

__all__ = ["SMALL", "mix"]

SMALL = {"window": 5}

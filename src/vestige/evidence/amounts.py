"""Amounts as people write them: ``0.25``, ``"25%"``, ``"4GB"``, ``"5ms"``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from vestige.errors import SpecError

__all__ = ["Amount", "Unit", "size"]

Unit = Literal["share", "entries", "bytes", "seconds"]

_UNITS: dict[str, tuple[Unit, float]] = {
    "%": ("share", 0.01),
    "b": ("bytes", 1),
    "kb": ("bytes", 1e3),
    "mb": ("bytes", 1e6),
    "gb": ("bytes", 1e9),
    "tb": ("bytes", 1e12),
    "kib": ("bytes", 2**10),
    "mib": ("bytes", 2**20),
    "gib": ("bytes", 2**30),
    "tib": ("bytes", 2**40),
    "us": ("seconds", 1e-6),
    "ms": ("seconds", 1e-3),
    "s": ("seconds", 1),
}
_TEXT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(%|[A-Za-z]+)\s*")
ALLOWED = 'a share above 0 and up to 1.0 (0.25, "25%"), entries per head (256), bytes ("4MB") or seconds ("5ms")'


@dataclass(frozen=True)
class Amount:
    """A quantity with its unit; a share is of what the full cache takes."""

    value: float
    unit: Unit

    @classmethod
    def of(cls, given: Any) -> Amount:
        """Read a number or a text: a float is a share, a whole number entries, a text says its unit.

        Raises:
            SpecError: it is none of these, or not above zero.
        """
        if isinstance(given, Amount):
            return given
        found: Amount | None = None
        if isinstance(given, str) and (match := _TEXT.fullmatch(given)):
            unit, factor = _UNITS.get(match[2].lower(), (None, 0.0))
            found = None if unit is None else cls(float(match[1]) * factor, unit)
        elif isinstance(given, int) and not isinstance(given, bool):
            found = cls(given, "entries")
        elif isinstance(given, float):
            found = cls(given, "share")
        if found is None or not 0 < found.value < float("inf") or (found.unit == "share" and found.value > 1):
            raise SpecError(f"budget {given!r}; allowed: {ALLOWED}")
        return found

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{100 * self.value:.4g}%"
        if self.unit == "entries":
            return f"{self.value:.0f} entries"
        if self.unit == "bytes":
            return size(self.value)
        return f"{1000 * self.value:.4g} ms"


def size(count: float) -> str:
    """Bytes as people read them (powers of 1,000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError

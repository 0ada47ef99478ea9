"""Every error that Vestige raises on purpose.

They share one root, so that a caller can catch :class:`VestigeError`, and each also
derives from the builtin that fits, so that code which knows nothing of Vestige still
catches a bad value as a ``ValueError``.
"""

from __future__ import annotations

__all__ = [
    "EngineError",
    "InputError",
    "LedgerError",
    "LedgerVersionError",
    "MissingPackageError",
    "ModelError",
    "PatchConflictError",
    "PatchError",
    "SpecError",
    "TrainingError",
    "UnsupportedModelError",
    "VestigeError",
]


class VestigeError(Exception):
    """Root of all errors raised on purpose; its text is meant for the user."""


class SpecError(VestigeError, ValueError):
    """A method, task or run was described wrongly: name, parameter, type or range."""


class InputError(VestigeError, ValueError):
    """Data handed to a method cannot be used: empty, overlapping, too short, out of range."""


class ModelError(VestigeError, RuntimeError):
    """A model could not be found, read or stored."""


class UnsupportedModelError(ModelError):
    """The model is of an architecture, or lacks a part, that the method needs."""


class TrainingError(VestigeError, RuntimeError):
    """Training cannot go on, as with a loss that is no number; what was learnt up to there is kept."""


class EngineError(VestigeError, RuntimeError):
    """What runs the work, such as a Ray cluster, did not start or was lost."""


class PatchError(VestigeError, RuntimeError):
    """A change to a model could not be made or taken back."""


class PatchConflictError(PatchError):
    """Two attachments want the same part of one model."""


class LedgerError(VestigeError, RuntimeError):
    """A ledger could not be read or written."""


class LedgerVersionError(LedgerError, SpecError):
    """A ledger holds rows of a version that cannot be read here; what was asked for has another file to name."""


class MissingPackageError(VestigeError, ImportError):
    """An optional package is absent; the text holds the command that installs it."""

    def __init__(self, package: str, purpose: str, install: str | None = None) -> None:
        self.package = package
        self.install = install or f"pip install {package}"
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed; {self.install}")

"""Optional packages, which are asked for before any work."""

from __future__ import annotations

import importlib.util

from vestige.errors import MissingPackageError

__all__ = ["need"]

NAMES = {"sklearn": "scikit-learn"}  # of packages that are not called like their modules


def need(purpose: str, extra: str, *modules: str) -> None:
    """Ask for optional packages, by the modules that they bring, without importing them.

    Args:
        purpose: what needs them.
        extra: the extra of Vestige that they come with.

    Raises:
        MissingPackageError: one is absent.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(NAMES.get(module, module), purpose, f"pip install 'vestige[{extra}]'")

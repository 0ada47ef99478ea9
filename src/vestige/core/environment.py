"""What a measurement was made with: versions, hardware, commit."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import vestige

__all__ = ["commit", "hardware", "versions"]


@functools.cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"vestige": vestige.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def versions() -> dict[str, str | None]:
    """Versions of Vestige, Python, torch and transformers; None for what is not installed. Nothing is imported."""
    return dict(_versions())


def hardware() -> dict[str, Any]:
    """The machine: ``cpu``, ``cores`` (that this process may use), ``memory_bytes``, ``gpu`` (those in use, by name).

    ``gpu`` is None as long as the process has not used a CUDA device: asking must not start one.
    """
    return {**_machine(), "gpu": _gpus()}


@functools.cache
def _machine() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[str] | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


@functools.cache
def commit() -> str | None:
    """The git commit of the Vestige that runs, with ``-dirty`` if files differ from it; None for a release."""
    package = Path(vestige.__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # A package inside somebody else's repository (an environment in their project) must not report theirs.
    if top and Path(top, "src", "vestige").resolve() == package:
        head = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
        return f"{head}-dirty" if head and changed else head
    return _installed_commit()


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _installed_commit() -> str | None:
    """The commit that pip noted when it installed from a repository."""
    try:
        noted = metadata.distribution("vestige").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    return json.loads(noted).get("vcs_info", {}).get("commit_id") if noted else None

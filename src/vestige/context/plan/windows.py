"""Plans by rule: each key-value head keeps the first tokens and a window of its own, or everything.

What such a plan knows of a model stands in tables, a number for each layer and key-value head. They are
hyper-parameters like any other, so a plan with its tables is one object that can be compared, written and saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vestige.context.layer import KeptLayer
from vestige.context.policy import Ranking
from vestige.core.anatomy import Anatomy
from vestige.core.files import write_whole
from vestige.core.folders import cache_folder
from vestige.core.method import param
from vestige.errors import InputError, SpecError

__all__ = ["ALL", "HeadWindows", "Table", "fingerprint", "highest", "save_plan", "table", "window"]

Table = tuple[tuple[float, ...], ...]

ALL = 1 << 40  # entries of a head that keeps everything: more than any text has
SAMPLE = 4096  # weights of each layer by which a model is known again


class HeadWindows(Ranking):
    """A policy under which a head holds the first ``sinks`` tokens and a window of recent ones, or everything.

    Its heads' storage is as unequal as its windows. Tables that are not given are looked up for the model at hand:
    among those that :meth:`remember` was called on in this process, in the user's cache folder (:meth:`save` without
    a path), and among those that come with Vestige.
    """

    fitted_on: str = param("", "fingerprint of the model that the tables are of; empty with empty tables")

    tables: ClassVar[tuple[str, ...]]  # the parameters that hold a number for each layer and key-value head
    how: ClassVar[str]  # how to get tables, for the error where there are none
    by_age: ClassVar[bool] = True

    def check(self) -> None:
        shapes = {tuple(map(len, getattr(self, name))) for name in self.tables}
        if len(shapes) > 1 or len(set(next(iter(shapes)))) > 1 or 0 in next(iter(shapes)):
            sizes = ", ".join(f"{name!r} {list(map(len, getattr(self, name)))}" for name in self.tables)
            raise SpecError(
                f"{self.name}: tables hold a number for each head of each layer; these have rows of {sizes}"
            )
        if self.fitted and not self.fitted_on:
            raise SpecError(f"{self.name}: parameter 'fitted_on' is ''; tables need the fingerprint of their model")

    @property
    def fitted(self) -> bool:
        """Whether the tables are given."""
        return bool(getattr(self, self.tables[0]))

    @property
    def variant(self) -> str:
        """What tells several plans of one model apart, as the end of a file's name; empty for the usual one."""
        return ""

    def windows(self, layer: int, seen: int) -> Sequence[int | None]:
        """Recent tokens that each key-value head keeps, of ``seen``, beside the sinks; ``None`` for all."""
        raise NotImplementedError

    def alike(self, layer: int) -> bool:
        """Whether all heads of a layer keep the same, however much is seen."""
        raise NotImplementedError

    def score(self, entries: KeptLayer) -> Tensor:
        return entries._positions(entries.slots).float()

    def budget_tokens(self, seen: int) -> int:
        return seen

    def layer_budgets(self, budgets: list[int], real: list[int], layer: int, layers: int) -> list[int]:
        if not self.alike(layer):
            return budgets
        return [self._limit(self.windows(layer, seen)[0]) for seen in real]

    def head_budgets(self, real: list[int], layer: int) -> list[list[int]] | None:
        if self.alike(layer):
            return None
        limits = {seen: [self._limit(window) for window in self.windows(layer, seen)] for seen in set(real)}
        return [limits[seen] for seen in real]

    def _limit(self, window: int | None) -> int:
        return ALL if window is None else self.sinks + window

    def with_budget(self, budget: int | float) -> Self:
        raise SpecError(
            f"{self.name} goes by its heads' windows, not by a budget: its cache cannot be cut to {budget!r}"
        )

    def on(self, anatomy: Anatomy) -> Self:
        """The plan with the tables of this model.

        Raises:
            SpecError: there are none.
        """
        if self.fitted:
            return self
        found = self.known(anatomy, self.variant)
        if found is None:
            raise SpecError(
                f"{self.name}: there are no tables for this model ({fingerprint(anatomy)}{self.variant}); {self.how}, "
                f"or load saved ones with {type(self).__name__}.load(path)"
            )
        tables = {name: getattr(found, name) for name in (*self.tables, "fitted_on")}
        return self.replace(**tables)

    def check_model(self, anatomy: Anatomy) -> None:
        known = fingerprint(anatomy)
        if self.fitted_on != known:
            raise SpecError(
                f"{self.name}: parameter 'fitted_on' is {self.fitted_on!r}: a plan of another model than this one, "
                f"which is {known!r}; {self.how}"
            )
        rows = getattr(self, self.tables[0])
        if (len(rows), len(rows[0])) != (anatomy.num_layers, anatomy.num_kv_heads):
            raise SpecError(
                f"{self.name}: parameter {self.tables[0]!r} is for {len(rows)} layers of {len(rows[0])} key-value "
                f"heads; this model has {anatomy.num_layers} of {anatomy.num_kv_heads}"
            )

    @classmethod
    def known(cls, anatomy: Anatomy, variant: str = "") -> Self | None:
        """The plan of this method for a model, if one is at hand; see the class for where.

        Args:
            variant: which one, where a model has several (:attr:`variant`).
        """
        place = f"{fingerprint(anatomy)}{variant}.safetensors"
        if (cls.name, place) in _remembered:
            return _remembered[cls.name, place]  # type: ignore[return-value]
        for folder in (_own_folder(), Path(__file__).parent / "fitted"):
            path = folder / cls.name / place
            if path.is_file():
                return cls.load(path)
        return None

    def remember(self) -> Self:
        """Let the method be used by its name alone on this plan's model, in this process."""
        _remembered[self.name, f"{self.fitted_on}{self.variant}.safetensors"] = self
        return self

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the plan as safetensors.

        Args:
            path: where; by default a place in the user's cache folder, where the method finds it by name.

        Raises:
            SpecError: there are no tables to save.
            InputError: the file cannot be written.
        """
        if not self.fitted:
            raise SpecError(f"{self.name}: there are no tables to save; {self.how}")
        from safetensors.torch import save

        own = _own_folder() / self.name / f"{self.fitted_on}{self.variant}.safetensors"
        target = own if path is None else Path(path)
        tables = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in self.tables}
        spec = {key: value for key, value in self.spec().items() if key not in self.tables}
        save_plan(target, save(tables, metadata={"vestige": json.dumps(spec)}))
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], **parameters: Any) -> Self:
        """Read a saved plan; ``parameters`` replace those that it was saved with.

        Raises:
            InputError: the file cannot be read, or is no saved plan.
            SpecError: it is of another method.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                spec = json.loads((file.metadata() or {}).get("vestige", "null"))
                tables = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise InputError(f"{os.fspath(path)!r} cannot be read as a saved plan: {error}") from None
        if not isinstance(spec, dict) or "name" not in spec:
            raise InputError(f"{os.fspath(path)!r} is no saved plan")
        found = cls.from_spec({**spec, **tables})
        assert isinstance(found, cls)
        return found.replace(**parameters)


_remembered: dict[tuple[str, str], HeadWindows] = {}


def table(values: Tensor, digits: int = 5) -> Table:
    """A table of ``(layers, kv_heads)`` numbers, rounded so that it reads and compares well."""
    return tuple(tuple(round(float(value), digits) for value in row) for row in values.tolist())


def highest(values: Table, share: float) -> tuple[tuple[bool, ...], ...]:
    """The ``share`` of all heads with the highest values; of equal ones the earlier."""
    heads = [(value, layer, head) for layer, row in enumerate(values) for head, value in enumerate(row)]
    heads.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    chosen = {(layer, head) for _, layer, head in heads[: round(share * len(heads))]}
    return tuple(tuple((layer, head) in chosen for head in range(len(row))) for layer, row in enumerate(values))


def window(alpha: float, beta: float, seen: int, least: int) -> int | None:
    """Recent tokens that a rule keeps of ``seen``; ``None`` for all, where it grows as the text does."""
    if beta >= 1 and alpha >= 0:
        return None
    return max(least, math.floor(alpha + beta * seen))


def fingerprint(anatomy: Anatomy) -> str:
    """What tells a model from others: its architecture, sizes, and the signs of some weights.

    Signs are the same in every dtype. Adapters that are not merged change nothing.
    """
    signs = hashlib.sha256()
    for layer in anatomy.layers:
        weights = layer.key.weight.detach().flatten()[:SAMPLE]
        signs.update(torch.signbit(weights).to("cpu", torch.uint8).numpy().tobytes())
    sizes = f"{anatomy.num_layers}x{anatomy.num_heads}x{anatomy.num_kv_heads}x{anatomy.head_dim}"
    return f"{anatomy.architecture}-{sizes}-{signs.hexdigest()[:12]}"


def _own_folder() -> Path:
    return cache_folder() / "plans"


def save_plan(path: Path, content: bytes) -> None:
    """Write a plan's file.

    Raises:
        InputError: it cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"the plan cannot be written to {os.fspath(path)!r}: {error.strerror}") from None

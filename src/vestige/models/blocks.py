"""Blocks named in a config: a pattern of mixers becomes one specification per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from vestige.core.method import Method, did_you_mean
from vestige.core.registry import registry
from vestige.errors import SpecError
from vestige.layers.channels.base import Channel
from vestige.layers.mixers.base import Mixer
from vestige.layers.norms import check_norm

__all__ = ["RESIDUALS", "BlockSpec", "cycle", "names_of", "parse_blocks"]

RESIDUALS = ("pre", "post", "sandwich", "parallel")
"""Rules of the residual stream x, for a mixer or channel mixer f: ``pre``: x + f(norm(x)); ``post``: norm(x + f(x));
``sandwich``: x + norm(f(norm(x))); ``parallel``: mixer and channel mixer side by side, x + f(norm(x)) + g(norm(x))."""

_ENTRY = re.compile(r"^(?P<name>[^\s(*]+)(?:\((?P<parameters>.*)\))?(?:\*(?P<count>\d+))?$", re.DOTALL)
_KEYS = ("mixer", "channel", "norm", "residual", "repeat")


@dataclass(frozen=True)
class BlockSpec:
    """One block: how it reads the past, what it does to each token, and how both join the residual stream."""

    mixer: Mixer
    channel: Channel | None
    norm: str
    residual: str

    def to_dict(self, repeat: int = 1) -> dict[str, Any]:
        """Plain JSON types."""
        channel = None if self.channel is None else self.channel.spec()
        plain = {"mixer": self.mixer.spec(), "channel": channel, "norm": self.norm, "residual": self.residual}
        return plain if repeat == 1 else {**plain, "repeat": repeat}


def parse_blocks(
    blocks: str | Sequence[Any], *, channel: Any = "swiglu", norm: str = "rmsnorm", residual: str = "pre"
) -> list[tuple[BlockSpec, int]]:
    """Read a pattern of blocks.

    Args:
        blocks: names of mixers with spaces between them, each with parameters and a count if need be:
            ``"gated-delta-net*3 softmax"``, ``"based(feature_dim=8) sliding-window(window=64)*2"``. Or a list, an entry
            per block: such a text, a mixer, or a mapping with ``mixer`` (a name, a spec or an object) and perhaps
            ``channel`` (likewise, or ``None``), ``norm``, ``residual``, ``repeat``.
        channel, norm, residual: of blocks that name none.

    Returns:
        Each different block with the number of times that it stands there in a row.

    Raises:
        SpecError: no blocks; or an entry that cannot be read, with its position, and the nearest names.
    """
    if isinstance(blocks, str):
        entries: Sequence[Any] = _split(blocks)
    elif isinstance(blocks, Sequence):
        entries = blocks
    else:
        raise SpecError(f"blocks is {blocks!r}; allowed: a pattern of names, or a list of blocks")
    if not entries:
        raise SpecError("blocks is empty; name at least one mixer")
    defaults = {"channel": channel, "norm": norm, "residual": residual}
    found = []
    for position, entry in enumerate(entries, 1):
        try:
            found.append(_block(entry, defaults))
        except SpecError as error:
            shown = entry if isinstance(entry, str) else repr(entry)
            raise SpecError(f"blocks: entry {position} of {len(entries)}, {shown}: {error}") from None
    return found


def cycle(pattern: Sequence[tuple[BlockSpec, int]], layers: int | None) -> list[BlockSpec]:
    """One block per layer: the pattern from its beginning, again and again; the last round may stop short.

    Args:
        layers: how many; ``None``: one round.

    Raises:
        SpecError: fewer layers than the pattern has blocks, so that one of them would be left out.
    """
    once = [block for block, repeat in pattern for _ in range(repeat)]
    if layers is None:
        return once
    if type(layers) is not int or layers < len(once):
        raise SpecError(f"num_hidden_layers is {layers!r}; allowed: at least the {len(once)} blocks of the pattern")
    return [once[n % len(once)] for n in range(layers)]


def _split(pattern: str) -> list[str]:
    """Cut at spaces outside of parentheses."""
    entries, depth, current = [], 0, ""
    for letter in pattern + " ":
        depth += (letter == "(") - (letter == ")")
        if letter.isspace() and depth == 0:
            entries += [current] if current else []
            current = ""
        else:
            current += letter
    if current.strip():
        raise SpecError(f"blocks: the parentheses in {pattern!r} do not match")
    return entries


def _block(entry: Any, defaults: Mapping[str, Any]) -> tuple[BlockSpec, int]:
    repeat: Any = 1
    given: dict[str, Any] = dict(defaults)
    if isinstance(entry, str):
        given["mixer"], repeat = _entry(entry)
    elif isinstance(entry, Mapping) and "name" not in entry:
        for key in entry:
            if key not in _KEYS:
                raise SpecError(f"unknown part {key!r} of a block; {did_you_mean(str(key), _KEYS)}")
        if "mixer" not in entry:
            raise SpecError("the block names no mixer")
        given.update(entry)
        if isinstance(given["mixer"], str):
            given["mixer"], repeat = _entry(given["mixer"])
        repeat = given.get("repeat", repeat)
    else:
        given["mixer"] = entry
    if type(repeat) is not int or repeat < 1:
        raise SpecError(f"the count is {repeat!r}; allowed: int >= 1")
    if given["residual"] not in RESIDUALS:
        raise SpecError(f"residual is {given['residual']!r}; allowed: {', '.join(RESIDUALS)}")
    channel = given["channel"]
    block = BlockSpec(
        mixer=_method(given["mixer"], Mixer, "mixer"),
        channel=None if channel in (None, "none") else _method(channel, Channel, "channel mixer"),
        norm=check_norm(given["norm"]),
        residual=given["residual"],
    )
    return block, repeat


def _entry(text: str) -> tuple[Any, int]:
    """``name(key=value, ...)*count`` as a spec and a count."""
    match = _ENTRY.match(text.strip())
    if match is None:
        raise SpecError("cannot be read; a block is written name, name*3, or name(parameter=value)*3")
    parameters: dict[str, Any] = {"name": match["name"]}
    for piece in filter(None, (piece.strip() for piece in (match["parameters"] or "").split(","))):
        key, sign, value = piece.partition("=")
        if not sign:
            raise SpecError(f"{piece!r} is no parameter=value")
        try:
            parameters[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SpecError(f"the value of {piece!r} cannot be read") from None
    return parameters, int(match["count"] or 1)


def _method(given: Any, family: type[Method], what: str) -> Any:
    """A method of a family, from an object, a name or a spec."""
    if isinstance(given, Method):
        found: Method = given
    else:
        name = given.get("name") if isinstance(given, Mapping) else given
        if name not in {card.name for card in registry.cards()}:
            raise SpecError(f"unknown {what} {name!r}; {did_you_mean(str(name), names_of(family))}")
        found = Method.from_spec(given)
    if not isinstance(found, family):
        raise SpecError(f"{found.name!r} is no {what}; {did_you_mean(found.name, names_of(family))}")
    return found


def names_of(family: type[Method]) -> list[str]:
    """The names of all registered mixers, or channel mixers."""
    names = [card.name for card in registry.cards("layers")]
    return [name for name in names if issubclass(registry.load(name), family)]

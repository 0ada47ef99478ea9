"""Every mixer against softmax attention and flash-linear-attention, and whole texts against single tokens.

    python benchmarks/layers/speed.py --out benchmarks/layers/speed-h100.json                 # on a CUDA device
    python benchmarks/layers/speed.py --out benchmarks/layers/speed-cpu.json --device cpu --compare steps

``--compare attention``: bf16 on CUDA, 16 heads of 128, as many rows of each length as make 32k tokens, forward, and
forward with backward. What is timed is the operator, without projections, against PyTorch's attention (``op``); of
mixers that are more than one operator the whole layer, against the whole layer of ``softmax`` (``layer``). ``ours`` is
what a layer runs, by whichever kernel is chosen for it; ``own`` is the portable path in PyTorch; ``kernels`` are those
of this package where flash-linear-attention would be chosen; ``fla`` is the latter called directly with what it takes,
where it has the operator; a backward pass that it refuses is left out. It compiles for minutes: ``--paths`` chooses.

``--compare steps``: float32, 2k tokens, whole layers: a text at once against one token after the other. These are timed
over a few tokens after some that fill the state, for a token costs the same wherever it stands. Mixers that hold more
with every token are left out.

Mixers have their defaults, but for what a row names under ``settings``. Every row is kept as it comes, with the error
where one fails; what is there is not measured again, and ``--minutes`` ends a run in time.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from measuring import (
    Clock,
    Sheet,
    Watch,
    arguments,
    attempt,
    built,
    every_mixer,
    given,
    grows,
    here,
    mixer_of,
    portable,
    run_whole,
    settings_of,
    still_there,
    weights_per_token,
)
from torch import Tensor
from torch.nn import functional as F

from vestige.layers.layout import Layout
from vestige.layers.mixers.based import taylor_features
from vestige.layers.mixers.recurrent import RecurrentLayer
from vestige.layers.ops import fla
from vestige.layers.ops.local_linear import local_linear_attention
from vestige.layers.ops.recurrence import Drive, recurrence
from vestige.layers.ops.windowed_attention import windowed_attention
from vestige.layers.state import LayerState

WINDOW = 256
SLOW = 1000.0  # milliseconds; a path that layers do not take, and that takes longer, is not taken for longer texts
FILL = 256  # tokens that a state has seen before single ones are timed: no window is longer


@dataclasses.dataclass
class Case:
    """One thing to time: what is computed, what gradients are taken of, and the drive where it is a recurrence."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    drive: Drive | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def by_fla(self) -> Callable[[], Tensor]:
        """The same by flash-linear-attention alone, given what it takes: nothing of ours is timed."""
        with torch.no_grad():  # what is as it has to be stays the leaf that it is
            kernel, call = fla.prepared(self.drive)  # type: ignore[arg-type]
        return lambda: kernel(**call, output_final_state=True)[0]

    def paths(self, name: str) -> list[str]:
        """By what it can be computed."""
        if name == "softmax":
            return ["ours"]
        with torch.no_grad():
            served = self.drive is not None and fla.serves(self.drive)
        kernels = ["kernels"] if name == "lizard" or self.drive is not None else []
        return ["own", *kernels, *(["fla"] if served else []), "ours"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What operators are given."""

    batch: int
    length: int
    heads: int
    dim: int
    device: str
    dtype: torch.dtype

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, self.length, *shape, device=self.device, dtype=self.dtype)


def drive_of(name: str, sizes: Sizes) -> Drive | None:
    """What drives the recurrence of a mixer, at equal sizes; ``None``: it has no such recurrence."""
    heads, dim = sizes.heads, sizes.dim

    def direction(count: int = heads) -> Tensor:
        return F.normalize(sizes.drawn(count, dim), dim=-1)

    def rate() -> Tensor:
        return torch.sigmoid(sizes.drawn(heads))

    def by_token() -> Tensor:
        return F.logsigmoid(sizes.drawn(heads).float() + 3)

    def by_channel() -> Tensor:
        return F.logsigmoid(sizes.drawn(heads, dim).float()) / 16

    v = sizes.drawn(heads, dim)
    match name:
        case "linear-attention":
            return Drive(direction(), direction(), v)
        case "lightning-attention" | "transnormer-llm":
            fade = -torch.logspace(-3, 0, heads, device=sizes.device)
            return Drive(direction(), direction(), v, fade, bounded=True)
        case "mamba2":  # heads share queries and keys
            return Drive(direction(1), direction(1), v, by_token())
        case "gla":
            return Drive(direction(), direction(), v, by_channel(), bounded=True)
        case "hgrn2":  # what is forgotten makes room for what is written
            fade = by_channel()
            return Drive(direction(), (1 - fade.exp()).to(sizes.dtype), v, fade, bounded=True)
        case "delta-net":
            return Drive(direction(), direction(), v, None, rate())
        case "gated-delta-net":
            return Drive(direction(), direction(), v, by_token(), rate())
        case "based":
            return Drive(taylor_features(sizes.drawn(heads, 16)), taylor_features(sizes.drawn(heads, 16)), v)
    return None


def leafed(inputs: Any) -> tuple[Any, list[Tensor]]:
    """The same inputs with tensors that want a gradient; a decay fixed per head wants none."""
    tuples = isinstance(inputs, tuple)
    parts = inputs._asdict() if tuples else {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    parts = {name: t.detach().clone() if isinstance(t, Tensor) else t for name, t in parts.items()}
    leaves = [t.requires_grad_() for t in parts.values() if isinstance(t, Tensor) and t.dim() > 1]
    return type(inputs)(**parts), leaves


def recurrent_case(drive: Drive) -> Case:
    drive, leaves = leafed(drive)
    return Case(lambda: recurrence(drive)[0], leaves, drive)


def attention_case(name: str, sizes: Sizes) -> Case:
    heads, dim = sizes.heads, sizes.dim
    q, k, v = (sizes.drawn(heads, dim).transpose(1, 2).contiguous().requires_grad_() for _ in range(3))
    if name == "softmax":
        return Case(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v])
    if name == "sliding-window":
        return Case(lambda: windowed_attention(q, k, v, window=WINDOW, scaling=dim**-0.5), [q, k, v])
    mixer = mixer_of(name, heads, heads * dim)
    options = {"ridge": mixer.ridge, "iterations": mixer.iterations, "chunk": mixer.chunk, "scaling": dim**-0.5}
    return Case(lambda: local_linear_attention(q, k, v, **options), [q, k, v])


def case_of(name: str, what: str, sizes: Sizes) -> Case | None:
    """The operator of a mixer, or its whole layer; ``None``: it is not one operator."""
    if what == "op" and name in ("softmax", "sliding-window", "local-linear-attention"):
        return attention_case(name, sizes)
    drive = drive_of(name, sizes) if what == "op" else None
    if drive is not None:
        return recurrent_case(drive)
    layer = built(name, sizes.heads, sizes.dim, max(sizes.length, WINDOW), sizes.device, sizes.dtype)
    settings = settings_of(name, sizes.heads, sizes.heads * sizes.dim)
    x = sizes.drawn(sizes.heads * sizes.dim)
    if what == "layer":
        leaves = [x.requires_grad_(), *layer.parameters()]
        return Case(lambda: run_whole(layer, x), leaves, settings=settings)
    if not isinstance(layer, RecurrentLayer) or type(layer).forward is not RecurrentLayer.forward:
        return None
    layout = Layout.of(sizes.batch, sizes.length, device=sizes.device)
    with torch.no_grad():
        inputs = layer.project(x, layout, {})
    if isinstance(inputs, Drive):
        return recurrent_case(inputs)
    inputs, leaves = leafed(inputs)
    leaves += list(getattr(layer, "memory", []))
    return Case(lambda: layer.chunked(inputs, layout, {}), leaves, settings=settings)


def timed(case: Case, path: str, watch: Watch) -> dict[str, Any]:
    """Times of a path, without a backward pass that flash-linear-attention refuses."""
    if path == "own":
        with portable():
            return watch.both(case.run, case.leaves)
    if path == "kernels":
        with mock.patch.object(fla, "serves", lambda drive: False):
            return watch.both(case.run, case.leaves)
    if path == "ours":
        return watch.both(case.run, case.leaves)
    direct = case.by_fla()
    if fla.serves(case.drive):  # type: ignore[arg-type]
        return watch.both(direct, case.leaves)
    with torch.no_grad():
        return {"forward_ms": watch(direct), "both_ms": None}


def cases(names: list[str], lengths: list[int]) -> Iterator[tuple[str, str, int]]:
    """Mixer, operator or layer, length: what others are compared with first, short texts before long ones, and what
    takes weights per token at the end."""
    for last in (False, True):
        for length in lengths:
            chosen = [name for name in names if weights_per_token(name) == last and name != "softmax"]
            yield from (("softmax", what, length) for what in ("op", "layer"))
            yield from ((name, what, length) for name in chosen for what in ("op", "layer"))


def too_slow(sheet: Sheet, name: str, path: str) -> bool:
    """Whether a path that layers do not take was seen to be too slow for longer texts."""
    return path != "ours" and any(
        row["mixer"] == name and row["path"] == path and (row.get("both_ms") or 0) > SLOW for row in sheet.rows
    )


def beside_attention(args: argparse.Namespace, sheet: Sheet, clock: Clock) -> None:
    watch, whole = Watch(args.device, args.repeats, args.cap), set()
    for name, what, length in cases(args.only or every_mixer(), args.lengths):
        if clock.over:
            return
        which = {"mixer": name, "what": what, "length": length}
        if (what == "layer" and name != "softmax" and name not in whole) or (
            sheet.has(**which, done=True) and not args.paths
        ):
            continue
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        sizes = Sizes(max(1, args.tokens // length), length, args.heads, args.dim, args.device, dtype)
        failed = attempt(lambda name=name, what=what, sizes=sizes: {"case": case_of(name, what, sizes)})
        case = failed.pop("case", None)
        if case is None and not failed:
            whole.add(name)
            continue
        paths = ["ours"] if case is None else case.paths(name)
        for path in paths:
            if too_slow(sheet, name, path) or sheet.has(**which, path=path):
                continue
            if args.paths and path not in args.paths and name != "softmax":
                continue
            watch.warm = args.device == "cpu" or sheet.has(mixer=name, what=what, path=path)
            found = failed or attempt(lambda path=path, case=case: timed(case, path, watch))
            row = {**which, "path": path, "batch": sizes.batch}
            if case is not None and case.settings:
                row["settings"] = case.settings
            sheet.add({**row, **found, **over(sheet, row, found), "done": path == "ours"})
            still_there(args.device)


def over(sheet: Sheet, row: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Times over those of softmax attention, of the same run."""
    base = {"mixer": "softmax", "what": row["what"], "length": row["length"], "path": "ours"}
    rows = [r for r in sheet.rows if all(r.get(k) == v for k, v in base.items()) and "error" not in r]
    kinds = [kind for kind in ("forward_ms", "both_ms") if rows and found.get(kind)]
    return {f"{kind.removesuffix('_ms')}_over_softmax": found[kind] / rows[0][kind] for kind in kinds}


def steps_of(name: str, args: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """A text at once against one token after the other."""
    layer = built(name, args.heads, args.dim, args.lengths[0], args.device, torch.float32)
    x = torch.randn(1, args.lengths[0], args.heads * args.dim, device=args.device)
    start = LayerState()
    with torch.no_grad():
        run_whole(layer, x[:, :FILL], start)

    def one_by_one(tokens: Tensor) -> Tensor:
        state = start.fork()
        return torch.cat([run_whole(layer, token[:, None], state) for token in tokens.unbind(1)], 1)

    whole, few = x.requires_grad_(), x[:, : args.steps].detach().requires_grad_()
    chunks = watch.both(lambda: run_whole(layer, whole), [whole])
    steps = watch.both(lambda: one_by_one(few), [few])
    row: dict[str, Any] = {"state_bytes": start.nbytes}
    for kind in ("forward", "both"):
        here_ms, there_ms = chunks[f"{kind}_ms"] / whole.shape[1], steps[f"{kind}_ms"] / few.shape[1]
        row |= {f"chunks_{kind}_ms_per_token": here_ms, f"steps_{kind}_ms_per_token": there_ms}
        row[f"steps_over_chunks_{kind}"] = there_ms / here_ms
    return row


def beside_steps(args: argparse.Namespace, sheet: Sheet, clock: Clock) -> None:
    watch = Watch(args.device, args.repeats, args.cap)
    for name in args.only or every_mixer():
        if clock.over:
            return
        if sheet.has(mixer=name) or grows(name):
            continue
        settings = settings_of(name, args.heads, args.heads * args.dim)
        found = attempt(lambda name=name: steps_of(name, args, watch))
        sheet.add({"mixer": name, **({"settings": settings} if settings else {}), **found})
        still_there(args.device)


def main() -> None:
    parser = arguments(__doc__, "seconds after which a call is not repeated; default: 1")
    parser.set_defaults(cap=1.0)
    parser.add_argument("--compare", choices=["attention", "steps"], default="attention")
    parser.add_argument("--only", nargs="*", default=[], help="mixers, as blocks of a model are named")
    parser.add_argument("--paths", nargs="*", default=[], choices=["own", "kernels", "fla", "ours"])
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 2k, 8k, 32k; 2k with --compare steps")
    parser.add_argument("--tokens", type=int, default=32768, help="in all rows together, against attention")
    parser.add_argument("--heads", type=int, help="default: 16; 8 with --compare steps")
    parser.add_argument("--dim", type=int, help="of a head; default: 128; 64 with --compare steps")
    parser.add_argument("--steps", type=int, default=32, help="single tokens that are timed")
    parser.add_argument("--repeats", type=int, default=20)
    args = given(parser)
    steps = args.compare == "steps"
    args.lengths = args.lengths or ([2048] if steps else [2048, 8192, 32768])
    args.heads, args.dim = args.heads or (8 if steps else 16), args.dim or (64 if steps else 128)
    sizes = {name: getattr(args, name) for name in ("compare", "tokens", "heads", "dim", "steps", "repeats")}
    sheet = Sheet(args.out, {**here(args.device, "triton", "fla-core"), **sizes})
    (beside_steps if steps else beside_attention)(args, sheet, Clock(args.minutes))


if __name__ == "__main__":
    main()

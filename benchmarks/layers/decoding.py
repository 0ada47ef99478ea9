"""Time per token and bytes held while decoding, against the context: one layer of every mixer.

    python benchmarks/layers/decoding.py --out benchmarks/layers/decoding-h100.json           # on a CUDA device

bf16, 16 heads of 128. A layer reads a context in passes of some tokens, and at each of its lengths single tokens are
timed: ``eager_ms`` as a loop over tokens runs them, where a small step waits for Python; ``graph_ms`` the same step as
one captured CUDA graph, which is what its kernels take (the step is replayed from the same state; a step that cannot
be captured leaves it out and says why). Nothing but keys and values is worked out of a context that mixers keep whole.

Then a model of ``--blocks`` such layers and channel mixers decodes 1k tokens further, as ``generate`` does: plainly
(``eager_ms``), and by ``replay_steps`` (``replay_ms``), which captures the steps of models that hold no more with every
token.

Mixers have their defaults, but for what a row names under ``settings``. Every row is kept as it comes; what is there is
not measured again. A mixer that has not read a context after ``--cap`` seconds gets no rows beyond it, and one that
says so; ``--minutes`` ends a run in time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import (
    Clock,
    Sheet,
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
    settle,
    still_there,
)
from torch import Tensor

from vestige.core.capture import captured, waits
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import MixerLayer
from vestige.layers.state import LayerState
from vestige.models import VestigeConfig, VestigeLM

PASS = 1024  # tokens that are read together, at most
WINDOW = 256  # no default window is longer


def read(layer: MixerLayer, x: Tensor, state: LayerState, whole: bool) -> None:
    """Tokens into a state; without kernels that would have to be compiled for it alone."""
    if not whole:
        with portable():
            run_whole(layer, x, state)
        return
    layout = Layout.of(x.shape[0], x.shape[1], device=x.device, past=state.seen)
    _, k, v = layer.project(x, layout)  # type: ignore[operator]
    held = {"keys": k, "values": v}
    for name in state.tensors:
        held[name] = torch.cat([state.tensors[name], held[name]], 2)
    state.write(held, x.shape[1])


def eager(layer: MixerLayer, x: Tensor, start: LayerState, args: argparse.Namespace) -> float:
    """Milliseconds of a token of a loop; the first ones warm up."""
    state, spans = start.fork(), []
    for _ in range(2):
        settle(args.device)
        begin = time.perf_counter()
        for _ in range(args.steps):
            run_whole(layer, x, state)
        settle(args.device)
        spans.append(time.perf_counter() - begin)
    return 1e3 * spans[-1] / args.steps


def step_graph(layer: MixerLayer, x: Tensor, start: LayerState) -> Callable[[], None]:
    """The step from one state, as a graph that can be replayed."""
    layout = Layout.of(x.shape[0], 1, device=x.device, past=start.seen)

    def step() -> None:
        state = LayerState()
        state.tensors, state.seen = dict(start.tensors), start.seen
        layer(x, layout, state)

    step()
    if waits(step):
        raise RuntimeError("the step waits for the device")
    return captured(step, x.device).replay


def replayed(layer: MixerLayer, x: Tensor, start: LayerState, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step's kernels."""
    replay = step_graph(layer, x, start)
    for _ in range(3):
        replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(args.steps):
        replay()
    end.record()
    end.synchronize()
    return {"graph_ms": begin.elapsed_time(end) / args.steps}


def measured(layer: MixerLayer, x: Tensor, state: LayerState, args: argparse.Namespace) -> dict[str, Any]:
    after = state.fork()
    run_whole(layer, x, after)  # within a block a memory may hold more than at its end
    found: dict[str, Any] = {"state_bytes": after.nbytes, "eager_ms": eager(layer, x, state, args)}
    if args.device == "cuda":
        graph = attempt(lambda: replayed(layer, x, state, args))
        found |= {"graph_error": graph["error"]} if "error" in graph else graph
    return found


def contexts(name: str, batch: int, args: argparse.Namespace, sheet: Sheet, clock: Clock) -> dict[str, Any]:
    """Rows of one mixer and batch, context by context."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    layer = built(name, args.heads, args.dim, max(*args.contexts, WINDOW), args.device, dtype).eval()
    settings = settings_of(name, args.heads, args.heads * args.dim)
    state, whole, begun = LayerState(), grows(name), time.monotonic()
    for context in sorted(args.contexts):
        while state.seen < context:
            count = min(PASS, context - state.seen)
            read(layer, torch.randn(batch, count, args.heads * args.dim, device=args.device, dtype=dtype), state, whole)
            settle(args.device)
            if time.monotonic() - begun > args.cap or clock.over:
                return {"error": f"{state.seen} tokens were read in {time.monotonic() - begun:.0f} s"}
        which = {"what": "layer", "mixer": name, "batch": batch, "context": context}
        if not sheet.has(**which):
            x = torch.randn(batch, 1, args.heads * args.dim, device=args.device, dtype=dtype)
            paused = time.monotonic()
            found = measured(layer, x, state, args)
            begun += time.monotonic() - paused
            sheet.add({**which, **({"settings": settings} if settings else {}), **found})
    return {}


def whole_model(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a token of a model, plainly and replayed."""
    size, dtype = args.heads * args.dim, torch.bfloat16 if args.device == "cuda" else torch.float32
    config = VestigeConfig(
        blocks=[mixer_of(name, args.heads, size)] * args.blocks,
        hidden_size=size,
        num_attention_heads=args.heads,
        intermediate_size=2 * size,
    )
    model = VestigeLM(config).to(args.device, dtype).eval()
    tokens = torch.randint(1, config.vocab_size, (batch, min(PASS, *args.contexts)), device=args.device)
    start = model.new_state()
    with portable():
        model(tokens, past_key_values=start, logits_to_keep=1)
    found = {"state_bytes": start.nbytes}
    for kind, on in (("eager_ms", False), ("replay_ms", True)):
        model.replay_steps(on)
        state, token = start.fork(), tokens[:, :1]
        for _ in range(2):
            settle(args.device)
            begin = time.perf_counter()
            for _ in range(args.steps):
                token = model(token, past_key_values=state).logits[:, -1:].argmax(-1)
            settle(args.device)
            found[kind] = 1e3 * (time.perf_counter() - begin) / args.steps
    return found


def models(args: argparse.Namespace, sheet: Sheet, clock: Clock) -> None:
    """Rows of whole models."""
    for batch in args.batches:
        for name in (args.only or every_mixer()) if args.blocks else ():
            which = {"what": "model", "mixer": name, "batch": batch, "blocks": args.blocks}
            if clock.over:
                return
            if sheet.has(**which) or grows(name):
                continue
            with torch.inference_mode():
                found = attempt(lambda name=name, batch=batch: whole_model(name, batch, args))
            sheet.add({**which, **found})
            still_there(args.device)


def main() -> None:
    parser = arguments(__doc__, "seconds in which a mixer is to read the contexts; default: 8")
    parser.set_defaults(cap=8.0)
    parser.add_argument("--only", nargs="*", default=[], help="mixers, as blocks of a model are named")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024 << power for power in range(7)])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--blocks", type=int, default=8, help="of the models; 0: none")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128, help="of a head")
    parser.add_argument("--steps", type=int, default=30, help="tokens that are timed")
    args = given(parser)
    sizes = {name: getattr(args, name) for name in ("heads", "dim", "steps")}
    sheet, clock = Sheet(args.out, {**here(args.device, "triton", "fla-core"), **sizes}), Clock(args.minutes)
    for batch in args.batches:
        for name in args.only or every_mixer():
            which = {"what": "layer", "mixer": name, "batch": batch}
            if clock.over:
                return
            if sheet.has(**which, context=max(args.contexts)) or sheet.has(**which, context=None):
                continue
            with torch.inference_mode():
                failed = attempt(lambda name=name, batch=batch: contexts(name, batch, args, sheet, clock))
            if failed and not clock.over:
                sheet.add({**which, "context": None, **failed})
                still_there(args.device)
    models(args, sheet, clock)


if __name__ == "__main__":
    main()

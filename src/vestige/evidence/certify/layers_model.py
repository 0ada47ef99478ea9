"""Checks for mixers in a whole model: the state and its bytes, generation, saving, refusals."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from vestige.errors import InputError, SpecError
from vestige.evidence.certify.caching import held_bytes
from vestige.evidence.certify.layers import close
from vestige.evidence.certify.mixing import CONTEXT, LayerCase
from vestige.evidence.certify.suite import Seen, Suite, expect, refused
from vestige.layers.channels.base import Channel
from vestige.layers.mixers.base import Mixer
from vestige.models.state import VestigeState
from vestige.training.quiet import without_bars

mixers = Suite(Mixer, case=LayerCase)
channels = Suite(Channel, case=LayerCase)


def blocks(case: LayerCase) -> list[dict[str, Any]]:
    """Blocks of a small model with the method: a mixer twice, or a channel mixer under some mixer."""
    part = "channel" if isinstance(case.method, Channel) else "mixer"
    return [{"mixer": "gla(chunk=8)", part: case.fitted, "repeat": 2}]


@torch.no_grad()
def state_after(model: Any, ids: Tensor) -> VestigeState:
    """What a model holds after tokens."""
    state = model.new_state()
    model(ids, past_key_values=state)
    return state


@mixers.check("bytes")
def the_state_takes_what_it_says(case: LayerCase) -> Seen:
    """What is reported is the storage of all tensors that the state reaches, after prompts and after single tokens."""
    model = case.lm(blocks(case), torch.float32)
    state = state_after(model, case.ids(2, 30))
    told = []
    for _ in range(3):
        expect(state.nbytes == held_bytes(state), f"{state.nbytes} bytes are reported, {held_bytes(state)} are held")
        expect(state.nbytes == sum(state.nbytes_by_layer), "the layers do not add up")
        told.append(state.nbytes)
        with torch.no_grad():
            model(case.ids(2, 1), past_key_values=state)
    expect(told[0] > 0, "nothing is held after a prompt")
    fork = state.fork()
    shared = held_bytes([state, fork])
    expect(shared == 2 * state.nbytes, f"a state and its fork hold {shared} bytes, where each holds {state.nbytes}")
    state.reset()
    expect(state.nbytes == 0 == held_bytes(state), "a state that was reset still holds something")
    return {"bytes": told}


@mixers.check("bytes")
def the_state_grows_as_told(case: LayerCase) -> Seen:
    """With the length a state stays as large as it is, or grows by the same bytes with each token; never faster."""
    model = case.lm(blocks(case), torch.float32)
    held = [state_after(model, case.ids(1, length)).nbytes for length in (16, 32, 64)]
    rows = state_after(model, case.ids(3, 64)).nbytes
    expect(rows == 3 * held[2], f"three rows hold {rows} bytes, one row {held[2]}")
    first, second = (held[1] - held[0]) / 16, (held[2] - held[1]) / 32
    expect(first in (0, second), f"after 16, 32 and 64 tokens {held} bytes are held")
    return {"bytes after 64 tokens": held[2], "bytes per further token": second}


@mixers.check("invariance")
@torch.no_grad()
def a_model_reads_in_pieces_as_in_one(case: LayerCase) -> Seen:
    """Through the model: cached and uncached, padded and alone, packed and apart give the same logits."""
    model, ids = case.lm(blocks(case)), case.ids(1, 23)
    once = model(ids, use_cache=False).logits
    state, parts = model.new_state(), []
    for first, last in ((0, 9), (9, 10), (10, 11), (11, 23)):
        parts.append(model(ids[:, first:last], past_key_values=state).logits)
    largest = close(torch.cat(parts, 1), once, "in pieces")
    padded = torch.cat([case.ids(1, 5, seed=7), ids], 1).repeat(2, 1)
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    largest = max(largest, close(model(padded, attention_mask=mask).logits[:1, 5:], once, "padded"))
    ends = torch.tensor([0, 9, 10, 23], device=ids.device)
    apart = torch.cat([model(ids[:, a:b]).logits for a, b in ((0, 9), (9, 10), (10, 23))], 1)
    largest = max(largest, close(model(ids, cu_seqlens=ends).logits, apart, "packed"))
    return {"largest difference": largest}


@mixers.check("invariance")
def generation_is_the_same_every_way(case: LayerCase) -> Seen:
    """Greedy and with beams, cached or not, padded or alone, the same tokens are written."""
    model, alone = case.lm(blocks(case)), case.ids(1, 7)
    both = torch.cat([torch.cat([torch.zeros_like(case.ids(1, 5)), alone], 1), case.ids(1, 12, seed=1)])
    mask = torch.ones_like(both)
    mask[0, :5] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    by_itself = model.generate(alone, **options)[:, 7:]
    expect(torch.equal(model.generate(both, attention_mask=mask, **options)[:1, 12:], by_itself), "padding changes it")
    for beams in (1, 3):
        search = {"attention_mask": mask, "num_beams": beams, **options}
        cached, plain = (model.generate(both, use_cache=use, **search) for use in (True, False))
        expect(torch.equal(cached, plain), f"with {beams} beams the cache changes what is written")
    return {"tokens": 8, "beams": [1, 3]}


@mixers.check("invariance")
@torch.no_grad()
def rows_of_a_state_can_be_moved(case: LayerCase) -> Seen:
    """A state whose rows are reordered, repeated or selected goes on as one that was filled so; its origin stays."""
    model, ids, more = case.lm(blocks(case)), case.ids(3, 13), case.ids(3, 4, seed=1)
    largest = 0.0
    changes: list[tuple[Callable[[VestigeState], None], list[int]]] = [
        (lambda state: state.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda state: state.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda state: state.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]
    origin = state_after(model, ids)
    for change, rows in changes:
        moved = origin.fork()
        change(moved)
        expect(moved.nbytes == held_bytes(moved), "bytes of moved rows are not what is held")
        here = model(more[rows], past_key_values=moved).logits
        there = model(more[rows], past_key_values=state_after(model, ids[rows])).logits
        largest = max(largest, close(here, there, f"rows {rows}"))
    expect(origin.seen == 13, "what a fork reads reaches its origin")
    return {"largest difference": largest}


@mixers.check("invariance")
@channels.check("invariance")
@torch.no_grad()
def saved_and_loaded_it_is_the_same(case: LayerCase) -> Seen:
    """A model and its state come back from disk bit for bit, and into bfloat16; weights are safetensors."""
    model, ids = case.lm(blocks(case)), case.ids(2, 13)
    state = state_after(model, ids)
    with tempfile.TemporaryDirectory() as folder, without_bars():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).to(case.device)
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(case.device)
        kinds = {path.suffix for path in Path(folder).iterdir()}
        state.save(Path(folder) / "state.safetensors")
        loaded = VestigeState.load(Path(folder) / "state.safetensors", again.config, case.device)
    expect(kinds == {".json", ".safetensors"}, f"files of kinds {kinds} were written")
    weights, others = model.state_dict(), again.state_dict()
    expect(list(weights) == list(others), "other weights came back")
    changed = [name for name in weights if not torch.equal(weights[name], others[name])]
    expect(not changed, f"changed on the way: {', '.join(changed)}")
    expect(again.config.plan() == model.config.plan(), "other blocks came back")
    logits = model(case.ids(2, 3, seed=1), past_key_values=state).logits
    largest = close(again(case.ids(2, 3, seed=1), past_key_values=loaded).logits, logits, "after loading", 1e-12)
    expect(bool(half(ids).logits.isfinite().all()), "loaded in bfloat16 the logits are not finite")
    return {"largest difference": largest, "weights": len(weights)}


@mixers.check("invariance")
def checkpointing_changes_no_gradient(case: LayerCase) -> Seen:
    """With gradient checkpointing every weight receives the same gradient."""
    model, ids = case.lm(blocks(case)).train(), case.ids(2, 17)
    model(ids, labels=ids).loss.backward()
    plain = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    switch = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
    (switch or model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    largest = max(close(w.grad, plain[name], name) for name, w in model.named_parameters())  # type: ignore[arg-type]
    return {"largest difference": largest}


@mixers.check("bad input")
@torch.no_grad()
def what_does_not_fit_is_refused(case: LayerCase) -> Seen:
    """A foreign cache, another model's state, a wrong mask raise InputError; the state given stays as it was."""
    model = case.lm(blocks(case), torch.float32)
    ids = case.ids(2, 9)
    other = case.lm("softmax gla linear-attention", torch.float32)
    foreign = state_after(other, ids)
    own = state_after(model, ids)
    before, held = own.seen, own.nbytes
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: model(ids, past_key_values=DynamicCache()), "DynamicCache"),
        (lambda: model(ids, past_key_values=foreign), "other blocks"),
        (lambda: model(ids, past_key_values=own, attention_mask=torch.ones_like(ids)), "attention_mask"),
        (lambda: model(case.ids(3, 2), past_key_values=own), "rows"),
        (lambda: own.crop(-2), "taken back"),
    ]
    for call, word in wrong:
        refused(InputError, call, word)
    expect(foreign.seen == 9 and own.seen == before and own.nbytes == held, "a refused state was changed")
    return {"refused": len(wrong)}


@mixers.check("bad input")
@channels.check("bad input")
def a_block_that_cannot_be_is_named(case: LayerCase) -> Seen:
    """An unknown name in a pattern, or one that does not fit, is named with its position before anything is built."""
    name = case.method.name
    misspelt = name[:-1] + ("x" if name[-1] != "x" else "y")
    if isinstance(case.method, Mixer):
        refused(SpecError, lambda: case.config(f"softmax {misspelt}*2"), "entry 2 of 2", misspelt, name)
        refused(SpecError, lambda: case.config("softmax*3 " + name + "(nonsense=1)"), "entry 2 of 2", "nonsense")
    else:
        refused(SpecError, lambda: case.config("softmax", channel=misspelt), "entry 1 of 1", misspelt, name)
        refused(SpecError, lambda: case.config(name), "entry 1 of 1", "no mixer")
    if "window" in case.method.parameters():
        long = case.fitted.replace(window=CONTEXT + 1)
        refused(SpecError, lambda: case.config([{"mixer": long}]), "block 1 of 1", str(CONTEXT + 1), str(CONTEXT))
    return {"refused": 2}

"""Checks for what plans learn of a model: the equations behind gates, scores and influences."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from vestige.context.evict.full import Full
from vestige.context.plan.distil import GatedAttention
from vestige.context.plan.duo_attention import DuoAttention
from vestige.context.plan.influence import along_distances, influence
from vestige.context.plan.moa import MoA
from vestige.context.plan.passkeys import copies
from vestige.context.plan.razor_attention import RazorAttention
from vestige.context.plan.repeats import find_heads
from vestige.context.plan.rules import Program
from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.suite import Seen, Suite, expect
from vestige.evidence.references import duo_attention, moa, razor_attention

EXACT = 1e-9
gates = Suite(DuoAttention, case=CacheCase)
copying = Suite(RazorAttention, case=CacheCase)
rules = Suite(MoA, case=CacheCase)


@gates.check("reference")
def gated_attention_agrees(case: CacheCase) -> Seen:
    """Attention as the gates are trained, and its gradient with respect to gates and states, are the reference's."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(heads, 14, 6, dtype=torch.float64, generator=draw) for heads in (4, 2, 2))
    gate = torch.tensor([[0.3, 0.8]], dtype=torch.float64)
    leaves = [state.requires_grad_() for state in (query, key, value, gate)]
    attention = GatedAttention(sinks=2, recent=3)
    attention.gates = gate
    layer = torch.nn.Module()
    layer.layer_idx = 0
    mine = attention(layer, query[None], key[None], value[None], None, scaling=0.4)[0][0].transpose(0, 1)
    due = duo_attention.gated(query, key, value, gate[0], sinks=2, recent=3, scaling=0.4)
    forward = float((mine - due).detach().abs().max())
    weights = torch.randn(due.shape, dtype=torch.float64, generator=draw)
    found, wanted = (torch.autograd.grad((out * weights).sum(), leaves) for out in (mine, due))
    backward = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    expect(max(forward, backward) < EXACT, f"outputs differ by {forward:.3g}, gradients by {backward:.3g}")
    return {"difference": forward, "difference of gradients": backward}


@copying.check("reference")
def scores_of_heads_agree(case: CacheCase) -> Seen:
    """Echo and induction of every head are those of its whole attention matrix."""
    period, repeats = 9, 4
    largest = 0.0
    for architecture in ("llama", "gpt2"):
        model = case.tiny(architecture)
        found = find_heads(case.method.replace(**_no_tables), model, period=period, repeats=repeats, seed=3)  # type: ignore[arg-type]
        draw = torch.Generator().manual_seed(3)
        words = torch.tensor([token for token in range(97) if token not in (0, 1, 2)])
        text = words[torch.randint(len(words), (period,), generator=draw)].repeat(repeats)
        ids = torch.cat([torch.tensor([1]), text])[None].to(case.device)
        for layer, (query, key) in _seen(model, ids).items():
            group = len(query) // len(key)
            for head in range(len(key)):
                looks = [
                    razor_attention.looks(_attention(query[h], key[head])[1:, 1:], period)
                    for h in range(head * group, (head + 1) * group)
                ]
                for name, due in zip(("echo", "induction"), map(max, zip(*looks, strict=True)), strict=True):
                    largest = max(largest, abs(getattr(found, name)[layer][head] - due))
    expect(largest < 1e-5, f"scores differ by {largest:.3g} (they are rounded to five digits)")
    return {"difference": largest}


_no_tables: dict[str, Any] = {"induction": (), "echo": (), "fitted_on": ""}


def _seen(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Each layer's queries and keys, ``(heads, length, dim)``, in one pass."""
    states: dict[int, tuple[Tensor, Tensor]] = {}
    with Full().attach(model) as kept, torch.no_grad():
        kept.watch(lambda layer, query, keys, positions, scaling: states.update({layer: (query[0] * scaling, keys[0])}))
        model(ids)
    return states


def _attention(query: Tensor, key: Tensor) -> Tensor:
    ahead = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    return (query @ key.T).double().cpu().masked_fill(ahead, float("-inf")).softmax(dim=1)


@rules.check("reference")
def influences_are_changes_of_the_loss(case: CacheCase) -> Seen:
    """The influence of an entry is the derivative of the loss by its removal, as finite differences see it."""
    worst = 0.0
    for architecture in ("llama", "gpt2"):
        model, step = case.tiny(architecture), 1e-2
        anatomy = Anatomy.of(model)
        (sample,) = copies(range(3, 97), 12, 1, copied=1, seed=2)
        # Only the last but one token's row says what counts, so the largest distance there has one entry: the first.
        found = influence(model, [sample], sinks=0)[:, :, len(sample.ids) - 2]
        due = torch.zeros_like(found)
        for layer, head in itertools.product(range(anatomy.num_layers), range(anatomy.num_kv_heads)):
            loss = [_loss_without(model, anatomy, sample, layer, head, part) for part in (-step, step)]
            due[layer, head] = abs(loss[1] - loss[0]) / (2 * step)
        worst = max(worst, float((found - due).abs().max() / due.max()))
    expect(worst < 1e-3, f"influences differ from the changes of the loss by {worst:.3g} of the largest")
    return {"largest relative difference": worst}


@torch.no_grad()
def _loss_without(model: Any, anatomy: Anatomy, sample: Any, at: int, of: int, part: float) -> float:
    """The loss when a part of what one kv head's last asking row gives to the first entry goes to the other entries."""
    ids, counts = sample.tensors(next(model.parameters()).device)
    own = model(ids).logits[0, :-1][counts].argmax(dim=-1)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **rest: Any
    ) -> Any:
        count, group = query.shape[2], query.shape[1] // key.shape[1]
        keys, values = (states.repeat_interleave(group, dim=1) for states in (key, value))
        ahead = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        share = ((query @ keys.transpose(2, 3)) * scale).masked_fill(ahead, float("-inf")).softmax(dim=-1)
        if module.layer_idx == at:
            row = share[0, of * group : (of + 1) * group, count - 2]
            first = row[:, :1].clone()
            row[:, 1:] *= 1 + part * first / (1 - first)
            row[:, :1] *= 1 - part
        return (share @ values).transpose(1, 2).contiguous(), None

    with Patch(model, "certify") as patch:
        patch.attention("vestige-removal", attention)
        logits = model(ids).logits[0, :-1][counts]
    return float(torch.nn.functional.cross_entropy(logits.double(), own))


@rules.check("reference")
def influences_by_distance_agree(case: CacheCase) -> Seen:
    """Summed up by distance, without sinks, influences are the reference's."""
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(9, 5, dtype=torch.float64, generator=draw)
    attention = torch.randn(2, 9, 9, dtype=torch.float64, generator=draw)
    attention = attention.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf")).softmax(dim=-1)
    gradient = torch.randn(2, 9, 5, dtype=torch.float64, generator=draw)
    due = moa.by_distance(attention, value, gradient, sinks=2)
    found = along_distances(attention, value.expand(2, 9, 5), attention @ value, gradient, torch.arange(9), 1, sinks=2)[
        0
    ]
    difference = float((found - due).abs().max())
    expect(difference < EXACT, f"sums by distance differ by {difference:.3g}")
    return {"difference": difference}


@rules.check("reference")
def plans_keep_the_density_and_are_best(case: CacheCase) -> Seen:
    """On a model so small that every plan can be tried, the program's plan is the one of least loss that may be."""
    draw = torch.Generator().manual_seed(0)
    profiles = {n: torch.rand(1, 3, n, generator=draw) ** 4 / (1 + torch.arange(n)) for n in (16, 32)}
    method = MoA(density=0.5, sinks=1, recent=2)
    program = Program.of(method, profiles)
    keep = sorted({0, *range(1, len(program.rules), max(1, len(program.rules) // 9))})
    small = Program(
        tuple(program.rules[r] for r in keep),
        tuple(loss[:, keep] for loss in program.losses),
        program.densities[:, keep],
        program.layers,
        program.density,
        None,
    )
    possible = [
        plan
        for plan in itertools.product(range(len(keep)), repeat=3)
        if small.densities[:, plan].mean(axis=1).max() <= method.density
    ]
    for loss in (*small.losses, sum(small.losses)):
        least = min(sum(loss[head, rule] for head, rule in enumerate(plan)) for plan in possible)  # type: ignore[index]
        plan = small.solve(loss)
        expect(plan in possible, f"the plan {plan} holds more than the density")
        found = sum(loss[head, rule] for head, rule in enumerate(plan))  # type: ignore[arg-type, index]
        expect(found <= least * 1.01 + 1e-9, f"the plan loses {found:.4f}, and one that loses {least:.4f} is possible")
    return {"plans tried": len(possible)}

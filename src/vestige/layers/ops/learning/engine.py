r"""A memory that learns while it reads: the one engine under every rule of that kind.

A head holds the weights of a small network. Each token has a key, a value and a query; the slope :math:`g_i` of a loss
between the answer to the key and the value moves the weights, and the query is answered with the weights moved:

.. math::
    S_t = \eta_t S_{t-1} - \sum_{t - c < i \le t} \theta_i g_i, \qquad
    A_t = \alpha_t A_{t-1} + \lambda_t T(S_t), \qquad W_t = \varphi(A_t), \qquad o_t = M_{W_t}(q_t) .

The rule names the network, the loss, the map :math:`\varphi`, the window :math:`c`, whether there is momentum
:math:`\eta`, and whether :math:`T` is Muon's iteration or nothing. Slopes are taken at the weights at the beginning of
the token's block, of ``refresh`` tokens (of each text, whatever pass they came in). That makes a block linear in them:

.. math::
    S_t = e^{h_t} S_0 - \sum_i H_{ti} g_i, \quad H = D(\log \eta)\, \Omega, \qquad
    A_t = e^{a_t} A_0 + r_t S_0 - \sum_i R_{ti} g_i, \quad R = D(\log \alpha)\, \Lambda H ,

with :math:`D(l)_{tj} = e^{l_t - l_j}` over running sums below the diagonal, and :math:`\Omega_{ti} = \theta_i` inside
the window. A slope is an outer product of a layer's input :math:`x_i` and the slope :math:`d_i` in its output, so a
layer whose weights moved answers :math:`e^{a_t} z A_0 + r_t z S_0 - \sum_i R_{ti} (z \cdot x_i) d_i`: matrix products
alone, and no weights per token. Where :math:`\varphi` or :math:`T` is not linear, either every token's weights are
worked out after all (and again in the backward pass, not stored), or, ``by_block``, queries are answered with the
weights at the block's beginning and :math:`T`, :math:`\varphi` applied at its end.

A single token is a block of one slot: the same lines are the recurrent form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vestige.layers.ops.learning.answers import answer
from vestige.layers.ops.learning.blocks import Blocks
from vestige.layers.ops.learning.everywhere import answer_everywhere
from vestige.layers.ops.learning.muon import by_muon
from vestige.layers.ops.learning.rules import Brain, Lesson, Pages, Rule, Slow
from vestige.layers.ops.learning.scan import Scanned, scan
from vestige.layers.ops.learning.steps import Features
from vestige.layers.ops.recurrence import FAINTEST, exact

__all__ = ["Brain", "Lesson", "Rule", "begin", "learn", "recall"]

HELD_AT_ONCE = {"cpu": 1 << 25}
"""Bytes of what memories hold at the beginnings of blocks that are answered at once; on other devices 1 GB, for there
it is the number of steps that takes time."""


def begin(rule: Rule, slow: Slow, lesson: Lesson, held: dict[str, Tensor]) -> Brain:
    """What is held before the tokens: of the state, or what training left where there is none."""
    layers = range(len(slow.start))
    if "total.0" in held:
        total, point, surprise = (
            [held[f"{name}.{index}"] for index in layers if f"{name}.{index}" in held]
            for name in ("total", "point", "surprise")
        )
        return Brain(total, point, surprise, held.get("due"))
    batch, _, heads, _ = lesson.v.shape
    total = [start.expand(batch, -1, -1, -1) for start in slow.start]
    surprise = [torch.zeros_like(part) for part in total] if lesson.momentum is not None else []
    due = lesson.v.new_zeros(batch, heads) if rule.muon and rule.by_block else None
    return Brain(total, [rule.retention.weights(part) for part in total], surprise, due)


def learn(
    rule: Rule,
    slow: Slow,
    lesson: Lesson,
    held: dict[str, Tensor],
    *,
    valid: Bool[Tensor, "batch length"] | None = None,
    starts: Bool[Tensor, "batch length"] | None = None,
    blocks: Blocks | None = None,
) -> Float[Tensor, "batch length heads dim"]:
    """Let tokens teach the memory, and answer their queries.

    Everything is worked out in float32 at least.

    Args:
        held: what an earlier pass left, by name; it is brought up to date.
        valid: False at padding.
        starts: where packed sequences begin.
        blocks: the slots of the tokens, where they are known already; then ``valid`` and ``starts`` are in them.
    """
    kind, out = exact(lesson.v), lesson.v.dtype
    batch, length = lesson.v.shape[:2]
    with torch.autocast(lesson.v.device.type, enabled=False):
        lesson = lesson.to(kind)
        slow = slow.to(kind)
        if blocks is None:
            blocks = Blocks.of(
                rule.refresh,
                batch,
                length,
                device=lesson.v.device,
                before=rule.window - 1,
                filled=held.get("filled"),
                valid=valid,
                starts=starts,
            )
        brain = begin(rule, slow, lesson, held)
        newborn = begin(rule, slow, lesson, {}) if blocks.fresh else brain
        feature = Features.of(rule.feature, lesson.k.shape[-1], rule.degree, lesson.k)
        pages = _pages(rule, lesson, held, blocks)
        along = by_muon if rule.muon else _along
        read, brain = along(rule, slow, feature, pages, blocks, brain, newborn)
        brain.write(held)
        held["filled"] = blocks.filled
        slots = read.permute(1, 0, 3, 2, 4).flatten(1, 2)
        return blocks.back(slots, length).to(out)


def _pages(rule: Rule, lesson: Lesson, held: dict[str, Tensor], blocks: Blocks) -> Pages:
    """Cut a lesson into blocks and work out what its gates amount to; the window's tokens are kept in ``held``."""

    def rows(name: str, tensor: Tensor) -> Tensor:
        """With those of the past, by block; the last ones are kept."""
        places = blocks.lay(tensor, held.get(name))
        if blocks.before:
            held[name] = blocks.keep(places)
        return blocks.cut(places if places.dim() == 4 else places[..., None])

    def gates(tensor: Tensor) -> Tensor:
        """``(count, batch, heads, slots)``."""
        return blocks.cut(blocks.lay(tensor)[:, blocks.before :, :, None])[..., 0]

    k, v = rows("key", lesson.k), rows("value", lesson.v)
    rate = rows("rate", lesson.rate)[..., 0]
    bound = None if lesson.bound is None else rows("bound", lesson.bound)[..., 0]
    q = blocks.cut(blocks.lay(lesson.q)[:, blocks.before :])
    real = blocks.cut(blocks.real[:, :, None, None].to(q.dtype))[..., 0]
    step = real if lesson.step is None else gates(lesson.step)  # empty slots are zero in both, and in rates
    logs = [gates(t) for t in (lesson.decay, lesson.momentum) if t is not None]
    sums = _sums(torch.stack(logs))  # of both at once: where texts are short, what counts is how many steps there are
    (faded, *flowed), (into, *alongs) = _between(sums), sums.exp()
    if rule.window == 1:
        heap = rate[..., None, :] * flowed[0] if flowed else torch.diag_embed(rate)
    else:
        heap = rate[..., None, :] * real[..., :, None] * _band(blocks, rule.window, q)
        heap = flowed[0] @ heap if flowed else heap
    along = alongs[0] if alongs else None
    take = faded * step[..., None, :]
    carry = None if along is None else (take @ along[..., None])[..., 0]
    within = take @ heap
    left = torch.stack([t[..., -1] for t in (into, carry, along) if t is not None], 1)
    parts = {"q": q, "k": k, "v": v, "bound": bound, "into": into, "carry": carry, "along": along, "left": left}
    parts |= {"within": within, "heap": heap, "take": take, "share": within[..., -1, :], "pile": heap[..., -1, :]}
    # Laid out by block once, not in every product that they go into.
    return Pages(**{name: None if t is None else t.contiguous() for name, t in parts.items()})


def recall(
    rule: Rule, slow: Slow, q: Float[Tensor, "batch length heads dim"], held: dict[str, Tensor]
) -> Float[Tensor, "batch length heads dim"]:
    """Answer queries with the weights at the beginning of the block, and learn nothing."""
    kind, out = exact(q), q.dtype
    with torch.autocast(q.device.type, enabled=False):
        slow = slow.to(kind)
        point = [held[f"point.{index}"] for index in range(len(slow.start)) if f"point.{index}" in held]
        point = point or [rule.retention.weights(w) for w in slow.start]
        q = q.to(kind).transpose(1, 2)
        x = slow.seen(Features.of(rule.feature, q.shape[-1], rule.degree, q), q)
        read, _ = rule.memory.run(x, q, slow.gain, lambda index, t: t @ point[index])
        return read.transpose(1, 2).to(out)


def _along(
    rule: Rule, slow: Slow, feature: Features | None, pages: Pages, blocks: Blocks, brain: Brain, newborn: Brain
) -> tuple[Tensor, Brain]:
    """Blocks of a rule whose steps are linear in the slopes: what is held is worked out block by block, the answers for
    many blocks at once. They are ``(count, batch, heads, slots, dim)``."""
    batch, heads = brain.total[0].shape[:2]
    held = sum(part.nbytes for part in (*brain.total, *brain.surprise))
    some, read = max(1, HELD_AT_ONCE.get(pages.q.device.type, 1 << 30) // held), []
    gain = slow.gain.repeat(batch, 1, 1)
    for first in range(0, blocks.count, some):
        here = slice(first, first + some)
        if blocks.fresh:
            brain = newborn.pick(blocks.fresh[first], brain)
        page, anew = pages.at(here).flat(), blocks.fresh[here]
        known = scan(
            rule.memory,
            rule.bias,
            rule.retention,
            slow.seen(feature, page.k),
            page.k,
            page.v,
            page.bound,
            gain,
            page.left,
            page.share,
            page.pile,
            total=[t.flatten(0, 1) for t in brain.total],
            surprise=[t.flatten(0, 1) for t in brain.surprise],
            point=[t.flatten(0, 1) for t in brain.point],
            start=[t.flatten(0, 1) for t in newborn.total] if anew else [],
            fresh=torch.stack(anew).repeat_interleave(heads, 1) if anew else None,
        )
        answers = _answers(rule, slow.seen(feature, page.q), page, gain, known, brain)
        read.append(answers.unflatten(1, (batch, heads)))
        after = [[t.unflatten(0, (batch, heads)) for t in kind] for kind in (known.last_total, known.last_surprise)]
        brain = Brain(after[0], _point(rule, known, brain.point, after[0], blocks.full[here], anew), after[1])
    return torch.cat(read), brain


def _answers(rule: Rule, z: Tensor, page: Pages, gain: Tensor, known: Scanned, brain: Brain) -> Tensor:
    """What queries of some blocks are answered; ``z`` is what the first layer sees of them."""

    def layer(index: int, t: Tensor) -> Tensor:
        if rule.by_block:
            first, held = brain.point[index].flatten(0, 1)[None], known.total[index]
            if not torch.is_grad_enabled():
                return _with_points(rule, t, first, held)
            return checkpoint(_with_points, rule, t, first, held, use_reentrant=False, preserve_rng_state=False)
        surprise = known.surprise[index] if known.surprise else None
        given = t, known.total[index], surprise, *known.pairs[index], page.within, page.into, page.carry
        return answer(*given) if rule.retention.linear else answer_everywhere(rule.retention, *given)

    return rule.memory.run(z, page.q, gain, layer)[0]


def _with_points(rule: Rule, z: Tensor, first: Tensor, held: Tensor) -> Tensor:
    """What a layer answers with the weights at the beginning of each block."""
    return z @ torch.cat([first, rule.retention.weights(held[1:])])


def _point(
    rule: Rule,
    known: Scanned,
    old: list[Tensor],
    total: list[Tensor],
    full: Sequence[bool | Tensor],
    fresh: Sequence[Tensor],
) -> list[Tensor]:
    """Where slopes are taken after some blocks: at what was held when the newest one began of which tokens are there.

    Behind a block that is not full there is nothing in a row, or another text.
    """
    blocks = len(full)
    if isinstance(full[0], bool):
        newest = sum(bool(each) for each in full)
        if newest == 0:
            return old
        held = (
            total if newest == blocks else [t[newest].clone().view_as(o) for t, o in zip(known.total, old, strict=True)]
        )
        return [rule.retention.weights(t) for t in held]
    place = torch.arange(1, blocks + 1, device=full[0].device)[:, None]
    ended = place * torch.stack(full)  # type: ignore[arg-type]
    newest = (torch.maximum(ended, (place - 1) * torch.stack(fresh)) if fresh else ended).amax(0)
    rows, found = torch.arange(len(newest), device=newest.device), []
    for before, after, point in zip(known.total, total, old, strict=True):
        held, at = after, newest.view(-1, *[1] * (point.dim() - 1))
        if blocks > 1:
            begun = before.unflatten(1, point.shape[:2])[newest.clamp_max(blocks - 1), rows]
            held = torch.where(at == blocks, after, begun)
        found.append(torch.where(at > 0, rule.retention.weights(held), point))
    return found


def _sums(logs: Float[Tensor, "... slots"]) -> Float[Tensor, "... slots"]:
    return logs.clamp_min(FAINTEST).cumsum(-1)


def _between(sums: Float[Tensor, "... slots"]) -> Float[Tensor, "... slots slots"]:
    """What is left at a slot of what came at an earlier one."""
    gap = sums[..., :, None] - sums[..., None, :]
    ahead = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
    return gap.masked_fill(ahead, -torch.inf).exp()


def _band(
    blocks: Blocks, window: int, like: Tensor
) -> Float[
    Tensor,
    (
        count  # batch 1 slots rows
    ),
]:
    """Which rows are in the window of each slot; nothing of the past is where a text begins."""
    slots, rows = blocks.width, blocks.before + blocks.width
    ones = torch.ones(slots, rows, dtype=like.dtype, device=like.device)
    band = (ones.tril(blocks.before) - ones.tril(blocks.before - window))[None, None, None]
    if not blocks.fresh or not blocks.before:
        return band
    old = F.pad(like.new_ones(blocks.before), (0, blocks.width))
    return band * (1 - old * torch.stack(blocks.fresh)[:, :, None, None, None].to(like.dtype))

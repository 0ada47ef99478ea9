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
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vestige.layers.ops.learning.answers import answer
from vestige.layers.ops.learning.biases import Bias
from vestige.layers.ops.learning.blocks import Blocks
from vestige.layers.ops.learning.lessons import taught
from vestige.layers.ops.learning.perceptron import Perceptron
from vestige.layers.ops.learning.retentions import Retention
from vestige.layers.ops.learning.scan import Scanned, scan
from vestige.layers.ops.learning.steps import FeatureName, Features, newton_schulz
from vestige.layers.ops.recurrence import FAINTEST, exact

__all__ = ["Brain", "Lesson", "Rule", "begin", "learn", "recall"]

HELD_AT_ONCE = {"cpu": 1 << 25}
"""Bytes of what memories hold at the beginnings of blocks that are answered at once; on other devices 1 GB, for there
it is the number of steps that takes time."""


@dataclass(frozen=True)
class Rule:
    """What kind of memory it is, and how it learns.

    Attributes:
        memory: the network.
        bias: the loss.
        retention: how its weights follow from what is added up.
        refresh: tokens after which slopes are taken at the weights of then.
        window: the last tokens whose slopes a token adds.
        muon: iterations that bring a step to equal size in every direction; 0: none.
        by_block: whether queries are answered with the weights at the beginning of their block.
        feature, degree: what the first layer sees of keys and queries: see
            :class:`~vestige.layers.ops.learning.steps.Features`.
    """

    memory: Perceptron = field(default_factory=Perceptron)
    bias: Bias = field(default_factory=Bias)
    retention: Retention = field(default_factory=Retention)
    refresh: int = 16
    window: int = 1
    muon: int = 0
    by_block: bool = False
    feature: FeatureName = "none"
    degree: int = 1

    @property
    def linear(self) -> bool:
        """Whether weights are sums of slopes, and queries answered with those of their own slot."""
        return self.retention.linear and not self.muon and not self.by_block


@dataclass(frozen=True)
class Lesson:
    """What tokens teach and ask.

    Attributes:
        q, k, v: ``(batch, length, heads, dim)``.
        rate: theta, how much a token's slope counts.
        decay: logarithm of alpha, at most 0.
        momentum: logarithm of eta, at most 0; ``None``: the sum of slopes is begun anew with each token.
        step: lambda, how much of that sum is added; ``None``: all.
        bound: beyond which error the loss of the rule grows more slowly, if it does.
    """

    q: Float[Tensor, "batch length heads dim"]
    k: Float[Tensor, "batch length heads dim"]
    v: Float[Tensor, "batch length heads dim"]
    rate: Float[Tensor, "batch length heads"]
    decay: Float[Tensor, "batch length heads"]
    momentum: Float[Tensor, "batch length heads"] | None = None
    step: Float[Tensor, "batch length heads"] | None = None
    bound: Float[Tensor, "batch length heads"] | None = None

    def to(self, kind: torch.dtype) -> Lesson:
        """The same in another type."""
        return replace(self, **{f.name: t.to(kind) for f in fields(self) if (t := getattr(self, f.name)) is not None})


@dataclass(frozen=True)
class Slow:
    """What the memory has from training: it is the same for every text.

    Attributes:
        start: for each layer ``(heads, inputs, outputs)`` what the rule begins with.
        gain: ``(heads, 1, dim)`` of the network's norm.
        scale: of features, by their degree.
    """

    start: Sequence[Float[Tensor, "heads inputs outputs"]]
    gain: Float[Tensor, "heads 1 dim"]
    scale: Float[Tensor, " degrees"] | None = None


@dataclass
class Brain:
    """What is held: for each layer ``(batch, heads, inputs, outputs)``.

    Attributes:
        total: A, which fades and is added to.
        point: the weights at the beginning of the block, where slopes are taken.
        surprise: S, if there is momentum.
        due: ``(batch, heads)`` how much of the block's step is to be added at its end, where that is done at once.
    """

    total: list[Tensor]
    point: list[Tensor]
    surprise: list[Tensor] = field(default_factory=list)
    due: Tensor | None = None

    def pick(self, rows: Bool[Tensor, " batch"], other: Brain) -> Brain:
        """This in some rows, another in the rest."""

        def one(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        def each(mine: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [one(a, b) for a, b in zip(mine, theirs, strict=True)]

        due = None if self.due is None or other.due is None else one(self.due, other.due)
        total, point = each(self.total, other.total), each(self.point, other.point)
        return Brain(total, point, each(self.surprise, other.surprise), due)

    def write(self, held: dict[str, Tensor]) -> None:
        """Put it among the named tensors of a state."""
        for name, parts in (("total", self.total), ("point", self.point), ("surprise", self.surprise)):
            held.update({f"{name}.{index}": part for index, part in enumerate(parts)})
        if self.due is not None:
            held["due"] = self.due


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
    within: bool = False,
) -> Float[Tensor, "batch length heads dim"]:
    """Let tokens teach the memory, and answer their queries.

    Everything is worked out in float32 at least.

    Args:
        held: what an earlier pass left, by name; it is brought up to date.
        valid: False at padding.
        starts: where packed sequences begin.
        within: whether the tokens are known not to go beyond the end of a block.
    """
    kind, out = exact(lesson.v), lesson.v.dtype
    batch, length = lesson.v.shape[:2]
    with torch.autocast(lesson.v.device.type, enabled=False):
        lesson = lesson.to(kind)
        slow = Slow([w.to(kind) for w in slow.start], slow.gain.to(kind), _to(slow.scale, kind))
        blocks = Blocks.of(
            rule.refresh,
            batch,
            length,
            device=lesson.v.device,
            before=rule.window - 1,
            filled=held.get("filled"),
            valid=valid,
            starts=starts,
            within=within,
        )
        brain = begin(rule, slow, lesson, held)
        newborn = begin(rule, slow, lesson, {}) if blocks.fresh else brain
        feature = Features.of(rule.feature, lesson.k.shape[-1], rule.degree, lesson.k)
        pages = _pages(rule, lesson, held, blocks)
        along = _along if rule.linear else _stepwise
        read, brain = along(rule, slow, feature, pages, blocks, brain, newborn)
        brain.write(held)
        held["filled"] = blocks.filled
        slots = read.permute(1, 0, 3, 2, 4).flatten(1, 2)
        return blocks.back(slots, length).to(out)


@dataclass(frozen=True)
class Pages:
    """The blocks of a lesson, or some, or one; ``rows`` are a block's slots and what it sees of the past.

    Attributes:
        q: ``(count, batch, heads, slots, dim)``; k, v: ``(count, batch, heads, rows, dim)``; bound: ``(count, batch,
            heads, rows)``.
        into: ``(count, batch, heads, slots)`` how much of A there was before is left in A at each slot; carry: and of S
            in A; along: and of S in S.
        within: ``(count, batch, heads, slots, rows)`` R, how much of each slope is in A; heap: H, and in S.
        take: ``(count, batch, heads, slots, slots)`` how much of each slot's S is in A.
        left: ``(count, 1 or 3, batch, heads)`` into, carry and along, at the last slot; share, pile: ``(count, batch,
            heads, rows)`` within and heap, there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bound: Tensor | None
    into: Tensor
    carry: Tensor | None
    along: Tensor | None
    within: Tensor
    heap: Tensor
    take: Tensor
    left: Tensor
    share: Tensor
    pile: Tensor

    def at(self, which: int | slice) -> Pages:
        """Some of the blocks, or one, without the first dimension."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Pages(**{name: None if t is None else t[which] for name, t in parts.items()})


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
    step = real if lesson.step is None else gates(lesson.step)  # empty slots are zero in both
    fade = _sums(gates(lesson.decay))
    faded = _between(fade)
    omega = rate[..., None, :] * real[..., :, None] * _band(blocks, rule.window, q)
    if lesson.momentum is None:
        heap, along = omega, None
    else:
        flow = _sums(gates(lesson.momentum))
        heap, along = _between(flow) @ omega, flow.exp()
    take = faded * step[..., None, :]
    carry = None if along is None else (take @ along[..., None])[..., 0]
    into, within = fade.exp(), take @ heap
    left = torch.stack([t[..., -1] for t in (into, carry, along) if t is not None], 1)
    parts = {"q": q, "k": k, "v": v, "bound": bound, "into": into, "carry": carry, "along": along, "left": left}
    parts |= {"within": within, "heap": heap, "take": take, "share": within[..., -1, :], "pile": heap[..., -1, :]}
    # Laid out by block once, not in every product that they go into.
    return Pages(**{name: None if t is None else t.contiguous() for name, t in parts.items()})


def recall(
    rule: Rule, slow: Slow, q: Float[Tensor, "batch length heads dim"], held: dict[str, Tensor]
) -> Float[Tensor, "batch length heads dim"]:
    """Answer queries with the weights at the beginning of the block, and learn nothing."""
    kind, out, layers = exact(q), q.dtype, range(len(slow.start))
    with torch.autocast(q.device.type, enabled=False):
        start = [rule.retention.weights(w.to(kind)) for w in slow.start]
        point = [held.get(f"point.{index}", start[index]) for index in layers]
        q = q.to(kind).transpose(1, 2)
        x = _seen(Features.of(rule.feature, q.shape[-1], rule.degree, q), q, _to(slow.scale, kind))
        read, _ = rule.memory.run(x, q, slow.gain.to(kind), lambda index, t: t @ point[index])
        return read.transpose(1, 2).to(out)


def _along(
    rule: Rule, slow: Slow, feature: Features | None, pages: Pages, blocks: Blocks, brain: Brain, newborn: Brain
) -> tuple[Tensor, Brain]:
    """Blocks of a rule whose steps are linear in the slopes: what is held is worked out block by block, the answers for
    many blocks at once. ``read`` is ``(count, batch, heads, slots, dim)``."""
    batch, heads = brain.total[0].shape[:2]
    held = sum(part.nbytes for part in (*brain.total, *brain.surprise))
    some, read = max(1, HELD_AT_ONCE.get(pages.q.device.type, 1 << 30) // held), []
    for first in range(0, blocks.count, some):
        last = min(first + some, blocks.count)
        if blocks.fresh:
            brain = newborn.pick(blocks.fresh[first], brain)
        page = pages.at(slice(first, last))
        x = _seen(feature, page.k, slow.scale)
        gain = slow.gain.repeat(batch, 1, 1)
        anew = blocks.fresh[first:last]
        known = scan(
            rule.memory,
            rule.bias,
            x.flatten(1, 2),
            page.k.flatten(1, 2),
            page.v.flatten(1, 2),
            None if page.bound is None else page.bound.flatten(1, 2),
            gain,
            page.left.flatten(2),
            page.share.flatten(1, 2),
            page.pile.flatten(1, 2),
            total=[t.flatten(0, 1) for t in brain.total],
            surprise=[t.flatten(0, 1) for t in brain.surprise],
            point=[t.flatten(0, 1) for t in brain.point],
            start=[t.flatten(0, 1) for t in newborn.total] if anew else [],
            fresh=torch.stack(anew).repeat_interleave(heads, 1) if anew else None,
        )
        z = _seen(feature, page.q, slow.scale)
        flat = {n: None if (t := getattr(page, n)) is None else t.flatten(1, 2) for n in ("within", "into", "carry")}

        def layer(index: int, t: Tensor, known: Scanned = known, flat: dict[str, Any] = flat) -> Tensor:
            surprise = known.surprise[index] if known.surprise else None
            return answer(t, known.total[index], surprise, *known.pairs[index], **flat)

        found, _ = rule.memory.run(z.flatten(1, 2), page.q.flatten(1, 2), gain, layer)
        read.append(found.unflatten(1, (batch, heads)))
        total, surprise = (
            [t.unflatten(0, (batch, heads)) for t in kind] for kind in (known.last_total, known.last_surprise)
        )
        brain = Brain(total, _point(known, brain, total, blocks, first, last), surprise)
    return torch.cat(read), brain


def _point(known: Scanned, brain: Brain, total: list[Tensor], blocks: Blocks, first: int, last: int) -> list[Tensor]:
    """Where slopes are taken after some blocks: at what was held when the newest one began of which tokens are there.

    Behind a block that is not full there is nothing in a row, or another text.
    """
    count = last - first
    if isinstance(blocks.full[first], bool):
        newest = sum(bool(full) for full in blocks.full[first:last])
        if newest == count:
            return total
        return brain.point if not newest else [t[newest].unflatten(0, total[0].shape[:2]) for t in known.total]
    places = torch.arange(1, count + 1, device=total[0].device)[:, None]
    newest = places * torch.stack(blocks.full[first:last])  # type: ignore[arg-type]
    if blocks.fresh:
        newest = torch.maximum(newest, (places - 1) * torch.stack(blocks.fresh[first:last]))
    newest = newest.amax(0)
    rows = torch.arange(len(newest), device=newest.device)
    found = []
    for before, after, old in zip(known.total, total, brain.point, strict=True):
        at = newest.view(-1, *[1] * (old.dim() - 1))
        begun = before.unflatten(1, old.shape[:2])[newest.clamp_max(count - 1), rows] if count > 1 else old
        found.append(torch.where(at == count, after, torch.where(at > 0, begun, old)))
    return found


def _stepwise(
    rule: Rule, slow: Slow, feature: Features | None, pages: Pages, blocks: Blocks, brain: Brain, newborn: Brain
) -> tuple[Tensor, Brain]:
    """Blocks of any rule, each with its answers, as :func:`_along`."""
    read = []
    exactly = not rule.by_block and torch.is_grad_enabled()
    for n in range(blocks.count):
        if blocks.fresh:
            brain = newborn.pick(blocks.fresh[n], brain)
        given = rule, slow, feature, pages.at(n), brain
        found, brain = checkpoint(_block, *given, use_reentrant=False) if exactly else _block(*given)
        read.append(found)
        brain = _refreshed(rule, brain, blocks.full[n])
    return torch.stack(read), brain


def _block(rule: Rule, slow: Slow, feature: Features | None, page: Pages, brain: Brain) -> tuple[Tensor, Brain]:
    """Answer the queries of a block, and learn from it."""
    memory = rule.memory
    x, z = (_seen(feature, t, slow.scale) for t in (page.k, page.q))
    batch, heads = page.v.shape[:2]
    bound = None if page.bound is None else page.bound.flatten(0, 1)
    k, v, gain = page.k.flatten(0, 1), page.v.flatten(0, 1), slow.gain.repeat(batch, 1, 1)
    point = [weights.flatten(0, 1) for weights in brain.point]
    found = taught(rule.memory, rule.bias, x.flatten(0, 1), k, v, bound, gain, point)
    pairs = [(inputs.unflatten(0, (batch, heads)), slope.unflatten(0, (batch, heads))) for inputs, slope in found]
    if rule.by_block:
        read, _ = memory.run(z, page.q, slow.gain, lambda index, t: t @ brain.point[index])
        return read, _moved(rule, page, brain, pairs)
    totals, surprise = [], []
    for index, (inputs, slope) in enumerate(pairs):
        total, last = _every(rule, page, brain, index, inputs, slope)
        totals.append(total)
        surprise += [] if last is None else [last]
    weights = [rule.retention.weights(total) for total in totals]
    read, _ = memory.run(z, page.q, slow.gain, lambda index, t: (t[..., None, :] @ weights[index])[..., 0, :])
    return read, Brain([total[:, :, -1] for total in totals], brain.point, surprise)


def _plus(base: Tensor, left: Tensor, right: Tensor, factor: float = 1) -> Tensor:
    """A product of matrices added to something, in one step."""
    return torch.baddbmm(*(t.flatten(0, 1) for t in (base, left, right)), alpha=factor).unflatten(0, base.shape[:2])


def _moved(rule: Rule, page: Pages, brain: Brain, pairs: list[tuple[Tensor, Tensor]]) -> Brain:
    """What is held after a block whose steps are linear, or, with Muon, are taken at its end."""
    total, surprise = [], []
    left, *more = page.left[..., None, None].unbind(0)
    share, pile = page.share[..., None], page.pile[..., None]
    for index, (inputs, slope) in enumerate(pairs):
        held = brain.total[index] * left
        if not rule.muon:
            if more:
                held = torch.addcmul(held, more[0], brain.surprise[index])
            held = _plus(held, inputs.mT, share * slope, -1)
        total.append(held)
        if more:
            surprise.append(_plus(more[1] * brain.surprise[index], inputs.mT, pile * slope, -1))
    due = None if brain.due is None else brain.due * page.left[0] + page.take[..., -1, :].sum(-1)
    return Brain(total, brain.point, surprise, due)


def _every(
    rule: Rule, page: Pages, brain: Brain, index: int, inputs: Tensor, slope: Tensor
) -> tuple[Float[Tensor, "batch heads slots inputs outputs"], Tensor | None]:
    """A layer's A at every slot, and its S at the last one."""

    def summed(share: Tensor) -> Tensor:
        """A weighted sum of slopes for each slot."""
        return (inputs.mT[:, :, None] * share[..., None, :]) @ slope[:, :, None]

    held = brain.total[index][:, :, None] * page.into[..., None, None]
    old = None if page.along is None else brain.surprise[index][:, :, None]
    if not rule.muon:
        held = held - summed(page.within)
        if old is None or page.carry is None or page.along is None:
            return held, None
        last = (page.along[..., -1, None, None] * old[:, :, 0]) - summed(page.heap[..., -1:, :])[:, :, 0]
        return held + page.carry[..., None, None] * old, last
    surprise = -summed(page.heap)
    if old is not None and page.along is not None:
        surprise = surprise + page.along[..., None, None] * old
    steps = newton_schulz(surprise, rule.muon)
    held = held + (page.take @ steps.flatten(-2)).unflatten(-1, steps.shape[-2:])
    return held, None if old is None else surprise[:, :, -1]


def _refreshed(rule: Rule, brain: Brain, full: bool | Tensor) -> Brain:
    """At the end of a block, slopes are taken at the weights of then."""
    if full is False:
        return brain
    total, due = brain.total, brain.due
    if due is not None:
        total = [
            a + due[..., None, None] * newton_schulz(s, rule.muon) for a, s in zip(total, brain.surprise, strict=True)
        ]
        due = torch.zeros_like(due)
    after = Brain(total, [rule.retention.weights(part) for part in total], brain.surprise, due)
    return after if full is True else after.pick(full, brain)  # type: ignore[arg-type]


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


def _seen(feature: Features | None, x: Tensor, scale: Tensor | None) -> Tensor:
    """What the first layer sees of keys or queries."""
    return x if feature is None or scale is None else feature(x, scale)


def _to(tensor: Tensor | None, kind: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(kind)

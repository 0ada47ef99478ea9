"""What a cache policy keeps, told slowly: the frame that the references of the ``context`` room share.

One sequence of :math:`T` tokens passes through one layer in chunks: the prompt (one chunk or several), then one
token after the other. The whole matrix of attention probabilities is held, in float64, with a row per query and a
column per token; a token that was dropped has probability zero from then on. A policy is a score of the tokens,
worked out anew from that matrix each time something must be dropped.

The order of events:

- *Prompt* (a chunk of more than one token, or the first): the chunk's queries attend to what is held and, causally,
  to the chunk; then all but the budget are dropped.
- *Decoding* (one token): with the budget full, what must give way is dropped first, so that no more than the budget
  is ever held; then the token enters and attends to what is held, itself included. Under a lag this is done at every
  lag-th token since the prompt only, and at most lag - 1 entries too many are held meanwhile.

Never dropped are the first ``sinks`` tokens of the text and the last ``recent`` ones, the token that enters
included. The query heads of a group share their kv head's entries and add their probabilities up. A token in a
sliding-window layer sees the last ``window`` tokens only, as the model was trained to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Compact", "Score", "Sharing", "Sight", "Trace", "follow", "turned"]


@dataclass(frozen=True)
class Sight:
    """What a score may go by when something must be dropped.

    Attributes:
        head: the kv head.
        group: its query heads.
        held: positions that it holds, in rising order.
        probability: ``(query_heads, n, n)`` of each query head, a row per query so far.
    """

    head: int
    group: slice
    held: tuple[int, ...]
    probability: Float[Tensor, "heads n n"]

    @property
    def attention(self) -> Float[Tensor, "n n"]:
        """Probabilities that the kv head's queries gave to the tokens, added up over its query heads."""
        return self.probability[self.group].sum(dim=0)


Score = Callable[[Sight], Float[Tensor, " n"]]
"""A score of each token so far; those held with the lowest go."""

Sharing = Callable[[list[dict[int, float]], int], list[int]]
"""From the ranks of what each head holds (infinite for what is kept in any case), and the number of entries per head
that all heads may keep together, to the number for each head."""


@dataclass(frozen=True)
class Trace:
    """What happened.

    Attributes:
        kept: after each chunk, for each kv head, the positions held, in rising order.
        output: ``(query_heads, T, dim)`` what attention gave.
        attention: ``(kv_heads, T, T)`` probabilities, added up over the query heads of the group.
    """

    kept: tuple[tuple[tuple[int, ...], ...], ...]
    output: Float[Tensor, "heads T dim"]
    attention: Float[Tensor, "kv T T"]


Compact = Callable[[int, Sequence[int], int], tuple[Tensor, Tensor]]
"""From a kv head, the positions that it holds and the queries so far, to its keys and values ``(T, dim)`` as held."""


def follow(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    score: Score,
    *,
    budget: int | float,
    sinks: int,
    recent: int | float,
    when: Literal["both", "prefill", "decoding"],
    lag: int = 1,
    scaling: float | None = None,
    window: int | None = None,
    frequencies: Float[Tensor, " pairs"] | None = None,
    place: Callable[[int, int, int], int] | None = None,
    layer_budget: Callable[[int, int], int] | None = None,
    share: Sharing | None = None,
    rule: Callable[[int], list[int]] | None = None,
    stand_ins: bool = False,
    compact: Compact | None = None,
) -> Trace:
    """Follow a sequence through a layer under a policy.

    Args:
        query, key, value: as attention sees them, positions already in.
        chunks: tokens that come in together; they add up to T.
        score: ranks the tokens of a kv head.
        budget: entries per kv head, or a share of the tokens seen, rounded up.
        sinks: first tokens that stay.
        recent: last tokens that stay, or a share of the budget, rounded down; what the sinks leave at most.
        when: whether something is dropped after a prompt, while decoding, or both.
        lag: decoding steps from one drop to the next.
        scaling: factor of the logits (default: dim to the power -1/2).
        window: of a sliding-window layer.
        frequencies: angles per position of a model with rotary positions.
        place: where attention takes the token at a position to stand, given the position, the tokens seen before the
            chunk and the entries held then; its key is turned to that place. Default: at its position.
        layer_budget: from the budget and the tokens seen to the budget of this layer. Default: the same.
        share: gives the heads unequal parts of the layer's budget. It is asked when a prompt is cut; while decoding
            each head keeps to its part, which grows and shrinks by as much as the budget; and it is asked again if
            a head then holds too much. Default: equal parts.
        rule: in place of a budget: from the tokens seen to the entries that each head may hold.
        stand_ins: whether the mean of what a head has dropped stands for it: one entry more, with the logarithm of
            the number of those tokens added to its logit. Not in a sliding-window layer, which would not see them.
        compact: how keys and values are held from now on; asked when a decoded token has entered, before it attends,
            and when a prompt has been cut. Default: as they came.
    """
    query, key, value = query.double(), key.double(), value.double()
    heads, length, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    scaling = dim**-0.5 if scaling is None else scaling
    assert sum(chunks) == length

    held: list[set[int]] = [set() for _ in range(kv_heads)]
    dropped: list[set[int]] = [set() for _ in range(kv_heads)]
    probability = torch.zeros(heads, length, length, dtype=torch.float64)
    output = torch.zeros_like(query)
    kept = []

    def sharing(head: int) -> slice:
        return slice(head * group, (head + 1) * group)

    def ranks(head: int, allowed: int, seen: int, asked: int) -> dict[int, float]:
        """How what a head holds ranks, of ``seen`` tokens and by ``asked`` queries so far."""
        last = recent if isinstance(recent, int) else math.floor(recent * allowed)
        last = max(0, min(last, allowed - sinks))
        now = score(Sight(head, sharing(head), tuple(sorted(held[head])), probability[:, :asked, :asked]))
        return {p: float(now[p]) if sinks <= p < seen - last else math.inf for p in sorted(held[head])}

    parts: list[int] | None = None  # what each head may hold, when the heads parted
    parts_of = 0  # the budget then

    def drop(allowed: int, seen: int, asked: int, room: int) -> None:
        """Drop the lowest-ranked entries, so many that ``room`` more fit the budget."""
        nonlocal parts, parts_of
        limits = [allowed] * kv_heads if parts is None else [part + allowed - parts_of for part in parts]
        limits = limits if rule is None else rule(seen)
        full = any(len(held[head]) > limit for head, limit in enumerate(limits))
        if share is not None and (full or (parts is not None and room == 0)):
            ranked = [ranks(head, allowed, seen, asked) for head in range(kv_heads)]
            parts, parts_of = share(ranked, allowed - room), allowed - room
            places = parts
        else:
            places = [limit - room for limit in limits]
        for head in range(kv_heads):
            if len(held[head]) > places[head]:
                rank = ranks(head, allowed, seen, asked)
                lowest = sorted(rank, key=lambda p: (rank[p], p))  # of equals the older goes first
                held[head] -= set(lowest[: len(lowest) - places[head]])
                dropped[head] |= set(lowest[: len(lowest) - places[head]])

    stored = [(key[head], value[head]) for head in range(kv_heads)]

    def store(head: int, asked: int) -> None:
        """Let what a head holds take the form in which it is kept, after ``asked`` queries."""
        if compact is not None:
            stored[head] = compact(head, sorted(held[head]), asked)

    def attend(head: int, n: int, stands: Callable[[int], int]) -> None:
        """Let the query of token ``n`` attend to what the head holds."""
        visible = sorted(p for p in held[head] if window is None or n - stands(p) < window)
        keys, values = (part[visible] for part in stored[head])
        if place is not None and frequencies is not None:
            keys = turned(keys, [stands(p) - p for p in visible], frequencies)
        number_of = torch.ones(len(visible), dtype=torch.float64)
        if stand_ins and dropped[head] and window is None:
            gone = sorted(dropped[head])
            keys = torch.cat([keys, key[head, gone].mean(dim=0, keepdim=True)])
            values = torch.cat([values, value[head, gone].mean(dim=0, keepdim=True)])
            number_of = torch.cat([number_of, torch.tensor([float(len(gone))])])
        share = (scaling * query[sharing(head), n] @ keys.T + number_of.log()).softmax(dim=-1)
        output[sharing(head), n] = share @ values
        probability[sharing(head), n, visible] = share[:, : len(visible)]

    start = turn = 0
    for count in chunks:
        end = start + count
        allowed = budget if isinstance(budget, int) else max(1, math.ceil(budget * end))
        allowed = allowed if layer_budget is None else layer_budget(allowed, end)
        decoding = count == 1 and start > 0
        turn = turn + 1 if decoding else 0
        if decoding and when in ("both", "decoding") and turn % lag == 0:
            drop(allowed, seen=end, asked=start, room=1)
        for head in range(kv_heads):
            before = len(held[head])

            def stands(p: int, seen: int = start, before: int = before) -> int:
                return place(p, seen, before) if place is not None else p

            for n in range(start, end):
                held[head].add(n)
                if decoding:
                    store(head, asked=n)
                attend(head, n, stands)
        if not decoding:
            if when in ("both", "prefill"):
                drop(allowed, seen=end, asked=end, room=0)
            for head in range(kv_heads):
                store(head, asked=end)
        kept.append(tuple(tuple(sorted(positions)) for positions in held))
        start = end
    attention = probability.unflatten(0, (kv_heads, group)).sum(dim=1)
    return Trace(tuple(kept), output, attention)


def turned(
    states: Float[Tensor, "n dim"], by: Sequence[int], frequencies: Float[Tensor, " pairs"]
) -> Float[Tensor, "n dim"]:
    """Each state turned on by a number of positions: dimension i against dimension i + pairs."""
    pairs = len(frequencies)
    angle = torch.tensor(by, dtype=torch.float64)[:, None] * frequencies.double()
    plane = torch.complex(states[:, :pairs], states[:, pairs : 2 * pairs]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([plane.real, plane.imag, states[:, 2 * pairs :]], dim=1)

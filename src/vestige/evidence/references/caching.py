"""What a cache policy keeps, told slowly: the frame that the references of the ``context`` room share.

One sequence of :math:`T` tokens passes through one layer in chunks: the prompt (one chunk or several), then one
token after the other. The whole matrix of attention probabilities is held, in float64, with a row per query and a
column per token; a token that was dropped has probability zero from then on. A policy is a score of the tokens,
worked out anew from that matrix each time something must be dropped.

The order of events:

- *Prompt* (a chunk of more than one token, or the first): the chunk's queries attend to what is held and, causally,
  to the chunk; then all but the budget are dropped.
- *Decoding* (one token): with the budget full, what must give way is dropped first, so that no more than the budget
  is ever held; then the token enters and attends to what is held, itself included.

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

__all__ = ["Score", "Trace", "follow"]

Score = Callable[[Float[Tensor, "n n"]], Float[Tensor, " n"]]
"""From the probabilities that a kv head's queries gave to the tokens so far, to a score of each token."""


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
    scaling: float | None = None,
    window: int | None = None,
) -> Trace:
    """Follow a sequence through a layer under a policy.

    Args:
        query, key, value: as attention sees them, positions already in.
        chunks: tokens that come in together; they add up to T.
        score: ranks the tokens of a kv head; the lowest go.
        budget: entries per kv head, or a share of the tokens seen, rounded up.
        sinks: first tokens that stay.
        recent: last tokens that stay, or a share of the budget, rounded down; what the sinks leave at most.
        when: whether something is dropped after a prompt, while decoding, or both.
        scaling: factor of the logits (default: dim to the power -1/2).
        window: of a sliding-window layer.
    """
    query, key, value = query.double(), key.double(), value.double()
    heads, length, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    scaling = dim**-0.5 if scaling is None else scaling
    assert sum(chunks) == length

    held: list[set[int]] = [set() for _ in range(kv_heads)]
    attention = torch.zeros(kv_heads, length, length, dtype=torch.float64)
    output = torch.zeros_like(query)
    kept = []

    def drop(head: int, places: int, allowed: int, seen: int, asked: int) -> None:
        """Drop the lowest-scored entries until ``places`` are left, of ``seen`` tokens and ``asked`` queries so far."""
        last = recent if isinstance(recent, int) else math.floor(recent * allowed)
        last = max(0, min(last, allowed - sinks))
        ranks = score(attention[head, :asked, :asked])
        free = [p for p in held[head] if sinks <= p < seen - last]
        for p in sorted(free, key=lambda p: (float(ranks[p]), p)):  # of equals the older goes first
            if len(held[head]) > places:
                held[head].remove(p)

    start = 0
    for count in chunks:
        end = start + count
        allowed = budget if isinstance(budget, int) else max(1, math.ceil(budget * end))
        decoding = count == 1 and start > 0
        for head in range(kv_heads):
            if decoding and when in ("both", "decoding"):
                drop(head, allowed - 1, allowed, seen=end, asked=start)
            for n in range(start, end):
                held[head].add(n)
                visible = sorted(p for p in held[head] if window is None or n - p < window)
                for h in range(head * group, (head + 1) * group):
                    probability = (scaling * key[head, visible] @ query[h, n]).softmax(dim=0)
                    output[h, n] = probability @ value[head, visible]
                    attention[head, n, visible] += probability
            if not decoding and when in ("both", "prefill"):
                drop(head, allowed, allowed, seen=end, asked=end)
        kept.append(tuple(tuple(sorted(positions)) for positions in held))
        start = end
    return Trace(tuple(kept), output, attention)

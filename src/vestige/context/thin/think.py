r"""ThinK: keys without the channels that the queries hardly use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vestige.context.attention import Look
from vestige.context.layer import EMPTY, KeptLayer, Step
from vestige.context.policy import CachePolicy
from vestige.context.thin.compact import CompactLayer, Form, Thin
from vestige.core.method import Paper, Verdict, param
from vestige.layers.ops.attention_mass import grouped

__all__ = ["ThinK"]

QUERIES = "recent queries"  # squares of the last queries, until the channels are chosen


class ThinK(Thin):
    r"""Hold only those channels of old keys that matter to the queries.

    A query's product with a key is a sum over channels, so :math:`Q K^T = \sum_i Q_{:,i} K_{:,i}^T`, and dropping the
    channels outside a set *S* costs :math:`\|Q K^T - Q_S K_S^T\|_F`. The channels of the largest

    .. math:: \|Q_{:,i}\|_2 \cdot \|K_{:,i}\|_2

    are kept, with *Q* the last queries of the prompt and *K* the keys that the policy keeps. They are chosen once per
    row and key-value head, when the first key grows old, and hold for all later ones. Keys in the window are at full
    width, values always; the scale of the logits stays that of the full width. A query meets old keys in their
    channels alone.

    The paper chooses per query head; to save memory where heads share keys, a group's queries are taken together.
    """

    name = "think"
    paper = Paper(
        title="ThinK: Thinner Key Cache by Query-Driven Pruning",
        year=2024,
        arxiv="2407.21018",
        venue="ICLR 2025",
        code="https://github.com/SalesforceAIResearch/ThinK",
        equations="section 3: the greedy solution of the query-driven pruning objective",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2, 40% of the channels of old keys dropped: 0.02 nats from the model's own predictions, 0.06 if the "
        "keys alone choose the channels, 1.1 with channels at random. Half of the channels dropped on top of half of "
        "512 entries kept by SnapKV's votes: perplexity 12.9 for 12.7, but none of 15 needles, of which SnapKV alone "
        "finds 5. With every entry held, 6 of 10 in filler whose sentences all differ and 1 of 10 among five "
        "sentences over and over: the answer is there, and its thinned keys no longer stand out from their like",
    )

    ratio: float = param(0.4, "share of the channels that is dropped, rounded down", ge=0, lt=1)
    queries: int = param(32, "last queries by which channels are chosen", ge=1)

    def lossless(self, tokens: int) -> CachePolicy | None:
        policy = self.policy.lossless(tokens)
        return None if policy is None else self.replace(policy=policy, ratio=0.0)

    def channels(self, dim: int) -> int:
        """How many of a head's channels are kept."""
        return dim - int(self.ratio * dim)

    def observe(self, entries: KeptLayer, look: Look, step: Step) -> None:
        self._note(entries, look, step)
        super().observe(entries, look, step)

    def respond(self, entries: KeptLayer, look: Look, step: Step, plain: Callable[[], Tensor]) -> Tensor:
        if step.decoding:
            self._note(entries, look, step)
        return super().respond(entries, look, step, plain)

    def _note(self, entries: KeptLayer, look: Look, step: Step) -> None:
        """Remember the last queries while there are rows whose channels have not been chosen."""
        ready = entries.aside.get("ready")
        if ready is not None and ready.shape[1] == 0:
            return
        query = grouped(look.query, entries.sizes[1])[:, :, :, -self.queries :]
        squares = query.to(torch.promote_types(query.dtype, torch.float32)).square().mean(dim=2)
        if step.positions is not None:
            squares = squares * (step.positions[:, None, -squares.shape[2] :, None] != EMPTY)
        before = entries.aside.get(QUERIES)
        if before is not None:
            squares = torch.cat([before, squares], dim=2)[:, :, -self.queries :]
        entries.aside[QUERIES] = squares

    def prepare(self, layer: CompactLayer, keys: Tensor, valid: Tensor | None, rows: Bool[Tensor, " batch"]) -> None:
        squares = keys.to(layer.aside[QUERIES].dtype).square()
        if valid is not None:
            squares = squares * valid[..., None]
        energy = layer.aside[QUERIES].sum(dim=2) * squares.sum(dim=2)
        chosen = energy.topk(self.channels(keys.shape[3]), dim=2).indices.sort(dim=2).values
        before = layer.aside.get("channels")
        layer.aside["channels"] = chosen if before is None else torch.where(rows[:, None, None], chosen, before)

    def prepared(self, layer: CompactLayer) -> None:
        layer.aside.pop(QUERIES)

    def encode(self, layer: CompactLayer, keys: Tensor, values: Tensor) -> Form:
        return {"keys": keys.gather(3, self._index(layer, keys.shape[2])).to(layer.dtype), "values": values}

    def decode(self, layer: CompactLayer, form: Form) -> tuple[Tensor, Tensor]:
        thin = form["keys"]
        wide = thin.new_zeros(*thin.shape[:3], layer.window_keys.shape[3])
        return wide.scatter_(3, self._index(layer, thin.shape[2]), thin), form["values"]

    def read(self, layer: CompactLayer, look: Look, form: Form) -> tuple[tuple[Tensor, Tensor], Tensor]:
        rows = grouped(look.query, layer.sizes[1])
        channels = layer.aside["channels"][:, :, None, None].expand(*rows.shape[:4], -1)
        return (rows.gather(4, channels).flatten(1, 2), form["keys"]), form["values"]

    def _index(self, layer: CompactLayer, count: int) -> Int[Tensor, "batch kv entries channels"]:
        return layer.aside["channels"][:, :, None].expand(-1, -1, count, -1)

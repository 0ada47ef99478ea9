"""Recycled attention (RefreshKV): between full steps, read what the last full step attended to most."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool1d, pad

from vestige.context.attention import Look, Reading, everything
from vestige.context.layer import EMPTY, KeptLayer, Step, per_row
from vestige.context.select.base import Picked, Select, last_row, strongest
from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError

__all__ = ["RecycledAttention"]

SMALL = ("small keys", "small values", "small positions", "small rank")


class RecycledAttention(Select):
    """Attend to everything once in a while, and to what that found important in between.

    A full step at token *t* leaves, for each key-value head, its attention weights

        s_j = max over query heads h of the group of A_h[t, j]

    (smoothed by a maximum over neighbours, if asked for), and the entries with the *budget* highest are copied into
    a small cache. The steps that follow read the small cache alone. A new token enters both caches; in the small
    one it takes the place of the entry with the lowest *s*. Every ``stride`` steps a full step comes again; with a
    ``similarity`` it comes, layer by layer and row by row, only where the mean query has turned away from that of
    the last full step:

        cos(mean_h q_h(t), mean_h q_h(last full)) <= similarity.

    All entries are kept and the small cache comes on top: it saves reading, no memory.
    """

    name = "recycled-attention"
    paper = Paper(
        title="Recycled Attention: Efficient inference for long-context language models",
        year=2024,
        arxiv="2411.05787",
        venue="ACL 2025 (as RefreshKV)",
        code="https://github.com/carriex/recycled-attention",
        equations="section 3: full and partial steps, fixed stride, dynamic stride by query similarity",
    )
    verdict = Verdict(
        "not reproduced",
        "SmolLM2, 40 of 256 entries read between full steps every 10 tokens: 0.52 nats a token from the model's own "
        "predictions, sinks and a window of 40 0.54 and nearer in one of three passages; full steps every 4 tokens "
        "0.44, every 16 0.54, never again 0.47. At half of 512 entries a needle that is asked for token by token is "
        "found in 4 of 15 texts, with the whole cache in all: the steps between two full ones read what mattered "
        "before the question. In filler whose sentences all differ 44% of the answer's tokens are read as they are to"
        " be said (none of 10 found), among five sentences over and over 71%, and 89% in the heads that look for it "
        "(9 of 10)",
    )

    stride: int = param(10, "steps from one full step, or from one comparison of queries, to the next", ge=1)
    similarity: float | None = param(
        None, "cosine above which a full step is put off until the next comparison; none: never put off", ge=-1, le=1
    )
    pool: int = param(1, "neighbours, itself included, over which an entry's weight is the maximum (odd)", ge=1)

    def check(self) -> None:
        super().check()
        if self.pool % 2 == 0:
            raise SpecError(f"{self.name}: parameter 'pool' is {self.pool}; allowed: odd numbers")

    def observe(self, entries: KeptLayer, look: Look, step: Step) -> None:
        """A chunk of the prompt is a full step; its last token says what is read next."""
        query, share = last_row(entries, look, step)
        fresh = None if min(step.fresh) else torch.tensor(step.fresh, device=query.device) > 0
        self._refresh(entries, query, share, step, fresh)

    def read(self, entries: KeptLayer, look: Look, step: Step) -> Reading:
        due = step.turn % self.stride == 0
        if due and self.similarity is None:
            return self._full(entries, look, step)
        small = self._enter(entries, step)
        if due:
            turned = self._turned(entries, look)
            if bool(turned.all()):
                return self._full(entries, look, step)
            if bool(turned.any()):
                return self._full_where(turned, small, entries, look, step)
        return self._small(small, look, step)

    def _full(self, entries: KeptLayer, look: Look, step: Step, rows: Tensor | None = None) -> Reading:
        """Read everything, and choose anew."""
        reading = everything(entries, look, step)
        self._refresh(entries, look.query, reading.weights(look).squeeze(3), step, rows)
        return reading

    def _refresh(self, entries: KeptLayer, query: Tensor, share: Tensor, step: Step, rows: Tensor | None) -> None:
        """Fill the small cache by one token's attention weights, in the given rows of the batch or in all."""
        weight, valid = share.amax(dim=2), entries.valid()
        if self.pool > 1:
            weight = max_pool1d(weight, self.pool, stride=1, padding=self.pool // 2)
        counts = self.budgets(step)
        picked = strongest(weight, counts, valid, ties=self.pool > 1)
        fresh = {
            "small keys": picked.of(entries.keys),
            "small values": picked.of(entries.values),
            "small positions": picked.of(entries._positions(entries.slots)).masked_fill(~picked.exist, EMPTY),
            "small rank": self._ranks(picked, weight, counts),
            "full query": query.mean(dim=(1, 2)),
        }
        if rows is not None and "full query" in entries.aside:
            fresh = _where(rows, fresh, entries.aside)
        entries.aside.update(fresh)

    def _ranks(self, picked: Picked, weight: Tensor, counts: list[int]) -> Tensor:
        """What leaves the small cache first: room for later tokens, then the lowest weight, never what is no room."""
        rank = picked.of(weight).masked_fill(~picked.exist, float("-inf"))
        beyond = torch.arange(rank.shape[2], device=rank.device) >= per_row(counts, rank.device)
        return rank.masked_fill(beyond, float("inf"))

    def _enter(self, entries: KeptLayer, step: Step) -> dict[str, Tensor]:
        """Write the newest token into the small cache as well."""
        small = entries.aside
        new = {
            "small keys": entries.keys[:, :, -1:],
            "small values": entries.values[:, :, -1:],
            "small positions": entries._positions(entries.slots)[:, :, -1:],
            # Above every weight, and the older the lower: what came since goes last, in its order.
            "small rank": torch.full_like(small["small rank"][:, :, :1], 1.0 + step.turn),
        }
        if isinstance(self.budget, int) and small["small rank"].shape[2] < self.budget:
            small.update({name: torch.cat([small[name], new[name]], dim=2) for name in SMALL})
        else:
            lowest = small["small rank"].argmin(dim=2, keepdim=True)
            for name in SMALL:
                where = lowest if new[name].dim() == 3 else lowest[..., None].expand_as(new[name])
                small[name].scatter_(2, where, new[name])
        return small

    def _turned(self, entries: KeptLayer, look: Look) -> Tensor:
        """``(batch,)`` whether the query has turned away from that of the last full step."""
        return cosine_similarity(look.query.mean(dim=(1, 2)), entries.aside["full query"], dim=-1) <= self.similarity

    def _small(self, small: dict[str, Tensor], look: Look, step: Step) -> Reading:
        valid = small["small positions"] != EMPTY
        if look.window is not None:
            valid &= small["small positions"] > step.rows(valid.device) - 1 - look.window
        return Reading(((look.query, small["small keys"]),), small["small values"], valid)

    def _full_where(
        self, rows: Tensor, small: dict[str, Tensor], entries: KeptLayer, look: Look, step: Step
    ) -> Reading:
        """Read everything in some rows of a batch, and the small cache in the others."""
        before = self._small(dict(small), look, step)
        full = self._full(entries, look, step, rows)
        every = full.valid if full.valid is not None else torch.ones_like(entries.keys[..., 0], dtype=torch.bool)
        assert before.valid is not None
        return Reading(
            (*full.parts, *before.parts),
            torch.cat([full.values, before.values], dim=2),
            torch.cat([every & rows[:, None, None], before.valid & ~rows[:, None, None]], dim=2),
        )


def _where(rows: Tensor, fresh: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the given rows from one small cache and the others from another, the narrower one filled up."""
    width = max(fresh["small rank"].shape[2], before["small rank"].shape[2])
    filling = {"small positions": EMPTY, "small rank": float("-inf")}
    chosen = {}
    for name, one in fresh.items():
        other = before[name]
        if name in SMALL:
            gap = (0, 0) if one.dim() == 4 else ()
            one, other = (
                pad(part, (*gap, 0, width - part.shape[2]), value=filling.get(name, 0)) for part in (one, other)
            )
        chosen[name] = torch.where(rows.view(-1, *[1] * (one.dim() - 1)), one, other)
    return chosen

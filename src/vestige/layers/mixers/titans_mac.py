"""Titans, memory as context: what the long-term memory knows stands among the tokens that attention sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.method import Paper, Verdict, param
from vestige.layers.layout import Layout
from vestige.layers.mixers.learning import LearningLayer
from vestige.layers.mixers.persistent import PersistentAttention, TitansBeside
from vestige.layers.mixers.recurrent import Memory
from vestige.layers.ops.learning.blocks import Blocks
from vestige.layers.ops.learning.engine import Slow, learn, recall
from vestige.layers.ops.recurrence import exact
from vestige.layers.parts import join_heads, split_heads, unit
from vestige.layers.place import Place
from vestige.layers.state import LayerState

__all__ = ["TitansMAC", "TitansMACLayer"]


@dataclass(frozen=True)
class _Segment:
    """What a segment brings along.

    Attributes:
        asked: ``(batch, slots, heads, dim)`` what the memory is asked.
        q, k, v: attention's queries, keys and values, ``(batch, heads, slots, ...)``.
        layout: the places of its slots in it.
        mask: ``(batch or 1, slots, 2 refresh)`` what a slot sees of what was recalled, and of the tokens.
        slow: the memory's weights of training.
        always: keys and values of the persistent tokens.
        fresh: whether another text begins here, or in which rows.
        begun: ``(batch, refresh)`` the slots that are new in a segment that was begun earlier.
    """

    asked: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    mask: Bool[Tensor, "rows slots held"]
    slow: Slow
    always: tuple[Tensor, Tensor] | None
    fresh: bool | Bool[Tensor, " batch"]
    begun: Bool[Tensor, "batch refresh"] | None


class TitansMACLayer(LearningLayer):
    """The layer of :class:`TitansMAC`.

    Besides the memory it holds ``keys`` and ``values``, ``(batch, heads, 2 refresh, dim)``, of the segment begun: of
    what was recalled for its tokens, and of the tokens.
    """

    mixer: TitansMAC

    def build_exit(self, place: Place) -> None:
        size = place.hidden_size
        self.r_proj = nn.Linear(size, size, bias=False)
        self.attention = PersistentAttention(size, self.heads, self.mixer.persistent, self.mixer.theta)
        self.y_proj = nn.Linear(size, size, bias=False)
        self.seen_norm = nn.RMSNorm(size, eps=place.eps)
        self.read_norm = nn.RMSNorm(size, eps=place.eps)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        x = layout.blank(x)
        memory: Memory = {} if state is None else dict(state.tensors)
        batch, length, _ = x.shape
        slots = Blocks.of(
            self.rule.refresh,
            batch,
            length,
            device=x.device,
            filled=memory.get("filled"),
            valid=layout.valid,
            starts=layout.starts,
        )
        held, seen, read = [], [], []
        for n, segment in enumerate(self._segments(slots.lay(x), slots, memory)):
            if segment.fresh is True:
                memory = {}
            entries, y, found = self._read(segment, slots.one(n), memory)
            held.append(entries)
            seen.append(y)
            read.append(found)
        if state is not None:
            state.write({**memory, **_newest(held, slots)}, length)
        y, found = torch.cat(seen, 1), join_heads(torch.cat(read, 1))
        return slots.back(self.o_proj(self.seen_norm(y) * F.silu(self.read_norm(found))), length)

    def _segments(self, x: Float[Tensor, "batch slots hidden"], slots: Blocks, memory: Memory) -> Iterator[_Segment]:
        """What does not depend on the memory's weights is worked out for all segments at once: a segment has to wait
        for the one before it, so it should have few steps of its own."""
        count, width, size = slots.count, slots.width, self.rule.refresh
        place, inside = torch.arange(width, device=x.device)[None], torch.arange(size, device=x.device)
        if width < size and "filled" in memory:  # a single token, which stands where the segment begun ends
            place = memory["filled"][:, None]
        here, everywhere = Layout(place), Layout(place.repeat(1, count))
        asked = unit(split_heads(self.r_proj(x), self.heads)).split(width, 1)
        turned, plain = self.attention.queries(x, everywhere)
        slow, always = self.slow().to(exact(x)), self.attention.always()
        q = (turned if always is None else torch.cat([turned, plain], -1)).split(width, 2)
        k, v = (t.split(width, 2) for t in self.attention.entries(x, everywhere))
        mask = (inside <= place[..., None]).repeat(1, 1, 2)
        fresh = _fresh(slots)
        for n in range(count):
            begun = None
            if n == 0 and (width < size or "keys" in memory):
                begun = inside == place if width < size else slots.real[:, :size]
            yield _Segment(asked[n], q[n], k[n], v[n], here, mask, slow, always, fresh[n], begun)

    def _read(
        self, segment: _Segment, block: Blocks, memory: Memory
    ) -> tuple[dict[str, Tensor], Float[Tensor, "batch slots hidden"], Float[Tensor, "batch slots heads dim"]]:
        """Read one segment: its keys and values, what attention gave, and what the memory then answered."""
        found = recall(self.rule, segment.slow, segment.asked, memory)
        if isinstance(segment.fresh, Tensor):
            newborn = recall(self.rule, segment.slow, segment.asked, {})
            found = torch.where(segment.fresh[:, None, None, None], newborn, found)
            block = replace(block, fresh=[segment.fresh])
        recalled = join_heads(found)
        entries = {}
        pairs = zip(self.attention.entries(recalled, segment.layout), (segment.k, segment.v), strict=True)
        for name, pair in zip(("keys", "values"), pairs, strict=True):
            entries[name] = torch.cat(pair, 2)
            if segment.begun is not None:  # the rest of the segment stands in the state
                new, old = torch.stack(pair, 2), memory.get(name, pair[0].new_zeros(()))
                old = old.unflatten(2, (2, -1)) if old.dim() else old
                mine = segment.begun & block.real
                entries[name] = torch.where(mine[:, None, None, :, None], new, old).flatten(2, 3)
        y = self.attention.masked(segment.q, entries["keys"], entries["values"], segment.mask, segment.always)
        y = self.y_proj(y)
        parts = F.silu(torch.stack([split_heads(f(y), self.heads) for f in (self.q_proj, self.k_proj, self.v_proj)]))
        q, k = unit(parts[:2])
        valid = None if block.full[0] is True else block.real
        lesson = self.lesson(q, k, parts[2], y, valid)
        return entries, y, learn(self.rule, segment.slow, lesson, memory, blocks=block)


def _fresh(slots: Blocks) -> list[bool | Tensor]:
    """For each segment whether packed sequences begin in it: in all rows, in none, or in which."""
    if not slots.fresh:
        return [False] * slots.count
    begins = torch.stack(slots.fresh)
    told = torch.stack([begins.all(1), begins.any(1)], 1).tolist()
    return [every if every or not some else rows for rows, (every, some) in zip(begins, told, strict=True)]


def _newest(held: list[dict[str, Tensor]], slots: Blocks) -> dict[str, Tensor]:
    """Keys and values of the segment that each row's last token is in; nothing if it ended."""
    last = {name: [entries[name] for entries in held] for name in ("keys", "values")}
    if slots.source is None:
        found = {name: each[-1] for name, each in last.items()}
    else:
        real = slots.real.unflatten(1, (slots.count, slots.width)).any(2)
        newest = (real * torch.arange(slots.count, device=real.device)).amax(1)
        rows = torch.arange(len(real), device=real.device)
        found = {name: torch.stack(each)[newest, rows] for name, each in last.items()}
    begun = (slots.filled > 0)[:, None, None, None]
    return {"filled": slots.filled} | {name: t * begun for name, t in found.items()}


class TitansMAC(TitansBeside):
    """Text is read in segments: for each token the long-term memory is asked first, and attention sees what it said
    beside the segment; the memory then learns what attention gave.

    A token sees what was recalled for itself and for earlier ones only, so that nothing looks ahead. Segments are of
    ``refresh`` tokens.
    """

    name = "titans-mac"
    paper = Paper(
        title="Titans: Learning to Memorize at Test Time",
        year=2025,
        arxiv="2501.00663",
        equations="section 4.1, equations 21 to 25; the memory's are 8 to 15",
    )
    verdict = Verdict(
        "not checkable here",
        "Its quality shows in language models of billions of tokens. Seen: what stands four segments back"
        " changes its output by 0.07 to 0.45 of its size; that of a sliding window not at all (3 seeds).",
    )
    layer = TitansMACLayer

    refresh: int = param(32, "tokens per segment; slopes are taken at the memory's weights at its beginning", ge=1)

"""Titans, memory as context: what the long-term memory knows stands among the tokens that attention sees."""

from __future__ import annotations

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
from vestige.layers.ops.learning.engine import learn, recall
from vestige.layers.parts import join_heads, split_heads, unit
from vestige.layers.place import Place
from vestige.layers.state import LayerState

__all__ = ["TitansMAC", "TitansMACLayer"]


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
        segments = Blocks.of(
            self.rule.refresh,
            batch,
            length,
            device=x.device,
            filled=memory.get("filled"),
            valid=layout.valid,
            starts=layout.starts,
        )
        slots, outputs = segments.lay(x).unflatten(1, (segments.count, segments.width)), []
        real = segments.real.unflatten(1, (segments.count, segments.width))
        for n in range(segments.count):
            if segments.fresh and bool(segments.fresh[n].all()):  # packed sequences stand in a row of their own
                memory = {}
            outputs.append(self.segment(slots[:, n], real[:, n], memory))
        if state is not None:
            state.write(memory, length)
        return segments.back(torch.cat(outputs, 1), length)

    def segment(
        self, x: Float[Tensor, "batch slots hidden"], real: Bool[Tensor, "batch slots"], memory: Memory
    ) -> Float[Tensor, "batch slots hidden"]:
        """Tokens that do not go beyond the end of a segment."""
        place = (
            real.cumsum(1) - 1 + memory.get("filled", real.new_zeros(len(x), dtype=torch.long))[:, None]
        ).clamp_min(0)
        layout = Layout(place)
        slow = self.slow()
        recalled = recall(self.rule, slow, unit(split_heads(self.r_proj(x), self.heads)), memory)
        k, v = self._entries(join_heads(recalled), x, layout, real, memory)
        seen = torch.arange(self.rule.refresh, device=x.device) <= place[..., None]
        y = self.attention.masked(self.attention.queries(x, layout), k, v, torch.cat([seen, seen], -1))
        y = self.y_proj(y)
        q, key, value = (F.silu(split_heads(f(y), self.heads)) for f in (self.q_proj, self.k_proj, self.v_proj))
        lesson = self.lesson(unit(q), unit(key), value, y, real)
        read = learn(self.rule, slow, lesson, memory, valid=real, within=True)
        open_still = (memory["filled"] > 0)[:, None, None, None]
        memory["keys"], memory["values"] = k * open_still, v * open_still
        return self.o_proj(self.seen_norm(y) * F.silu(self.read_norm(join_heads(read))))

    def _entries(
        self, recalled: Tensor, x: Tensor, layout: Layout, real: Tensor, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole segment by slot, those of earlier passes among them: recalled, and tokens."""
        size, width = self.rule.refresh, x.shape[1]
        source = torch.arange(width, width + size + 1, device=x.device).repeat(len(x), 1)
        new = torch.arange(width, device=x.device).expand(len(x), -1)
        source = source.scatter(1, torch.where(real, layout.positions, size), new)[:, None, :size, None]
        found = []
        parts = zip(self.attention.entries(recalled, layout), self.attention.entries(x, layout), strict=True)
        for name, pair in zip(("keys", "values"), parts, strict=True):
            old = memory.get(name, pair[0].new_zeros(*pair[0].shape[:2], 2 * size, pair[0].shape[-1])).chunk(2, 2)
            rows = [torch.cat([t, o], 2) for t, o in zip(pair, old, strict=True)]
            at = source.expand(-1, self.heads, -1, rows[0].shape[-1])
            found.append(torch.cat([t.gather(2, at) for t in rows], 2))
        return found[0], found[1]


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

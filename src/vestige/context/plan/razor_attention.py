"""RazorAttention: heads that copy keep everything; in the others one entry stands for all that was dropped."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from vestige.context.layer import KeptLayer
from vestige.context.plan.windows import HeadWindows, Table, highest
from vestige.context.ragged_attention import StandIn
from vestige.core.anatomy import Anatomy
from vestige.core.method import Paper, Verdict, param
from vestige.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RazorAttention"]


class RazorAttention(HeadWindows):
    r"""Keep everything in the heads that copy; elsewhere sinks, a window, and one entry for the rest.

    In a text of random tokens that comes several times over, two kinds of heads look far back: *echo* heads at the
    same token one period earlier, *induction* heads at the one after it. The heads that do so most keep everything.

    The others keep the first ``sinks`` tokens and the last max(``recent``, *N* / ``compression``) of *N*. What they
    drop, *D*, leaves its mean key and value, which attention counts as often as there were tokens:

    .. math:: o = \frac{|D| e^{q \cdot \bar k} \bar v + \sum_{kept} e^{q \cdot k_n} v_n}
                       {|D| e^{q \cdot \bar k} + \sum_{kept} e^{q \cdot k_n}}.

    By convexity that is never more weight than the dropped tokens had together. The mean is kept up while decoding.
    Layers with a sliding window, which would not see the dropped tokens anyway, do without it.

    Heads are found when the method is first attached to a model (one pass over a thousand tokens), or by :meth:`fit`.
    """

    name = "razor-attention"
    paper = Paper(
        title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        year=2024,
        arxiv="2407.15891",
        venue="ICLR 2025",
        equations="section 3.2 (echo and induction heads, compensation token; models with rotary positions)",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2, 15% of the heads keep everything, the others 64 of 256 tokens: copying a stretch from far "
        "back costs 1.55 nats a token, with as many other heads in their place 3.75, with the whole cache "
        "0.92. The compensation token made no difference to reading on (0.072 nats from the model's own "
        "predictions with and without). Of needles in 512 tokens 93% are found at half the bytes, a third at "
        "a quarter, a quarter at a tenth: the heads that copy random tokens are those that find them. At half, "
        "51% of a needle's tokens are held, and all of them in the heads that look for it",
    )

    induction: Table = param((), "how much each layer's key-value heads look at the token after a repeated one")
    echo: Table = param((), "how much they look at the repeated token itself; both empty: those known, or found now")
    induction_share: float = param(0.14, "share of the heads that keep everything by induction", ge=0, le=1)
    echo_share: float = param(0.01, "share of the heads that keep everything by echo", ge=0, le=1)
    sinks: int = param(4, "first tokens that every head keeps", ge=0)
    recent: int = param(4000, "last tokens that every head keeps", ge=1)
    compression: float = param(5.0, "every head keeps at least this fraction of the tokens: one in so many", ge=1)
    compensate: bool = param(True, "let one entry per head stand for what it dropped")

    tables: ClassVar[tuple[str, ...]] = ("induction", "echo")
    how: ClassVar[str] = "find them with RazorAttention.fit(model)"

    @classmethod
    def fit(
        cls, model: nn.Module, tokenizer: Any = None, *, parameters: dict[str, Any] | None = None, **how: Any
    ) -> Self:
        """Find the heads of a model that copy; see :func:`vestige.context.plan.repeats.find_heads` for the arguments.

        Args:
            parameters: hyper-parameters of the method.
        """
        from vestige.context.plan.repeats import find_heads

        return find_heads(cls(**(parameters or {})), model, tokenizer, **how)

    def on(self, anatomy: Anatomy) -> Self:
        if self.fitted or self.known(anatomy) is not None:
            return super().on(anatomy)
        self.fit(anatomy.model).remember()
        return super().on(anatomy)

    def check_model(self, anatomy: Anatomy) -> None:
        super().check_model(anatomy)
        if self.compensate and getattr(anatomy.config, "attn_logit_softcapping", None) is not None:
            raise UnsupportedModelError(
                f"{self.name}: {anatomy.architecture} caps its attention logits, which the compensation token does not "
                "know; use compensate=False"
            )

    @property
    def needs_lost(self) -> bool:  # type: ignore[override]
        return self.compensate

    @functools.cached_property
    def retrieval(self) -> tuple[tuple[bool, ...], ...]:
        """Which heads of each layer keep everything."""
        by_induction = highest(self.induction, self.induction_share)
        by_echo = highest(self.echo, self.echo_share)
        return tuple(
            tuple(a or b for a, b in zip(*rows, strict=True)) for rows in zip(by_induction, by_echo, strict=True)
        )

    def windows(self, layer: int, seen: int) -> list[int | None]:
        window = max(self.recent, math.ceil(seen / self.compression))
        return [None if whole else window for whole in self.retrieval[layer]]

    def alike(self, layer: int) -> bool:
        roles = set(self.retrieval[layer])
        return roles == {True} or (len(roles) == 1 and not self.compensate)

    def lossless(self, tokens: int) -> Self:
        return self.replace(recent=tokens)

    def lose(self, entries: KeptLayer, keys: Tensor, values: Tensor, gone: Tensor) -> None:
        """Take entries that go into the mean of those that went before."""
        kept = entries.aside
        exact = torch.promote_types(keys.dtype, torch.float32)
        if "dropped" not in kept:
            kept["dropped"] = torch.zeros(gone.shape[:2], dtype=exact, device=gone.device)
            kept["mean_key"] = keys.new_zeros(*gone.shape[:2], keys.shape[3], dtype=exact)
            kept["mean_value"] = values.new_zeros(*gone.shape[:2], values.shape[3], dtype=exact)
        kept["dropped"] = kept["dropped"] + gone.sum(dim=2)
        if gone.shape[2] == 1:  # as in a decoding step
            part = gone / kept["dropped"].clamp_min(1)[..., None]
            for name, new in (("mean_key", keys), ("mean_value", values)):
                kept[name] = torch.lerp(kept[name], new[:, :, 0].to(exact), part.to(exact))
            return
        share = gone.to(exact) / kept["dropped"].clamp_min(1)[..., None]
        before = 1 - share.sum(dim=2, keepdim=True)
        for name, new in (("mean_key", keys), ("mean_value", values)):
            kept[name] = before * kept[name] + (share[:, :, None] @ new.to(exact)).squeeze(2)

    def stand_in(self, entries: KeptLayer) -> StandIn | None:
        kept = entries.aside
        if "dropped" not in kept:
            return None
        return StandIn(kept["mean_key"], kept["mean_value"], kept["dropped"].log())

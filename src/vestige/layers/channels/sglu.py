"""TransNormerLLM's feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from vestige.core.method import Paper, Verdict, param
from vestige.layers.channels.base import Channel
from vestige.layers.channels.swiglu import GatedLayer

__all__ = ["SGLU", "SGLULayer"]


class SGLULayer(GatedLayer):
    """``down(value(x) * gate(x))``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class SGLU(Channel):
    """A gated feed-forward layer without an activation: the gate is nonlinear enough."""

    name = "sglu"
    paper = Paper(
        title="TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
        year=2023,
        arxiv="2307.14995",
        equations="section 3.2.3",
    )
    verdict = Verdict(
        "not checkable here",
        "The claim is speed at an equal perplexity after pre-training; that takes more than fits here.",
    )
    layer = SGLULayer

    width: int | None = param(None, "inner width; default: the model's, or 8/3 of the hidden size", ge=1)

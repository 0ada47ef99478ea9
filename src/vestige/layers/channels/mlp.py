"""The plain feed-forward layer."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.method import Paper, Verdict, param
from vestige.layers.channels.base import Channel
from vestige.layers.place import Place

__all__ = ["MLP", "MLPLayer"]


class MLPLayer(nn.Module):
    """``down(act(up(x)))``."""

    def __init__(self, channel: MLP, place: Place) -> None:
        super().__init__()
        width = channel.width or place.intermediate_size or 4 * place.hidden_size
        forms: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
        self.activation = forms[channel.activation]
        self.up_proj = nn.Linear(place.hidden_size, width)
        self.down_proj = nn.Linear(width, place.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class MLP(Channel):
    """Two linear maps with a nonlinearity between them."""

    name = "mlp"
    paper = Paper(
        title="Attention Is All You Need", year=2017, arxiv="1706.03762", venue="NeurIPS 2017", equations="equation 2"
    )
    verdict = Verdict(
        "not checkable here",
        "It is the baseline of its kind; there is nothing to compare it with.",
    )
    layer = MLPLayer

    activation: Literal["gelu", "relu", "silu"] = param("gelu", "the nonlinearity; the paper's is relu")
    width: int | None = param(None, "inner width; default: the model's, or 4 times the hidden size", ge=1)

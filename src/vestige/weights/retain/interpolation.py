"""How the outputs of two blocks are mixed, and how far they are apart: for blocks that learn beside frozen ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.weights.retain.session import wide

__all__ = ["DISTANCES", "INTERPOLATORS", "Lerp", "cosine", "mse"]

NO_ARC = 1e-6
"""Two directions whose cosine is nearer to 1 or -1 than this span no arc that float32 could tell from a line."""


class Lerp(nn.Module):
    """h = f + a (e - f): one share a for all tokens, the sigmoid of a factor.

    Args:
        width: of hidden states.
        share: a at the start.
        learnt: whether the factor is trained.
        draw: random numbers.
    """

    def __init__(self, width: int, share: float, learnt: bool, draw: torch.Generator) -> None:
        super().__init__()
        factor = torch.tensor([math.log(share / (1 - share))], dtype=torch.float64)
        self.factor = nn.Parameter(factor, requires_grad=learnt)

    def share(self, x: Tensor, frozen: Tensor, expanded: Tensor) -> Tensor:
        """The expanded block's share: (1,), or (batch, tokens, 1)."""
        return self.factor.sigmoid()

    def held_to(self, frozen: Tensor) -> Tensor:
        """What the expanded block's output is held near: of the frozen block's (batch, tokens, width)."""
        return frozen

    def forward(self, x: Tensor, frozen: Tensor, expanded: Tensor) -> tuple[Tensor, Tensor]:
        """The merged hidden states, and the share.

        Args:
            x: what both blocks were given (batch, tokens, width).
            frozen, expanded: what they made of it.
        """
        share = self.share(x, frozen, expanded)
        return frozen + share * (expanded - frozen), share


class Dlerp(Lerp):
    """A share for each token, from both blocks' outputs: a = sigmoid(w [f, e] + factor)."""

    parts: ClassVar[int] = 2

    def __init__(self, width: int, share: float, learnt: bool, draw: torch.Generator) -> None:
        super().__init__(width, share, learnt, draw)
        inputs = self.parts * width
        even = 2 * torch.rand(inputs, generator=draw, dtype=torch.float64) - 1
        self.weight = nn.Parameter(even * inputs**-0.5)

    def features(self, x: Tensor, frozen: Tensor, expanded: Tensor) -> Tensor:
        return torch.cat([frozen, expanded], dim=-1)

    def share(self, x: Tensor, frozen: Tensor, expanded: Tensor) -> Tensor:
        return (self.features(x, frozen, expanded) @ self.weight[:, None] + self.factor).sigmoid()


class DlerpIn(Dlerp):
    """A share for each token, from what both blocks are given: a = sigmoid(w x + factor)."""

    parts = 1

    def features(self, x: Tensor, frozen: Tensor, expanded: Tensor) -> Tensor:
        return x


class Slerp(Lerp):
    """Along the arc from f to e: h = (sin((1 - a) t) f + sin(a t) e) / sin t, with t the angle between them.

    Where the two point the same way, or opposite ways, there is no one arc, and the straight line is taken.
    """

    def forward(self, x: Tensor, frozen: Tensor, expanded: Tensor) -> tuple[Tensor, Tensor]:
        straight, share = super().forward(x, frozen, expanded)
        cosines = F.cosine_similarity(wide(frozen), wide(expanded), dim=-1)[..., None]
        none = cosines.abs() > 1 - NO_ARC
        angle = cosines.masked_fill(none, 0).acos()
        along = ((1 - share) * angle).sin() * frozen + (share * angle).sin() * expanded
        return torch.where(none, straight, along / angle.sin()), share


def _near_identity(width: int, draw: torch.Generator) -> Tensor:
    return torch.eye(width, dtype=torch.float64) + 0.01 * torch.randn(width, width, generator=draw, dtype=torch.float64)


class Proj(Lerp):
    """The expanded block is held near a learnt map of the frozen one's output, near the identity at first: P f."""

    def __init__(self, width: int, share: float, learnt: bool, draw: torch.Generator) -> None:
        super().__init__(width, share, learnt, draw)
        self.lateral = nn.Parameter(_near_identity(width, draw))

    def held_to(self, frozen: Tensor) -> Tensor:
        return frozen @ self.lateral.T


class Prog(Lerp):
    """A learnt map of the frozen block's output, near the identity at first, in its place: f -> P f."""

    def __init__(self, width: int, share: float, learnt: bool, draw: torch.Generator) -> None:
        super().__init__(width, share, learnt, draw)
        self.lateral = nn.Parameter(_near_identity(width, draw))

    def forward(self, x: Tensor, frozen: Tensor, expanded: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, frozen @ self.lateral.T, expanded)


INTERPOLATORS: dict[str, type[Lerp]] = {
    "lerp": Lerp,
    "slerp": Slerp,
    "dlerp": Dlerp,
    "dlerp-in": DlerpIn,
    "proj": Proj,
    "prog": Prog,
}


def mse(frozen: Tensor, expanded: Tensor) -> Tensor:
    """Mean squared difference (batch, tokens)."""
    return (wide(expanded) - wide(frozen)).square().mean(-1)


def cosine(frozen: Tensor, expanded: Tensor) -> Tensor:
    """Smooth L1 of one minus the cosine (batch, tokens)."""
    apart = 1 - F.cosine_similarity(wide(frozen), wide(expanded), dim=-1)
    return F.smooth_l1_loss(apart.relu(), torch.zeros_like(apart), reduction="none")


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine}

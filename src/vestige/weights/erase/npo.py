"""Gradient ascent that lets go of each example once it is forgotten."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vestige.core.method import Paper, Verdict, param
from vestige.weights.erase.descent import Descent
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Row

__all__ = ["NPO"]


class NPO(Descent):
    """Negative preference optimisation: make the forget set less likely than it was, with fading force.

    The gradient is gradient ascent's, each example weighted by 2 p^beta / (p^beta + p0^beta), where p0 is its
    likelihood under the untouched model. That is one number per example, so no second model is held.
    """

    name = "npo"
    paper = Paper(
        title="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        year=2024,
        arxiv="2404.05868",
        venue="COLM 2024",
        code="https://github.com/licong-lin/negative-preference-optimization",
        equations="the loss L_NPO with a retain term (section 3)",
    )
    verdict = Verdict(
        "not reproduced",
        "class 3 of scikit-learn's digits, small ViT, 3 seeds: test accuracy on it 0.92-1.00 -> 0.00, on "
        "the others 0.90-0.97 (retrained 0.96-0.97), as gradient ascent with the same stop; slower "
        "collapse on language models not looked at yet",
    )

    beta: float = param(0.1, "how fast the force fades as an example becomes less likely", gt=0)

    @torch.no_grad()
    def prepare(self, work: Work) -> Tensor:
        """The untouched model's loss of each row, summed over its labels (forget rows,)."""
        return torch.cat([work.losses(batch, "sum") for _, batch in work.batches(work.forget)])

    def forget_loss(self, work: Work, places: Tensor, batch: Row, known: Tensor) -> Tensor:
        log_ratio = known[places.to(known.device)] - work.losses(batch, "sum")
        return 2 / self.beta * F.softplus(self.beta * log_ratio).mean()

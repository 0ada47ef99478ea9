"""Go up the loss on what is to be forgotten, and down the loss on the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vestige.core.method import Paper, Verdict
from vestige.weights.erase.descent import Descent
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Row

__all__ = ["GradientAscent"]


class GradientAscent(Descent):
    """Raise the loss on the forget set while holding it down on the retain set; with no retain weight, ascent alone.

    The ascent has no end of its own: the stop rules give it one.
    """

    name = "gradient-ascent"
    paper = Paper(
        title="TOFU: A Task of Fictitious Unlearning for LLMs",
        year=2024,
        arxiv="2401.06121",
        code="https://github.com/locuslab/tofu",
        equations="gradient ascent and gradient difference, section 3",
    )
    verdict = Verdict(
        "reproduced",
        "class 3 of scikit-learn's digits, small ViT, 3 seeds, with retain term and stop at a target: "
        "test accuracy on it 0.92-1.00 -> 0.00, on the others 0.90-0.97 (retrained 0.96-0.97)",
    )

    def forget_loss(self, work: Work, places: Tensor, batch: Row, known: Any) -> Tensor:
        return -work.losses(batch).mean()

"""A needle among others of its kind."""

from __future__ import annotations

from vestige.core.spec import param
from vestige.evidence.tasks.needle import Needle, NeedleTask

__all__ = ["MultiKeyNeedle"]


class MultiKeyNeedle(NeedleTask):
    """Find one fact in a long text that states the same kind of fact for other keys.

    What is kept must tell the facts apart: looking for anything unusual is not enough. Source: the multi-key task of
    RULER (arXiv 2404.06654, section 3.1), here with keys and answers of this package's own.
    """

    name = "multi-key-needle"
    version = 1

    distractors: int = param(4, "facts of the same kind for other keys", ge=1)

    def needle(self, depth: float, seed: int) -> Needle:
        return super().needle(depth, seed).replace(distractors=self.distractors)

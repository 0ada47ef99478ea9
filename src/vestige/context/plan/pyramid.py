"""PyramidKV: wide below, narrow above."""

from __future__ import annotations

import functools

from vestige.context.plan.sharing import Sharing, apportion
from vestige.core.method import Paper, Verdict, param

__all__ = ["Pyramid", "pyramid"]


class Pyramid(Sharing):
    """Give the lower layers more of the budget than the upper ones, and all layers together exactly as much.

    Attention is spread widely in the lower layers and gathers on few tokens in the upper ones, so that a low layer
    loses more by a small budget. With *b* the mean number of entries per head beside those that are kept in any case
    (sinks and recent tokens), the top layer gets *b* / beta of them, the bottom layer 2 *b* - *b* / beta, and
    those between them lie on a line. A layer that would get more than the tokens seen gets those, and the line
    turns about its middle.

    The published step between two layers is rounded down, by which all layers together hold up to a tenth more than
    the budget; here the line is rounded so that they hold the budget. Its fixed floor of two means (below which it
    gives every layer the same) is left out: the line flattens by itself as the budget nears the tokens seen.
    """

    name = "pyramid"
    paper = Paper(
        title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        year=2024,
        arxiv="2406.02069",
        code="https://github.com/Zefan-Cai/KVCache-Factory",
        equations="section 4.2, the arithmetic sequence of budgets; the score is that of `policy`",
    )
    verdict = Verdict(
        "not reproduced",
        "SmolLM2, 256 tokens cut to a mean of 40 with SnapKV's votes (window of 16): 0.45 nats from the whole"
        " cache's predictions, with equal budgets 0.42, in none of three passages nearer; nor with h2o. A "
        "needle is found where equal budgets find it",
    )

    beta: float = param(20.0, "the mean budget over the top layer's; 1 gives every layer the same", ge=1)

    def layer_budgets(self, budgets: list[int], real: list[int], layer: int, layers: int) -> list[int]:
        means = super().layer_budgets(budgets, real, layer, layers)
        return [
            pyramid(mean, seen, self.sinks + self.recent_tokens(mean), self.beta, layers)[layer]
            for mean, seen in zip(means, real, strict=True)
        ]


@functools.lru_cache(maxsize=4096)
def pyramid(mean: int, seen: int, fixed: int, beta: float, layers: int) -> tuple[int, ...]:
    """Entries per head of each layer, from the bottom: a falling line that adds up to ``layers * mean``.

    Args:
        mean: entries per head, as a mean of the layers.
        seen: tokens seen: no layer can hold more.
        fixed: entries that every layer holds in any case.
        beta: ``mean`` over what the top layer gets, both without ``fixed``.
    """
    if mean >= seen or layers == 1:
        return (mean,) * layers
    free = mean - fixed
    bottom = min(2 * free - free / beta, seen - fixed)
    top = 2 * free - bottom
    line = [fixed + bottom - layer * (bottom - top) / (layers - 1) for layer in range(layers)]
    return tuple(apportion(line, layers * mean, most=[seen] * layers))

"""Key norm: keep the entries whose keys are short."""

from __future__ import annotations

import torch
from torch import Tensor

from vestige.context.cache import KeptLayer
from vestige.context.policy import Evict
from vestige.core.method import Paper, param

__all__ = ["KNorm"]


class KNorm(Evict):
    r"""Keep entries whose keys have a small norm, :math:`-\lVert k_j \rVert_2`.

    In many decoders the keys that draw much attention are the short ones: their few large dimensions are fit to meet
    any query. So an entry can be ranked by itself, without any query and without attention weights. Turning by
    position does not change a norm.

    The paper leaves the first one or two layers whole, where norm and attention are not related; here a budget holds
    for all layers alike, unless a plan gives each layer its own.
    """

    name = "knorm"
    paper = Paper(
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        year=2024,
        arxiv="2406.11430",
        venue="EMNLP 2024",
        code="https://github.com/alessiodevoto/l2compress",
        equations="section 3, keys of lowest L2 norm",
    )

    recent: int | float = param(0, "last tokens that are always kept: tokens (int), or a share of the budget", ge=0)

    def score(self, entries: KeptLayer) -> Tensor:
        exact = torch.promote_types(entries.keys.dtype, torch.float32)
        return -torch.linalg.vector_norm(entries.keys, dim=-1, dtype=exact)

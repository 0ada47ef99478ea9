"""Key norm: keep the entries whose keys are short."""

from __future__ import annotations

import torch
from torch import Tensor

from vestige.context.layer import KeptLayer
from vestige.context.policy import Evict
from vestige.core.method import Paper, Verdict, param

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
    verdict = Verdict(
        "reproduced",
        "SmolLM2, 256 tokens cut to 40: what is kept gets 65% of the attention of later tokens, long keys 6%;"
        " 0.83 nats from the whole cache's predictions, long keys 2.0. Over all tokens the ranks of norm and "
        "attention hardly go against each other (-0.04 to -0.07): it is the few shortest keys that count. A "
        "needle asked for only after the cut (512 tokens, half kept) is lost in text whose sentences all "
        "differ and found 18 times in 20 among five sentences over and over: tokens that are new have short "
        "keys. kvpress's press gives the same answers to the same prompts",
    )

    recent: int | float = param(0, "last tokens that are always kept: tokens (int), or a share of the budget", ge=0)

    def score(self, entries: KeptLayer) -> Tensor:
        exact = torch.promote_types(entries.keys.dtype, torch.float32)
        return -torch.linalg.vector_norm(entries.keys, dim=-1, dtype=exact)

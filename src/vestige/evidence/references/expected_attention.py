"""Expected attention (arXiv 2510.00636, section 3): attention of queries to come, if they are Gaussian.

Queries are q = R(p) x, with R(p) the turn by position p. Of the queries seen, but for those of the first ``sinks``
tokens,

    mu = mean of x,   Sigma = mean of (x - mu)(x - mu)^T,

one of each per query head h. Queries to come, at the positions n, ..., n + F - 1, are taken to have mean R mu and
covariance R Sigma R^T with R the mean of R(n), ..., R(n + F - 1); and for a Gaussian query

    E exp(t k^T q) = exp(t k^T R mu + t^2/2 k^T R Sigma R^T k) = z[h, k],

t being the factor of the logits. The score is, beside the first ``sinks`` tokens, which take no part and stay,

    A_k = (mean over h of z[h, k] / sum_j z[h, j] + epsilon) |v_k|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Sight, Trace, follow, turned

__all__ = ["SMALL", "simulate"]

SMALL = {"future": 6, "lag": 3}


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    future: int,
    covariance: bool,
    epsilon: float,
    budget: int | float,
    sinks: int,
    recent: int | float,
    when: Literal["both", "prefill", "decoding"],
    lag: int,
    scaling: float | None = None,
    frequencies: Float[Tensor, " pairs"] | None = None,
    **layer: Any,
) -> Trace:
    """Gaussian queries. See :func:`~vestige.evidence.references.caching.follow` for the other arguments.

    Args:
        future: F, how many positions to come.
        covariance: whether Sigma is used, or taken to be zero.
        epsilon: as above.
        frequencies: of the turns; without them R is the identity.
    """
    dim = query.shape[-1]
    t = dim**-0.5 if scaling is None else scaling
    frequencies = torch.zeros(0) if frequencies is None else frequencies

    def expected(now: Sight) -> Float[Tensor, " n"]:
        n = now.probability.shape[-1]
        score = torch.zeros(n, dtype=torch.float64)
        held = [p for p in now.held if p >= sinks]
        seen = list(range(sinks, n))
        if not held:
            return score
        k, v = key[now.head, held].double(), value[now.head, held].double()
        eye = torch.eye(dim, dtype=torch.float64)
        R = torch.stack([turned(eye, [p] * dim, frequencies).T for p in range(n, n + future)]).mean(dim=0)
        share = []
        for q in query[now.group, seen].double():
            x = turned(q, [-p for p in seen], frequencies)
            mu = x.mean(dim=0)
            Sigma = (x - mu).T @ (x - mu) / len(x) if covariance else torch.zeros(dim, dim, dtype=torch.float64)
            z = t * k @ R @ mu + t**2 / 2 * torch.einsum("ki,ij,kj->k", k, R @ Sigma @ R.T, k)
            share.append(z.softmax(dim=0))
        score[held] = (torch.stack(share).mean(dim=0) + epsilon) * v.norm(dim=1)
        return score

    return follow(
        query,
        key,
        value,
        chunks,
        expected,
        budget=budget,
        sinks=sinks,
        recent=recent,
        when=when,
        lag=lag,
        scaling=scaling,
        **layer,
    )

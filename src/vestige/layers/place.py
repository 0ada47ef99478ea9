"""Where a layer stands in a model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Place"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer stands in a model, and the model's own sizes, which a mixer may override.

    Attributes:
        hidden_size: width of what comes in and goes out.
        heads: heads of a mixer that names none.
        kv_heads: key-value heads of attention that names none; default: as many as heads.
        head_dim: width of a head of attention that names none; default: hidden_size / heads.
        intermediate_size: width inside a channel mixer that names none.
        index: of the layer, from 0.
        layers: how many the model has.
        context: the most tokens that the model is made for.
        eps: of the norms.
    """

    hidden_size: int
    heads: int = 1
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    index: int = 0
    layers: int = 1
    context: int = 2048
    eps: float = 1e-6

"""Attention sinks: how much of every head's attention falls on the first tokens.

Many heads, with nothing to look for, attend to the first token of the text. A cache that gives that token up
takes away what these heads rest on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.context.evict.full import Full
from vestige.core.anatomy import Anatomy
from vestige.errors import InputError
from vestige.layers.ops.attention_mass import attention_mass

if TYPE_CHECKING:
    import numpy as np

__all__ = ["sink_share"]


def sink_share(
    model: nn.Module,
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
    *,
    first: int = 1,
) -> Float[np.ndarray, "batch layers heads"]:
    """Share of each head's attention that falls on the first tokens of each text, averaged over the queries after them.

    Attention is computed block by block: no tokens × tokens matrix is held.

    Args:
        model: a causal decoder that Vestige knows.
        input_ids: the texts.
        attention_mask: zero on left padding; the first tokens are then the first real ones.
        first: how many first tokens count as the sink.

    Returns:
        One share, 0 to 1, for each text, layer and query head. Uniform attention over *n* tokens would give
        about ``first * ln(n / first) / n``.

    Raises:
        InputError: ``first`` is below 1, or leaves no token to look from; or the mask pads on the right.
        UnsupportedModelError: the model is no causal decoder that Vestige knows.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise InputError(f"attention mask of shape {tuple(mask.shape)} for input of shape {tuple(input_ids.shape)}")
    if not bool((mask.long().diff(dim=1) >= 0).all()):
        raise InputError("the attention mask must pad on the left")
    fewest = int(mask.sum(dim=1).min())
    if type(first) is not int or not 1 <= first < fewest:
        raise InputError(f"first is {first!r}; allowed: 1 to {fewest - 1}, for a shortest text of {fewest} tokens")
    place = mask.long().cumsum(dim=1) - 1  # among the real tokens; -1 on padding
    looking = (place >= first).float()
    weights = looking / looking.sum(dim=1, keepdim=True)
    is_sink = (place >= 0) & (place < first)
    padded = {} if bool(mask.all()) else {"attention_mask": mask, "position_ids": place.clamp(min=0)}
    anatomy = Anatomy.of(model)
    shares: dict[int, Tensor] = {}

    def look(layer: int, query: Tensor, keys: Tensor, positions: Tensor | None, scaling: float) -> None:
        group = query.shape[1] // keys.shape[1]
        per_head = keys.repeat_interleave(group, dim=1)
        if positions is None:
            valid, places = None, torch.arange(keys.shape[2], device=keys.device).expand(per_head.shape[:3])
        else:
            places = positions.repeat_interleave(group, dim=1)
            valid = places >= 0
        received = attention_mass(
            query,
            per_head,
            weights.to(query.device),
            scaling=scaling,
            valid=valid,
            softcap=getattr(anatomy.config, "attn_logit_softcapping", None),
            window=anatomy.sliding_windows[layer],
            positions=places,
        )
        shares[layer] = (received * is_sink[:, None].to(received.device)).sum(dim=2).cpu()

    with torch.inference_mode(), Full().attach(model) as kept:
        kept.watch(look)
        anatomy.base(input_ids=input_ids, use_cache=True, **padded)
    return torch.stack([shares[layer] for layer in range(anatomy.num_layers)], dim=1).numpy()

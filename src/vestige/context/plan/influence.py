"""What a head's loss of sight would cost: the influence of attention values on the loss, by distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from vestige.context.plan.distil import hold_still
from vestige.context.plan.passkeys import Sample
from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import UnsupportedModelError

__all__ = ["along_distances", "influence"]

BLOCK_BYTES = 64 * 2**20  # one block of attention weights in float32
NEAR_ONE = 1e-6  # a weight this close to one leaves nothing to shift its attention to


def influence(
    model: nn.Module, samples: Sequence[Sample], sinks: int, owner: str = "influence"
) -> Float[Tensor, "layers kv distance"]:
    r"""How much the loss would change if a head did not see the token at a distance, summed over a text's tokens.

    Taking entry *j* from row *i* of the attention, the rest of the row scaled up to one again, changes the output by
    :math:`A_{ij} (o_i - v_j) / (1 - A_{ij})`, and so the loss, to first order, by

    .. math:: E_{ij} = \frac{A_{ij}}{1 - A_{ij}} \; \frac{\partial L}{\partial o_i} \cdot (o_i - v_j).

    The query heads of a key-value head lose the token together: their :math:`E` are added up. What is returned is
    the sum over *i* of :math:`|E_{i, i - d}|` for each distance *d*, without the first ``sinks`` tokens, as a mean over
    the samples. *L* is the cross-entropy at the tokens that count, of what the model itself finds likeliest there.

    Args:
        samples: texts of one length.
    """
    anatomy = Anatomy.of(model)
    if anatomy.head is None:
        raise UnsupportedModelError(f"{owner} needs a language model's head; {type(model).__name__} has none")
    device = next(anatomy.base.parameters()).device
    recording = _Recording(anatomy, len(samples[0].ids), sinks, device)
    with Patch(model, owner, claims={"kv-cache"}) as patch:
        hold_still(patch, anatomy)
        patch.attention("vestige-influence", recording, part=anatomy.base)
        for sample in samples:
            ids, counts = sample.tensors(device)
            states = anatomy.embedding(ids).detach().requires_grad_()
            hidden = anatomy.base(inputs_embeds=states, use_cache=False).last_hidden_state
            logits = anatomy.head(hidden[0, :-1][counts]).to(recording.total.dtype)
            loss = cross_entropy(logits, logits.detach().argmax(dim=-1))
            torch.autograd.grad(loss, states)
    return recording.total / len(samples)


class _Recording:
    """Attention as it is, which adds up influences when the gradient comes back."""

    def __init__(self, anatomy: Anatomy, length: int, sinks: int, device: torch.device) -> None:
        self.sinks = sinks
        exact = torch.promote_types(anatomy.base.dtype, torch.float32)
        self.total = torch.zeros(anatomy.num_layers, anatomy.num_kv_heads, length, dtype=exact, device=device)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        if softcap is not None:
            raise UnsupportedModelError("influences are not worked out for models that cap their attention logits")
        heads, kv_heads, count = query.shape[1], key.shape[1], query.shape[2]
        group = heads // kv_heads
        place = torch.arange(count, device=query.device)
        age = place[:, None] - place
        seen = age >= 0 if sliding_window is None else (age >= 0) & (age < sliding_window)
        keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        output = scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scaling)
        layer: int = module.layer_idx  # type: ignore[assignment]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        exact = self.total.dtype
        q, k, v, o = (states[0].detach().to(exact) for states in (query, keys, values, output))

        def record(gradient: Tensor) -> None:
            g = gradient[0].to(exact)
            block = max(1, BLOCK_BYTES // (4 * heads * count))
            for rows in place.split(block):
                logits = ((q[:, rows] @ k.transpose(1, 2)) * scale).masked_fill(~seen[rows], float("-inf"))
                share = logits.softmax(dim=-1)
                self.total[layer] += along_distances(share, v, o[:, rows], g[:, rows], rows, kv_heads, self.sinks)

        output.register_hook(record)
        return output.transpose(1, 2).contiguous(), None


def along_distances(
    share: Float[Tensor, "heads rows length"],
    value: Float[Tensor, "heads length dim"],
    output: Float[Tensor, "heads rows dim"],
    gradient: Float[Tensor, "heads rows dim"],
    rows: Tensor,
    kv_heads: int,
    sinks: int,
) -> Float[Tensor, "kv length"]:
    """Influences of the entries of some rows of attention, those of a group together, added up by distance."""
    along = (gradient * output).sum(dim=-1, keepdim=True) - gradient @ value.transpose(1, 2)
    each = share / (1 - share).clamp_min(NEAR_ONE) * along
    each[..., :sinks] = 0
    together = each.unflatten(0, (kv_heads, -1)).sum(dim=1).abs_()
    age = (rows[:, None] - torch.arange(share.shape[2], device=rows.device)).clamp_min(0)
    return together.new_zeros(kv_heads, share.shape[2]).index_add_(1, age.flatten(), together.flatten(1))

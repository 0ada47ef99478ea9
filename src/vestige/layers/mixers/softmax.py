"""Softmax attention over the whole past."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vestige.core.method import Paper, Verdict
from vestige.layers.layout import Layout
from vestige.layers.mixers.attention import AttentionLayer, AttentionMixer
from vestige.layers.place import Place
from vestige.layers.state import LayerState

__all__ = ["Softmax", "SoftmaxLayer"]


class SoftmaxLayer(AttentionLayer):
    """The layer of :class:`Softmax`. It holds ``keys`` and ``values``, ``(batch, kv_heads, tokens, dim)``."""

    is_causal = True

    def __init__(self, mixer: Softmax, place: Place) -> None:
        super().__init__(mixer, place)
        self.layer_idx = place.index

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        q, k, v = self.project(x, layout)
        longer = state is not None and bool(state.tensors)
        if state is not None:
            if longer:
                k = torch.cat([state.tensors["keys"], k], dim=2)
                v = torch.cat([state.tensors["values"], v], dim=2)
            state.write({"keys": k, "values": v}, x.shape[1])
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(layout.implementation, eager)
        with contextlib.nullcontext() if torch.compiler.is_compiling() or not longer else _other_than_cudnn():
            out, _ = attend(self, q, k, v, layout.mask, dropout=0.0, scaling=self.scaling, **layout.options)
        return self.o_proj(out.flatten(2))


@contextlib.contextmanager
def _other_than_cudnn() -> Iterator[None]:
    """Have PyTorch's attention done by any of its other kernels that are allowed.

    cuDNN plans anew for every number of keys, which takes tens of milliseconds: with keys that grow, at each token.
    """
    flags = torch.backends.cuda
    if not (flags.cudnn_sdp_enabled() and flags.math_sdp_enabled()):
        yield
        return
    flags.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        flags.enable_cudnn_sdp(True)


def eager(
    module: SoftmaxLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **unused: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out: ``softmax(scaling q k^T + mask) v``, with the probabilities."""
    k, v = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (k, v))
    logits = scaling * (q @ k.mT)
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    share = torch.softmax(logits, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (share @ v).transpose(1, 2), share


class Softmax(AttentionMixer):
    """Attend to every earlier token: all is kept and nothing forgotten, at a cost that grows with the text.

    Heads may share keys and values in groups; positions are rotary. What computes it is the model's
    ``attn_implementation`` (``sdpa``, ``eager``, ``flex_attention``, ``flash_attention_2`` ...).
    """

    name = "softmax"
    paper = Paper(
        title="Attention Is All You Need",
        year=2017,
        arxiv="1706.03762",
        venue="NeurIPS 2017",
        code="https://github.com/tensorflow/tensor2tensor",
        equations="equation 1; rotary positions of arXiv 2104.09864, grouped queries of arXiv 2305.13245",
    )
    verdict = Verdict(
        "reproduced",
        "Of 24 pairs, after 150 training steps, 0.99 to 1.00 are recalled by one layer; by linear attention, "
        "at the same width, 0.42 to 0.44 (3 seeds).",
    )
    attends = True
    forgets = "nothing is forgotten"
    layer = SoftmaxLayer

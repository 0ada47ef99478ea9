r"""Attention within a window by PyTorch's flash attention, beside the few keys that all queries see.

The kernels see the window alone and give its answer :math:`o_w` and the logarithm :math:`\ell_w` of its sum of weights.
With the scores :math:`s_j` of what is seen besides, persistent keys and a sink, there is

.. math::
    \ell = \log\big(e^{\ell_w} + \sum_j e^{s_j}\big), \qquad o = e^{\ell_w - \ell} o_w + \sum_j e^{s_j - \ell} v_j .

Slopes in the window's part come from the same kernels: all that they take from the forward pass is the output and the
sum of weights, so they are given :math:`o` and :math:`\ell`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vestige.layers.ops.recurrence import exact

__all__ = ["by_flash", "serves"]

FEWEST = 16  # queries: for fewer the portable form takes as long
WIDEST = 256


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels take this: on CUDA, in half precision, heads of a width that they know."""
    dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and dim == value.shape[-1]
        and dim <= WIDEST
        and dim % 8 == 0
        and query.shape[2] >= FEWEST
        and _there(query.device)
    )


@torch.compiler.assume_constant_result
def _there(device: torch.device) -> bool:
    flags = torch.backends.cuda
    allowed = flags.is_flash_attention_available() and flags.flash_sdp_enabled()
    return allowed and torch.cuda.get_device_capability(device)[0] >= 8 and _as_written_here()


def _as_written_here() -> bool:
    """Whether this PyTorch's operators, which it does not promise to keep, take and return what is written below."""
    for name, given, returned in (("_flash_attention_forward", 10, 5), ("_flash_attention_backward", 14, 3)):
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            return False
        schema = packet.default._schema
        due = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        named = {argument.name for argument in schema.arguments if argument.kwarg_only}
        if len(due) != given or len(schema.returns) != returned or not named >= set(_span(1, 1.0)):
            return False
    return True


def by_flash(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch kv held dim"],
    value: Float[Tensor, "batch kv held dim"],
    *,
    window: int,
    scaling: float,
    sink: Float[Tensor, " heads"] | None = None,
    always: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Float[Tensor, "batch heads length dim"]:
    """As :func:`vestige.layers.ops.windowed_attention.windowed_attention`, of rows without padding that are one text
    each."""
    asked, keys, values = always or (None, None, None)
    return _Window.apply(query, key, value, asked, keys, values, sink, window, scaling)  # type: ignore[no-any-return]


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        asked: Tensor | None,
        keys: Tensor | None,
        values: Tensor | None,
        sink: Tensor | None,
        window: int,
        scaling: float,
    ) -> Tensor:
        out, weight, random = _forward(query, key, value, window, scaling)
        scores = _scores(query, asked, keys, sink, scaling)
        if scores is not None:
            near = weight
            weight = torch.cat([near[..., None], scores], -1).logsumexp(-1)
            whole = out.to(near) * (near - weight).exp()[..., None]
            if values is not None:
                share = (scores[..., : values.shape[1]] - weight[..., None]).exp()
                whole = whole + share @ _by_head(values, query).to(share)
            out = whole.to(out)
        ctx.save_for_backward(query, key, value, asked, keys, values, sink, out, weight, *random)
        ctx.window, ctx.scaling = window, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        query, key, value, asked, keys, values, sink, out, weight, *random = ctx.saved_tensors
        slope = slope.contiguous()
        near = _backward(slope, query, key, value, out, weight, random, ctx.window, ctx.scaling)
        d_asked = d_keys = d_values = d_sink = None
        scores = _scores(query, asked, keys, sink, ctx.scaling)
        if scores is not None:
            slope = slope.to(weight)
            met = (slope * out).sum(-1, keepdim=True)
            share = (scores - weight[..., None]).exp()
            if sink is not None:
                d_sink = -(share[..., -1:] * met).sum((0, 2, 3)).to(sink)
            if keys is not None and values is not None and asked is not None:
                share = share[..., : keys.shape[1]]
                group = query.shape[1] // keys.shape[0]
                back = ctx.scaling * share * (slope @ _by_head(values, query).to(slope).mT - met)
                d_asked = (back @ _by_head(keys, query).to(back)).to(asked)
                d_keys, d_values = (
                    (each.mT @ by.to(each)).sum(0).unflatten(0, (-1, group)).sum(1).to(like)
                    for each, by, like in ((back, asked, keys), (share, slope, values))
                )
        return *near, d_asked, d_keys, d_values, d_sink, None, None


def _scores(
    query: Tensor, asked: Tensor | None, keys: Tensor | None, sink: Tensor | None, scaling: float
) -> Float[Tensor, "batch heads length more"] | None:
    """Scores of what all queries see, the sink's behind those of keys; ``None`` where there is nothing."""
    kind, parts = exact(query), []
    if asked is not None and keys is not None:
        parts.append(scaling * (asked.to(kind) @ _by_head(keys, query).to(kind).mT))
    if sink is not None:
        parts.append(sink.to(kind)[None, :, None, None].expand(*query.shape[:-1], 1))
    return torch.cat(parts, -1) if parts else None


def _by_head(shared: Float[Tensor, "kv more dim"], query: Tensor) -> Float[Tensor, "heads more dim"]:
    """What query heads of a group share, for each of them."""
    return shared.repeat_interleave(query.shape[1] // shared.shape[0], 0)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float
) -> tuple[Tensor, Float[Tensor, "batch heads length"], list[Tensor]]:
    """The window's answers, the logarithm of their sum of weights, and the random state that nothing is drawn from."""
    parts = [t.transpose(1, 2) for t in (query, key, value)]
    out, weight, *random, _ = torch.ops.aten._flash_attention_forward(
        *parts, None, None, query.shape[2], key.shape[2], 0.0, True, False, **_span(window, scaling)
    )
    return out.transpose(1, 2), weight, random


def _backward(
    slope: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    weight: Tensor,
    random: list[Tensor],
    window: int,
    scaling: float,
) -> list[Tensor]:
    """Slopes in queries, keys and values of the window."""
    parts = [t.transpose(1, 2) for t in (slope, query, key, value, out)]
    lengths = query.shape[2], key.shape[2]
    found = torch.ops.aten._flash_attention_backward(
        *parts, weight, None, None, *lengths, 0.0, True, *random, **_span(window, scaling)
    )
    return [t.transpose(1, 2) for t in found]


def _span(window: int, scaling: float) -> dict[str, Any]:
    return {"scale": scaling, "window_size_left": window - 1, "window_size_right": 0}

"""How much each weight matters: the diagonal of the empirical Fisher information, row by row, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from vestige.errors import InputError

__all__ = ["diagonal"]


def diagonal(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    loss: Callable[[Any, Mapping[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    chunk: int = 16,
) -> dict[str, Tensor]:
    """The mean over rows of the squared gradient of each row's own loss.

    It is not the square of a batch's mean gradient, which is smaller by up to the batch's size. The model should be
    in evaluation mode. A model whose forward cannot be vectorised over rows is looked at one row at a time.

    Args:
        model: any.
        batches: what the model takes, rows first; only one batch is held at a time.
        loss: of the outputs and a batch of one row.
        parameters: those to look at, by name.
        chunk: rows at a time; each needs a copy of the gradient.

    Returns:
        One tensor per parameter, of its shape, in float32 or wider.

    Raises:
        InputError: there are no rows.
    """
    weights = {name: p.detach() for name, p in parameters.items()}
    total = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in weights.items()
    }
    seen = 0

    def of_row(weights: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        batch = {key: value.unsqueeze(0) for key, value in row.items()}
        return loss(functional_call(model, weights, (), batch), batch)

    together: Any = vmap(grad(of_row), in_dims=(None, 0), randomness="different")
    vectorised = True
    for batch in batches:
        rows = len(next(iter(batch.values())))
        for start in range(0, rows, chunk):
            part = {key: value[start : start + chunk] for key, value in batch.items()}
            found = None
            if vectorised:
                try:
                    found = together(weights, part)
                except RuntimeError as error:
                    if "vmap" not in str(error):
                        raise
                    vectorised = False
            if found is None:
                several = [grad(of_row)(weights, {k: v[n] for k, v in part.items()}) for n in range(_rows(part))]
                found = {name: torch.stack([g[name] for g in several]) for name in weights}
            for name, gradient in found.items():
                total[name] += gradient.to(total[name].dtype).square().sum(0)
        seen += rows
    if not seen:
        raise InputError("the Fisher information needs rows, and there are none")
    return {name: value / seen for name, value in total.items()}


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))

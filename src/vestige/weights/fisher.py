"""How much each weight matters: the diagonal of the empirical Fisher information, row by row, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vestige.errors import InputError

__all__ = ["diagonal"]

BLOCK = 32 << 20
"""Bytes of gradients of single rows that are held at once, of one weight; no more than a quarter of all weights."""
ROOM, HOST_ROOM, LEAST_ROOM = 1.5, 0.75, 16 << 20
"""What rows that are looked at together may take besides: so many times the weights, of which a GPU needs more to be
busy than a processor; at least so many bytes."""

Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]


def diagonal(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    loss: Loss,
    parameters: Mapping[str, Tensor],
    chunk: int = 64,
) -> dict[str, Tensor]:
    """The mean over rows of the squared gradient of each row's own loss.

    It is not the square of a batch's mean gradient, which is smaller by up to the batch's size. The model should be
    in evaluation mode. The gradients of the matrices of linear maps and embeddings are squared while the backward pass
    goes by and never held for more than a few rows; what is held of others takes no more room than the weights. A
    model whose forward cannot be vectorised over rows is looked at one row at a time.

    Args:
        model: any.
        batches: what the model takes, rows first; only one batch is held at a time.
        loss: of the outputs and a batch of one row.
        parameters: those to look at, by name.
        chunk: rows at a time, at most; fewer, where what is kept of them would take too much room beside the weights.

    Returns:
        One tensor per parameter, of its shape, in float32 or wider.

    Raises:
        InputError: there are no rows.
    """
    work = _Squares(model, loss, parameters)
    seen = 0
    for batch in batches:
        rows = len(next(iter(batch.values())))
        start = 0
        while start < rows:
            part = {key: value[start : start + min(chunk, work.rows)] for key, value in batch.items()}
            if work.add(part):
                start += len(next(iter(part.values())))
        seen += rows
    if not seen:
        raise InputError("the Fisher information needs rows, and there are none")
    return {name: value.div_(seen) for name, value in work.total.items()}


class _Squares:
    """Sums over rows of squared gradients.

    ``taps`` are the weights whose gradients are made row by row from what went through them; ``others`` get a copy
    of their own for every row, whose gradient is that row's.
    """

    def __init__(self, model: nn.Module, loss: Loss, parameters: Mapping[str, Tensor]) -> None:
        self.model, self.loss = model, loss
        self.leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self.total = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for name, p in self.leaves.items()
        }
        # Matrices are taken for linear maps until one is seen to be used otherwise.
        room = sum(total.nbytes for total in self.total.values()) // 4
        self.taps = {name: _Tap(p, self.total[name], room) for name, p in self.leaves.items() if p.ndim == 2}
        self.vectorised = True
        self.rows = 1  # that fit together: what one takes is seen on the first

    @property
    def others(self) -> list[str]:
        return [name for name in self.leaves if name not in self.taps]

    def _fitting(self, saved: int) -> int:
        """Rows that fit together, when for the backward pass so many bytes are kept of one."""
        whole = sum(p.nbytes for p in self.leaves.values())
        # Of the other weights there are a copy, its gradient and its square for each row.
        each = saved + 3 * sum(self.leaves[name].nbytes for name in self.others)
        share = HOST_ROOM if next(iter(self.leaves.values())).device.type == "cpu" else ROOM
        return max(1, int(max(share * whole, LEAST_ROOM)) // max(1, each))

    def add(self, rows: Mapping[str, Tensor]) -> bool:
        """Add some rows; whether that was done, or has to be tried again with what was found out."""
        with torch.enable_grad():
            if not self.vectorised:
                self._one_by_one(rows)
                return True
            try:
                return self._together(rows)
            except RuntimeError as error:
                if "vmap" not in str(error):
                    raise
                self.vectorised = False
                return False

    def _together(self, rows: Mapping[str, Tensor]) -> bool:
        count = len(next(iter(rows.values())))
        copies = {name: self.leaves[name].detach().expand(count, *self.leaves[name].shape).requires_grad_()
                  for name in self.others}  # fmt: skip
        for tap in self.taps.values():
            tap.clear()
        watch = _Watch(self.taps)

        def of_row(mark: Tensor, own: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
            batch = {key: value.unsqueeze(0) for key, value in row.items()}
            watch.mark = mark
            with watch:
                outputs = functional_call(self.model, {**self.leaves, **own}, (), batch)
            return self.loss(outputs, batch)

        mark = torch.zeros(count, device=next(iter(rows.values())).device)
        kept: dict[int, int] = {}  # bytes, by place

        def note(value: Tensor) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        looking = saved_tensors_hooks(note, lambda value: value) if self.rows == 1 else nullcontext()
        with looking:
            losses: Tensor = vmap(of_row, randomness="different")(mark, copies, dict(rows))
        if watch.otherwise:
            self.taps = {name: tap for name, tap in self.taps.items() if name not in watch.otherwise}
            return False
        asked = [*copies.values(), *(tap.leaf for tap in self.taps.values())]
        found = torch.autograd.grad(losses.sum(), asked, allow_unused=True)
        for name, gradient in zip(copies, found, strict=False):
            if gradient is not None:
                self.total[name] += gradient.to(self.total[name].dtype).square().sum(0)
        for tap in self.taps.values():
            tap.finish()
        if kept:
            own = {p.untyped_storage().data_ptr() for p in self.leaves.values()}
            self.rows = self._fitting(sum(size for place, size in kept.items() if place not in own))
        return True

    def _one_by_one(self, rows: Mapping[str, Tensor]) -> None:
        for n in range(len(next(iter(rows.values())))):
            row = {key: value[n : n + 1] for key, value in rows.items()}
            value = self.loss(functional_call(self.model, self.leaves, (), row), row)
            found = torch.autograd.grad(value, list(self.leaves.values()), allow_unused=True)
            for total, gradient in zip(self.total.values(), found, strict=True):
                if gradient is not None:
                    total += gradient.to(total.dtype).square()


class _Tap:
    """A matrix, and what went through it: inputs (rows, places, in) or token ids (rows, places), and slopes of the
    loss by the outputs (rows, places, out). A row's gradient is the sum over uses of slope^T input."""

    def __init__(self, leaf: Tensor, total: Tensor, room: int) -> None:
        self.leaf, self.total, self.room = leaf, total, room
        self.clear()

    def clear(self) -> None:
        self.uses = 0
        self.seen: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: Tensor, slope: Tensor) -> None:
        self.seen.append((inputs, slope))
        if len(self.seen) == self.uses:
            self.finish()

    def finish(self) -> None:
        """Square what was seen; called once more where some use has no part in the loss."""
        seen, self.seen = self.seen, []
        if not seen:
            return
        inputs, slope = seen[0]
        kind = self.total.dtype
        if len(seen) == 1 and slope.shape[1] == 1 and inputs.is_floating_point():
            # One place: the square of the product is the product of the squares.
            self.total.addmm_(slope[:, 0].to(kind).square().T, inputs[:, 0].to(kind).square())
            return
        if len(seen) == 1 and inputs.is_floating_point() and self.total.device.type == "cpu":
            room = torch.empty_like(self.leaf, requires_grad=False)  # one for all rows, which stays near the cores
            for x, s in zip(inputs, slope, strict=True):
                gradient = torch.mm(s.T, x, out=room).to(kind)
                self.total.addcmul_(gradient, gradient)
            return
        step = max(1, min(BLOCK, self.room) // self.total.nbytes)
        for start in range(0, len(slope), step):
            part = slice(start, start + step)
            gradient = self._gradient(inputs[part], slope[part])
            for more, by in seen[1:]:
                gradient += self._gradient(more[part], by[part])
            self.total += gradient.to(kind).square_().sum(0)

    def _gradient(self, inputs: Tensor, slope: Tensor) -> Tensor:
        """Each row's gradient (rows, out, in)."""
        if inputs.is_floating_point():
            return slope.mT @ inputs
        rows, (words, width) = len(inputs), self.leaf.shape
        place = inputs + words * torch.arange(rows, device=inputs.device)[:, None]
        flat = slope.new_zeros(rows * words, width).index_add_(0, place.flatten(), slope.flatten(0, 1))
        return flat.view(rows, words, width)


class _Watch(TorchFunctionMode):
    """Puts taps into linear maps and embeddings, and notes which matrices are used in another way."""

    mark: Tensor  # one number per row, so that each use is seen with its rows, whatever its input depends on

    def __init__(self, taps: Mapping[str, _Tap]) -> None:
        super().__init__()
        self.taps = {id(tap.leaf): (name, tap) for name, tap in taps.items()}
        self.otherwise: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else None
        if id(weight) in self.taps and func is F.linear:
            out = self._tapped(args[0], weight, None)
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return out if bias is None else out + bias
        # An embedding hands on its options by name; with these two its gradient is another.
        options = (kwargs.get("max_norm"), kwargs.get("scale_grad_by_freq"))
        if id(weight) in self.taps and func is F.embedding and not any(options):
            return self._tapped(args[0], weight, kwargs.get("padding_idx"))
        if func is F.scaled_dot_product_attention and len(args) == 3 and _four(*args, kwargs.get("attn_mask")):
            return _Attention.apply(self.mark, *args, kwargs)
        out = func(*args, **kwargs)
        if _holds_tensor(out):  # sizes and kinds may be asked for
            for used in _flat((*args, *kwargs.values())):
                if id(used) in self.taps:
                    self.otherwise.add(self.taps[id(used)][0])
        return out

    def _tapped(self, inputs: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        tap = self.taps[id(weight)][1]
        tap.uses += 1
        return _Use.apply(inputs, weight, self.mark, tap, padding)


class _Use(torch.autograd.Function):
    """A linear map, or rows of a table; what would be the weight's gradient goes to a tap, row by row."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, mark: Tensor, tap: _Tap, padding: int | None) -> Tensor:
        return F.linear(inputs, weight) if inputs.is_floating_point() else F.embedding(inputs, weight, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        given, weight, _, ctx.tap, ctx.padding = inputs
        ctx.save_for_backward(given, weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        given, weight = ctx.saved_tensors
        rows = len(slope)
        if given.is_floating_point():
            ctx.tap.add(given.reshape(rows, -1, given.shape[-1]), slope.reshape(rows, -1, slope.shape[-1]))
            return slope @ weight if ctx.needs_input_grad[0] else None, None, None, None, None
        ids, flat = given.reshape(rows, -1), slope.reshape(rows, -1, slope.shape[-1])
        if ctx.padding is not None:
            flat = flat.masked_fill((ids == ctx.padding)[..., None], 0)
        ctx.tap.add(ids, flat)
        return None, None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, given: Tensor, weight: Tensor, mark: Tensor, tap: _Tap, padding: int | None) -> Any:
        return _Use.apply(_rows(given, dims[0], info.batch_size), weight, mark, tap, padding), 0


class _Attention(torch.autograd.Function):
    """Attention of all rows in one call, which ``vmap`` alone would make of one row after the other."""

    @staticmethod
    def forward(mark: Tensor, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        raise NotImplementedError("only of rows that are vectorised")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        raise NotImplementedError("only of rows that are vectorised")

    @staticmethod
    def vmap(info: Any, dims: Any, mark: Tensor, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        together = (_rows(t, dim, info.batch_size).flatten(0, 1) for t, dim in zip((q, k, v), dims[1:4], strict=True))
        mask = options.get("attn_mask")
        if mask is not None:
            mask = _rows(mask, dims[4]["attn_mask"], info.batch_size).flatten(0, 1)
        out = F.scaled_dot_product_attention(*together, **{**options, "attn_mask": mask})
        return out.unflatten(0, (info.batch_size, -1)), 0


def _rows(value: Tensor, dim: int | None, count: int) -> Tensor:
    """With the rows that are vectorised in front, also where the value is the same for all."""
    return value.expand(count, *value.shape) if dim is None else value.movedim(dim, 0)


def _four(*values: Tensor | None) -> bool:
    return all(value is None or value.ndim == 4 for value in values)


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(each, Tensor) for each in _flat((value,)))

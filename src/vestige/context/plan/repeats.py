"""Heads that copy, found on random tokens that come several times over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vestige.context.plan.distil import hold_still
from vestige.context.plan.windows import fingerprint, table
from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError
from vestige.layers.ops.attention_mass import capped

if TYPE_CHECKING:
    from vestige.context.plan.razor_attention import RazorAttention

__all__ = ["find_heads"]

BLOCK_BYTES = 64 * 2**20  # one block of attention weights in float32
LEAST = 8  # tokens of a period: over fewer, a head that looks anywhere looks at a repeat
PERIOD = 256


@torch.no_grad()
def find_heads(
    method: RazorAttention,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    period: int | None = None,
    repeats: int = 4,
    texts: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RazorAttention:
    """Measure how much each head looks at a token's repeats, and at what followed them.

    A text is a start token (where the model has one) and ``period`` random tokens ``repeats`` times over. For a token
    of the second and later repeats, *echo* is its attention on the same token of all earlier repeats together, and
    *induction* that on the tokens that followed those. A head's score is the mean over the tokens; a key-value head's
    the highest of its query heads.

    Args:
        period: random tokens (the paper: 2500); by default 256, or fewer if the model does not read as many.
        texts: how many texts the scores are averaged over.
        progress: called with the number of texts read, and of all.

    Raises:
        SpecError: fewer than two repeats, or no text.
        InputError: a text too short to tell heads apart, or too long for the model.
        UnsupportedModelError: the model is no causal decoder that Vestige knows.
    """
    anatomy = Anatomy.of(model)
    anatomy.need_causal(method.name)
    if repeats < 2 or texts < 1:
        raise SpecError(f"{method.name}: 'repeats' is {repeats!r}, 'texts' is {texts!r}; allowed: >= 2 and >= 1")
    if period is None:
        period = min(PERIOD, (anatomy.max_positions - 1) // repeats)
    if period < LEAST:
        raise InputError(f"{method.name}: a period of {period} tokens is too short; at least {LEAST} are needed")
    if 1 + period * repeats > anatomy.max_positions:
        raise InputError(
            f"{method.name}: {repeats} times {period} tokens is too long: the model reads {anatomy.max_positions}"
        )
    words, start = _vocabulary(anatomy, tokenizer)
    draw = torch.Generator().manual_seed(seed)
    looking = _Looking(anatomy, period, skip=len(start))
    device = next(anatomy.base.parameters()).device
    with Patch(model, f"{method.name} fit", claims={"kv-cache"}) as patch:
        hold_still(patch, anatomy)
        patch.attention("vestige-repeats", looking, part=anatomy.base)
        for text in range(texts):
            drawn = words[torch.randint(len(words), (period,), generator=draw)]
            ids = torch.cat([torch.tensor(start, dtype=torch.long), drawn.repeat(repeats)])
            anatomy.base(input_ids=ids[None].to(device), use_cache=False)
            if progress is not None:
                progress(text + 1, texts)
    found = {name: table(total / texts) for name, total in (("echo", looking.echo), ("induction", looking.induction))}
    return method.replace(**found, fitted_on=fingerprint(anatomy))


class _Looking:
    """Attention as it is, which adds up what each key-value head gives to the repeats of a token."""

    def __init__(self, anatomy: Anatomy, period: int, skip: int) -> None:
        self.period, self.skip = period, skip
        exact = torch.promote_types(anatomy.base.dtype, torch.float32)
        self.echo = torch.zeros(anatomy.num_layers, anatomy.num_kv_heads, dtype=exact)
        self.induction = torch.zeros_like(self.echo)

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
        heads, count = query.shape[1:3]
        group = heads // key.shape[1]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys, values = key[0].repeat_interleave(group, dim=0), value[0].repeat_interleave(group, dim=0)
        place = torch.arange(count, device=query.device)
        outputs, echo, induction = [], 0.0, 0.0
        block = max(1, BLOCK_BYTES // (4 * heads * count))
        for rows in place.split(block):
            logits = capped((query[0, :, rows] @ keys.transpose(1, 2)).to(self.echo.dtype) * scaling, softcap)
            age = rows[:, None] - place
            unseen = (age < 0) if sliding_window is None else (age < 0) | (age >= sliding_window)
            share = logits.masked_fill_(unseen, float("-inf")).softmax(dim=-1)
            outputs.append(share.to(values.dtype) @ values)
            echo, induction = echo + self._repeats(share, rows, 0), induction + self._repeats(share, rows, 1)
        asked = count - self.skip - self.period
        layer: int = module.layer_idx  # type: ignore[assignment]
        for total, found in ((self.echo, echo), (self.induction, induction)):
            by_head = (found / asked).view(-1, group).amax(dim=1)  # type: ignore[union-attr]
            total[layer] += by_head.to(total)
        return torch.cat(outputs, dim=1).transpose(0, 1)[None].contiguous(), None

    def _repeats(self, share: Tensor, rows: Tensor, after: int) -> Tensor:
        """Attention of each head's later tokens, ``(heads,)``, on what stands ``after`` each earlier repeat of them."""
        total = share.new_zeros(share.shape[0])
        for back in range(self.period, share.shape[2], self.period):
            column = rows - back + after
            there = (rows - back >= self.skip).nonzero().flatten()
            total += share[:, there, column[there]].sum(dim=1)
        return total


def _vocabulary(anatomy: Anatomy, tokenizer: Any) -> tuple[Tensor, list[int]]:
    """Tokens to draw from, none of them special, and what a text begins with."""
    config = anatomy.config
    first = getattr(config, "bos_token_id", None)
    special = {first}
    for name in ("eos_token_id", "pad_token_id"):
        found = getattr(config, name, None)
        special |= set(found) if isinstance(found, list | tuple) else {found}
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        first = tokenizer.bos_token_id
    size = anatomy.vocab_size or 0
    words = torch.tensor([token for token in range(size) if token not in special])
    return words, [] if first is None else [first]

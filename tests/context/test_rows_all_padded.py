"""A batch in which every row is padded, as ``padding="max_length"`` makes it: slots stand empty from the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vestige
from vestige.errors import InputError

METHODS = ["a2sf", "h2o", "streaming-llm"]


@pytest.mark.parametrize("name", METHODS)
def test_decoding_goes_on_as_without_padding(llama: Any, name: str) -> None:
    rows = [torch.arange(3, 9), torch.arange(40, 44)]
    width = 10
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with vestige.method(name, budget=12).attach(llama) as kept:  # type: ignore[attr-defined]
        together = llama.generate(ids, attention_mask=mask, **options)[:, width:]
        assert (kept.positions(0) >= 0).sum(dim=-1).max() <= 12
        for row, found in zip(rows, together, strict=True):
            alone = llama.generate(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **options)
            assert torch.equal(alone[0, len(row) :], found)


def test_padding_that_no_mask_speaks_of_is_refused_before_any_work(llama: Any) -> None:
    pad = llama.config.pad_token_id
    ids = torch.arange(3, 23).view(2, 10)
    left, right = ids.clone(), ids.clone()
    left[1, :4] = right[1, 7:] = pad
    with vestige.method("h2o", budget=8).attach(llama) as kept:  # type: ignore[attr-defined]
        for padded in (left, right):
            with pytest.raises(InputError, match=r"row 1 .* attention_mask"):
                llama(padded)
            assert kept.cache is None
            llama(padded, attention_mask=(padded != pad).long())
            kept.cache = None
        llama(ids)
        llama(left[1:])  # alone, it may be a text like any other

"""A batch in which every row is padded, as ``padding="max_length"`` makes it: slots stand empty from the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vestige

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

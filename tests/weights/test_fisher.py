"""The diagonal of the Fisher information, against gradients of one row after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vestige.errors import InputError
from vestige.weights import fisher
from vestige.weights.fisher import diagonal

WORDS, DIM, PAD = 7, 6, 0


class Mixed(nn.Module):
    """Weights in every use that there is: tied, twice, transposed, at one place, on what is the same for all rows."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.branches = branches
        self.words = nn.Embedding(WORDS, DIM, padding_idx=PAD)
        self.places = nn.Embedding(5, DIM)
        self.mark = nn.Parameter(torch.randn(1, DIM))
        self.norm = nn.LayerNorm(DIM)
        self.twice = nn.Linear(DIM, DIM)
        self.turned = nn.Linear(DIM, DIM, bias=False)
        self.unused = nn.Linear(DIM, DIM)
        self.answer = nn.Linear(DIM, 3)

    def forward(self, input_ids, labels):
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])) + self.mark
        x = x + self.twice(F.gelu(self.twice(self.norm(x))))
        x = x + x @ self.turned.weight.T
        if self.branches and bool(x[0, 0, 0] > 0):  # which cannot be vectorised
            x = x * 2
        back = F.linear(x, self.words.weight)  # the table is the output layer too
        return self.answer(x[:, -1]), back


def loss(outputs, batch):
    asked, back = outputs
    words = F.cross_entropy(back.flatten(0, 1), batch["input_ids"].flatten())
    return F.cross_entropy(asked, batch["labels"]) + words


def batches():
    draw = torch.Generator().manual_seed(0)
    for rows in (4, 3):
        ids = torch.randint(0, WORDS, (rows, 5), generator=draw)  # words come twice in a row
        yield {"input_ids": ids, "labels": torch.randint(0, 3, (rows,), generator=draw)}


def one_by_one(model):
    weights = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for batch in batches():
        for n in range(len(batch["labels"])):
            row = {key: value[n : n + 1] for key, value in batch.items()}
            found = torch.autograd.grad(loss(model(**row), row), list(weights.values()), allow_unused=True)
            for value, gradient in zip(total.values(), found, strict=True):
                value += 0 if gradient is None else gradient**2 / 7
    return total


@pytest.mark.parametrize("block", [fisher.BLOCK, 1], ids=["several rows", "one row"])
@pytest.mark.parametrize("branches", [False, True], ids=["vectorised", "not vectorised"])
def test_every_use_of_a_weight_is_counted(monkeypatch, block, branches):
    monkeypatch.setattr(fisher, "BLOCK", block)
    torch.manual_seed(0)
    model = Mixed(branches).double().eval()
    with torch.no_grad():  # as callers may have it
        found = diagonal(model, batches(), loss, dict(model.named_parameters()), chunk=3)
    due = one_by_one(model)
    assert due["words.weight"].abs().max() > 0 and due["twice.weight"].abs().max() > 0
    for name, value in due.items():
        assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-14), name
        assert found[name].dtype == torch.float64 and not found[name].requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_only_the_weights_that_are_asked_for():
    torch.manual_seed(0)
    model = Mixed().double().eval()
    chosen = {"answer.weight": model.answer.weight}
    assert torch.allclose(diagonal(model, batches(), loss, chosen)["answer.weight"], one_by_one(model)["answer.weight"])


def test_weights_in_sixteen_bits_are_counted_in_more():
    torch.manual_seed(0)
    model = Mixed().bfloat16().eval()
    found = diagonal(model, batches(), loss, dict(model.named_parameters()))
    due = one_by_one(model.float())
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, due[name], rtol=0.2, atol=0.05 * float(due[name].max()) + 1e-12), name


def test_rows_that_are_looked_at_together_fit_into_the_room(monkeypatch):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 50))  # a matrix that is not a linear map's
            self.answer = nn.Linear(50, 10)

        def forward(self, x, labels):
            return self.answer(x * self.table.sum(0))

    model = Table()
    rows = {"x": torch.randn(12, 50), "labels": torch.arange(12) % 3}
    work = fisher._Squares(model, lambda out, row: F.cross_entropy(out, row["labels"]), dict(model.named_parameters()))
    assert not work.add(rows), "the table was taken for a linear map's"
    assert list(work.taps) == ["answer.weight"] and sorted(work.others) == ["answer.bias", "table"]
    assert work.rows == 1
    monkeypatch.setattr(fisher, "LEAST_ROOM", 0)
    assert work.add({key: value[:1] for key, value in rows.items()})
    # What one row took: its copies three times, and what was kept of it for the backward pass.
    copies = sum(work.leaves[name].nbytes for name in work.others)
    assert work.rows <= max(1, fisher.HOST_ROOM * sum(p.nbytes for p in model.parameters()) / (3 * copies))
    monkeypatch.setattr(fisher, "LEAST_ROOM", 1 << 30)
    work.rows = 1
    assert work.add({key: value[:1] for key, value in rows.items()})
    assert work.rows > 1000


def test_no_rows_is_an_error():
    with pytest.raises(InputError, match="needs rows"):
        diagonal(Mixed(), [], loss, {})

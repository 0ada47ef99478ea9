"""Tasks to train on: what is due is what a slow reading of the row says, and a small model learns from them."""

from __future__ import annotations

import itertools

import pytest
import torch

import vestige
from vestige.errors import SpecError
from vestige.evidence.tasks.recall import PairRecall
from vestige.evidence.tasks.registry import registry
from vestige.evidence.tasks.task import IGNORE, TrainingTask

TRAINING = [card.name for card in vestige.tasks() if issubclass(registry.load(card.name), TrainingTask)]
CASES = [
    *((name, {}) for name in TRAINING),
    ("mqar", {"length": 9, "pairs": 3, "keys": 3, "values": 2, "skew": 0.0}),
    ("last-write-wins", {"length": 40, "pairs": 2, "writes": 15, "keys": 3, "values": 5}),
    ("last-write-wins", {"length": 12, "pairs": 4, "writes": 4, "keys": 4}),
    ("selective-copying", {"length": 6, "items": 3, "symbols": 2}),
    *(("state-tracking", {"group": group, "length": length}) for group in ("S3", "S4", "S5") for length in (1, 7, 8)),
]


def draw(task, rows=20, seed=0):
    return task.draw(rows, torch.Generator().manual_seed(seed))


def read_slowly(task, row):
    """What is due after each token, worked out by reading one token after the other."""
    due, memory = [], {}
    if task.name == "state-tracking":
        size = {"parity": 2, "S3": 3, "S4": 4, "S5": 5}[task.group]
        moves = list(itertools.permutations(range(size)))
        state = list(range(size))
        for token in row:
            state = [moves[token][place] for place in state]
            due.append(moves.index(tuple(state)))
        return due
    if task.name == "selective-copying":
        items = [token for token in row if token > 1]
        return [items.pop(0) if token == 1 else IGNORE for token in row]
    key = None
    begin = 2 * task.pairs if task.name == "mqar" else task.length - task.pairs
    for place, token in enumerate(row):
        if place >= begin:
            due.append(memory[token] if token else IGNORE)
            continue
        due.append(IGNORE)
        if token > task.keys:
            memory[key] = token
        elif token:
            key = token
    return due


@pytest.mark.parametrize(("name", "values"), CASES)
def test_what_is_due_is_what_a_slow_reading_says(name, values):
    task = vestige.task(name, **values)
    batch = draw(task)
    assert batch.tokens.shape == batch.targets.shape == (20, task.length)
    assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocabulary and batch.targets.max() < task.vocabulary
    assert batch.targets.tolist() == [read_slowly(task, row) for row in batch.tokens.tolist()]
    assert ((batch.targets != IGNORE).sum(1) > 0).all()


@pytest.mark.parametrize("name", TRAINING)
def test_rows_depend_on_the_generator_alone(name):
    task = vestige.task(name)
    assert torch.equal(draw(task).tokens, draw(task).tokens)
    assert not torch.equal(draw(task).tokens, draw(task, seed=1).tokens)


@pytest.mark.parametrize("name", TRAINING)
def test_answers_come_as_often_as_chance_says(name):
    """One who gives the same answer always is right as often as stated."""
    task = vestige.task(name)
    due = draw(task, 2000).targets
    asked = due[due != IGNORE]
    counts = torch.bincount(asked)[asked.unique()]
    assert len(counts) == round(1 / task.chance)
    assert (counts / len(asked) - task.chance).abs().max() < 4 * (task.chance / len(asked)) ** 0.5 + 1e-9


def test_questions_crowd_behind_the_pairs_as_the_skew_says():
    places = []
    for skew in (0.0, 0.99):
        due = draw(vestige.task("mqar", length=256, skew=skew), 500).targets
        places.append((due != IGNORE).float().argmax(1).float().mean())
    assert places[1] < places[0] - 3


def test_the_score_is_the_share_of_right_answers_in_any_batches():
    task = vestige.task("last-write-wins")

    def knows(tokens):
        due = torch.tensor([read_slowly(task, row) for row in tokens.tolist()])
        return torch.nn.functional.one_hot(due.clamp_min(0), task.vocabulary).float()

    def guesses(tokens):
        return torch.nn.functional.one_hot(torch.full_like(tokens, task.vocabulary - 1), task.vocabulary).float()

    assert task.score(knows, count=30).values == (1.0,) * 30
    blind = task.score(guesses, count=500, batch_size=500)
    assert blind.values == task.score(guesses, count=500, batch_size=7).values
    assert blind.interval(0.999).low < task.chance < blind.interval(0.999).high
    with pytest.raises(SpecError, match="'count' is 0"):
        task.score(knows, count=0)


def test_a_small_model_learns_from_it():
    from vestige.models.config import VestigeConfig
    from vestige.models.lm import VestigeLM

    task = vestige.task("last-write-wins", length=13, pairs=1, writes=6, keys=1, values=4)
    torch.manual_seed(0)
    config = VestigeConfig(blocks="softmax", hidden_size=32, vocab_size=task.vocabulary, num_attention_heads=2)
    model, generator = VestigeLM(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        batch = task.draw(16, generator)
        loss = task.loss(model(batch.tokens).logits, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.score(model.eval(), count=128).interval().low > 2 * task.chance


def test_pairs_are_those_that_claims_were_measured_on():
    """Layer claims draw their rows here: what they saw must not change."""
    pairs = PairRecall(pairs=2, rewritten=1, keys=4, values=4, noise=1).draw(2, torch.Generator().manual_seed(0))
    assert pairs.key.tolist() == [[2, -1, 3, 2, 2], [0, 2, -1, 0, 0]] and pairs.answer.tolist() == [2, 0]
    assert pairs.value.tolist() == [[0, -1, 3, 2, -1], [0, 0, -1, 0, -1]]


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("mqar", {"pairs": 65}, "mqar: parameter 'pairs' is 65; allowed: 1 to 'keys', 64"),
        ("mqar", {"length": 20}, "mqar: parameter 'length' is 20; allowed: int >= 24 here"),
        ("last-write-wins", {"writes": 3}, "'writes' is 3; allowed: int >= 'pairs', 4"),
        ("last-write-wins", {"length": 30}, "'length' is 30; allowed: int >= 36 here"),
        ("selective-copying", {"length": 15}, "'length' is 15; allowed: int >= 16 here"),
        ("state-tracking", {"group": "S6"}, "'group' is 'S6'; allowed: 'parity'"),
    ],
)
def test_wrong_values_are_named(name, values, text):
    with pytest.raises(SpecError, match=text):
        vestige.task(name, **values)

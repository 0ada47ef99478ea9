"""A small trained model recalls pairs, and whatever is done with its state between telling and asking.

The model is one of those that ``benchmarks/layers/quality.py recall`` trains; its card says how.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from vestige.evidence.tasks.task import IGNORE, TrainingTask
from vestige.models.lm import VestigeLM
from vestige.models.state import VestigeState

FOLDER = Path(__file__).parent.parent / "data" / "recall-model"
ROWS, DUE = 16, 0.9  # of rows with eight pairs


@pytest.fixture(scope="module")
def model():
    return VestigeLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def task():
    card = yaml.safe_load((FOLDER / "README.md").read_text(encoding="utf-8").split("---")[1])
    return TrainingTask.from_spec(card["task"]).replace(pairs=8, length=32)  # four tokens for each, as it learnt them


@pytest.fixture(scope="module")
def rows(task):
    return task.draw(ROWS, torch.Generator().manual_seed(2**32 + 77))


@pytest.fixture
def told(model, task, rows):
    """The state after the pairs of each row were read, and no question yet."""
    state = model.new_state()
    with torch.no_grad():
        model(rows.tokens[:, : 2 * task.pairs], past_key_values=state)
    return state


@torch.no_grad()
def recalled(model, task, rows, state):
    """The share of right answers to the questions, from a state."""
    said = model(rows.tokens[:, 2 * task.pairs :], past_key_values=state).logits.argmax(-1)
    due = rows.targets[:, 2 * task.pairs :]
    return float((said == due)[due != IGNORE].float().mean())


def test_it_recalls(model, task):
    assert task.score(model, seed=2**32 + 78, count=64).value >= DUE > 10 * task.chance


def test_the_state_holds_the_pairs(model, task, rows, told):
    assert recalled(model, task, rows, told) >= DUE


def test_without_the_state_nothing_is_recalled(model, task, rows):
    assert recalled(model, task, rows, model.new_state()) < 0.2


def test_a_saved_state_holds_the_pairs(model, task, rows, told, tmp_path):
    told.save(tmp_path / "told.safetensors")
    read = VestigeState.load(tmp_path / "told.safetensors", model.config)
    assert read.nbytes == told.nbytes
    assert recalled(model, task, rows, read) >= DUE


def test_a_branch_holds_the_pairs_whatever_the_other_reads(model, task, rows, told):
    branch = told.fork()
    other = task.draw(ROWS, torch.Generator().manual_seed(5))
    with torch.no_grad():
        model(other.tokens, past_key_values=told)
    assert recalled(model, task, rows, branch) >= DUE


def test_one_token_at_a_time_as_many_are_recalled(model, task, rows, told):
    branch, due = told.fork(), rows.targets[:, 2 * task.pairs :]
    with torch.no_grad():
        steps = [
            model(token, past_key_values=branch).logits.argmax(-1)
            for token in rows.tokens[:, 2 * task.pairs :].split(1, dim=1)
        ]
    one_by_one = float((torch.cat(steps, 1) == due)[due != IGNORE].float().mean())
    assert one_by_one == pytest.approx(recalled(model, task, rows, told), abs=0.01)


def test_rows_are_told_apart(model, task, rows, told):
    """Questions of one row on the state of another are answered no better than by luck."""
    moved = told.map(lambda tensor: tensor.roll(1, 0))
    assert recalled(model, task, rows, moved) < 0.2

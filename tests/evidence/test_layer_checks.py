"""The checks of mixers fail where they should: each is shown a layer with the fault that it looks for."""

from __future__ import annotations

import pytest
import torch

import vestige
from vestige.core.registry import registry
from vestige.evidence.certify import NotApplicable, build_case, checks_of
from vestige.evidence.certify.mixing import forms, taught
from vestige.evidence.certify.suite import CheckFailed
from vestige.evidence.tasks.recall import NOTHING, PairRecall
from vestige.layers import parts, state
from vestige.layers.channels.swiglu import GatedLayer
from vestige.layers.layout import Layout
from vestige.layers.mixers import delta_net
from vestige.layers.mixers.gated_delta_net import GatedDeltaNetLayer
from vestige.layers.mixers.recurrent import LinearLayer
from vestige.layers.mixers.softmax import SoftmaxLayer
from vestige.layers.ops import recurrence


def run(name: str, check: str):
    """Run one check of a method, by the words of its name."""
    cls = registry.load(name)
    found = [c for c in checks_of(cls) if c.name == check]
    assert len(found) == 1, [c.name for c in checks_of(cls)]
    return found[0].run(build_case(name))


def decays_too_fast(monkeypatch):
    project = GatedDeltaNetLayer.project

    def faster(self, x, layout, memory):
        drive = project(self, x, layout, memory)
        return recurrence.Drive(drive.q, drive.k, drive.v, 1.01 * drive.decay, drive.beta, drive.scale)

    monkeypatch.setattr(GatedDeltaNetLayer, "project", faster)


def loses_a_gradient(monkeypatch):
    finish = GatedDeltaNetLayer.finish
    monkeypatch.setattr(GatedDeltaNetLayer, "finish", lambda self, read, x: finish(self, read, x.detach()))


def looks_ahead(monkeypatch):
    scores = recurrence.decayed_scores
    monkeypatch.setattr(recurrence, "decayed_scores", lambda q, k, b: scores(q, k, b) + 1e-3)


def sees_padding(monkeypatch):
    monkeypatch.setattr(Layout, "blank", lambda self, tensor, value=0.0: tensor)
    monkeypatch.setattr(recurrence.Drive, "blanked", lambda self, valid: self)


def convolves_over_edges(monkeypatch):
    monkeypatch.setattr(parts.ShortConvolution, "_age", lambda self, starts: torch.full(starts.shape, 99))


def carries_over_edges(monkeypatch):
    run = recurrence.chunked
    monkeypatch.setattr(
        recurrence, "chunked", lambda drive, state, starts=None, chunk=64: run(drive, state, chunk=chunk)
    )


def forgets_between_pieces(monkeypatch):
    chunked = LinearLayer.chunked

    def forgetful(self, inputs, layout, memory):
        memory.pop("S", None)
        return chunked(self, inputs, layout, memory)

    monkeypatch.setattr(LinearLayer, "chunked", forgetful)
    monkeypatch.setattr(LinearLayer, "step", forgetful)


def detaches_between_pieces(monkeypatch):
    write = state.LayerState.write
    monkeypatch.setattr(
        state.LayerState,
        "write",
        lambda self, tensors, count: write(self, {n: t.detach() for n, t in tensors.items()}, count),
    )


def holds_more_than_it_says(monkeypatch):
    write = state.LayerState.write

    def hoarding(self, tensors, count):
        write(self, tensors, count)
        self.hidden = torch.zeros(7)

    monkeypatch.setattr(state.LayerState, "write", hoarding)


def shares_with_its_fork(monkeypatch):
    def fork(self):
        twin = type(self)()
        twin.write(self.tensors, self.seen)
        return twin

    monkeypatch.setattr(state.LayerState, "fork", fork)


def grows_ever_faster(monkeypatch):
    write = state.LayerState.write

    def growing(self, tensors, count):
        extra = torch.zeros(next(iter(tensors.values())).shape[0], (self.seen + count) ** 2)
        write(self, {**tensors, "extra": extra}, count)

    monkeypatch.setattr(state.LayerState, "write", growing)


def does_not_move_its_rows(monkeypatch):
    monkeypatch.setattr(state.LayerState, "reorder_cache", lambda self, rows: None)


def rounds_its_state(monkeypatch):
    write = state.LayerState.write
    monkeypatch.setattr(
        state.LayerState,
        "write",
        lambda self, tensors, count: write(self, {n: t.half().to(t.dtype) for n, t in tensors.items()}, count),
    )


def divides_by_what_has_faded(monkeypatch):
    """The same sums, in a form that overflows."""
    monkeypatch.setattr(recurrence, "decayed_scores", lambda q, k, b: ((q * b.exp()) @ (k / b.exp()).mT).tril())


def rounds_its_keys(monkeypatch):
    half = torch.bfloat16
    unit = delta_net.unit
    monkeypatch.setattr(
        delta_net, "unit", lambda x: unit(x) if x.dtype == torch.float64 else unit(x).to(half).to(x.dtype)
    )


def remembers_nothing(monkeypatch):
    monkeypatch.setattr(LinearLayer, "chunked", lambda self, inputs, layout, memory: inputs.v * 1.0)


def has_a_constant_of_its_own(monkeypatch):
    """What is worked out when a layer is built is lost when transformers loads it."""
    build = GatedDeltaNetLayer.__init__

    def with_constant(self, mixer, place):
        build(self, mixer, place)
        self.register_buffer("factor", torch.ones(()) * 2, persistent=False)

    finish = GatedDeltaNetLayer.finish
    monkeypatch.setattr(GatedDeltaNetLayer, "__init__", with_constant)
    monkeypatch.setattr(GatedDeltaNetLayer, "finish", lambda self, read, x: self.factor * finish(self, read, x))


FAULTS = [
    ("every form is the reference", decays_too_fast),
    ("gradients are the references", loses_a_gradient),
    ("nothing looks ahead", looks_ahead),
    ("left padded rows are as alone", sees_padding),
    ("packed sequences are as alone", convolves_over_edges),
    ("packed sequences are as alone", carries_over_edges),
    ("in pieces as in one", forgets_between_pieces),
    ("gradients cross the pieces", detaches_between_pieces),
    ("the state takes what it says", holds_more_than_it_says),
    ("the state takes what it says", shares_with_its_fork),
    ("the state grows as told", grows_ever_faster),
    ("rows of a state can be moved", does_not_move_its_rows),
    ("a model reads in pieces as in one", rounds_its_state),
    ("generation is the same every way", forgets_between_pieces),
    ("large inputs stay finite", divides_by_what_has_faded),
    ("lower precision is close", rounds_its_keys),
    ("what was said is remembered", remembers_nothing),
    ("saved and loaded it is the same", has_a_constant_of_its_own),
]


@pytest.fixture(autouse=True)
def fresh_trainings():
    taught.cache_clear()
    yield
    taught.cache_clear()


@pytest.mark.parametrize(("check", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_is_seen(monkeypatch, check, fault):
    fault(monkeypatch)
    with pytest.raises(CheckFailed):
        run("gated-delta-net", check)


def test_a_mask_that_is_not_looked_at_is_seen(monkeypatch):
    forward = SoftmaxLayer.forward

    def blind(self, x, layout, state=None):
        layout.mask = None
        return forward(self, x, layout, state)

    monkeypatch.setattr(SoftmaxLayer, "forward", blind)
    with pytest.raises(CheckFailed):
        run("softmax", "left padded rows are as alone")


def test_a_gradient_that_is_no_slope_is_seen(monkeypatch):
    forward = GatedLayer.forward
    monkeypatch.setattr(GatedLayer, "forward", lambda self, x: forward(self, x) + x.detach())
    with pytest.raises(CheckFailed):
        run("swiglu", "gradients are slopes")


def test_a_channel_mixer_that_looks_at_others_is_seen(monkeypatch):
    forward = GatedLayer.forward
    monkeypatch.setattr(GatedLayer, "forward", lambda self, x: forward(self, x) + 1e-3 * x.mean(1, keepdim=True))
    with pytest.raises(CheckFailed):
        run("swiglu", "each token is on its own")


def test_a_linear_channel_mixer_is_seen(monkeypatch):
    monkeypatch.setattr(GatedLayer, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    with pytest.raises(CheckFailed):
        run("swiglu", "what a linear map cannot do is learnt")


def test_undo_is_declared():
    with pytest.raises(NotApplicable):
        run("softmax", "declared")


def test_forms_vary_each_choice():
    method = vestige.method("softmax")
    assert {(m.positions, m.qk_norm) for m in forms(method)} == {("rotary", False), ("none", False), ("rotary", True)}


@pytest.mark.parametrize("task", [PairRecall(), PairRecall(pairs=5, rewritten=3, noise=4), PairRecall(pairs=6, void=4)])
def test_answers_of_the_recall_task(task):
    """The last value said of the key asked for, unless it is void."""
    rows = task.draw(300, torch.Generator().manual_seed(0))
    assert rows.key.shape == rows.value.shape == (300, task.length)
    for key, value, answer in zip(rows.key.tolist(), rows.value.tolist(), rows.answer.tolist(), strict=True):
        said = {}
        for k, v in zip(key[:-1], value[:-1], strict=True):
            if k == task.keys:
                said = {}
            elif k != NOTHING:
                said[k] = v
        assert said.get(key[-1], task.values) == answer
        assert value[-1] == NOTHING
    if task.void:
        assert 0.4 < float((rows.answer == task.values).float().mean()) < 0.6
    again = task.draw(300, torch.Generator().manual_seed(0))
    assert torch.equal(rows.key, again.key) and torch.equal(rows.value, again.value)


@pytest.mark.parametrize("wrong", [{"pairs": 9}, {"rewritten": 5}, {"void": 4}, {"values": 1}, {"noise": -1}])
def test_a_task_that_cannot_be_is_refused(wrong):
    with pytest.raises(vestige.errors.SpecError, match=next(iter(wrong))):
        PairRecall(**wrong)

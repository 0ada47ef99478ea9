"""Captured steps give what plain ones give. Without a CUDA device a step is run again instead of a graph of it."""

import copy
from types import SimpleNamespace

import pytest
import torch

from vestige.core import capture
from vestige.models import VestigeConfig, VestigeLM, replay

BLOCKS = "gated-delta-net sliding-window(window=4) titans(refresh=4) aaren mamba2(head_dim=8)"


@pytest.fixture
def runs(monkeypatch):
    """Counts captures, on any device; tests/gpu has the graphs themselves."""
    captures, replays = [], []

    def captured(run, device):
        captures.append(run)

        def again():
            replays.append(run)
            run()

        return SimpleNamespace(replay=again)

    monkeypatch.setattr(capture, "captured", captured)
    monkeypatch.setattr(capture, "waits", lambda run: False)
    monkeypatch.setattr(replay, "_on_cuda", lambda tensor: True)
    return captures, replays


def make(blocks=BLOCKS):
    torch.manual_seed(0)
    config = VestigeConfig(blocks=blocks, hidden_size=16, num_attention_heads=2, vocab_size=50, pad_token_id=0)
    return VestigeLM(config).eval()


@torch.no_grad()
def decoded(model, state, tokens):
    return torch.cat([model(token[:, None], past_key_values=state).logits for token in tokens.unbind(1)], 1)


def test_generation_is_the_same_with_padding_and_beams(runs):
    model, prompt = make(), torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    for more in ({"do_sample": False}, {"num_beams": 3}):
        given = {"attention_mask": mask, "max_new_tokens": 8, **more}
        due = model.replay_steps(False).generate(prompt, **given)
        assert torch.equal(model.replay_steps().generate(prompt, **given), due)
    captures, replays = runs
    assert len(captures) == 2  # for two rows, and for the beams of both
    assert len(replays) > 8


def test_states_take_turns_and_forks_stand_still(runs):
    model, tokens = make(), torch.randint(1, 50, (2, 12))
    states = []
    for row in range(2):
        states.append(model.new_state())
        model(tokens[row : row + 1, :6], past_key_values=states[-1])
    due = [decoded(model, states[row].fork(), tokens[row : row + 1, 6:]) for row in range(2)]
    model.replay_steps()
    found = [[], []]
    for at in range(6, 12):
        for row, state in enumerate(states):
            found[row].append(decoded(model, state, tokens[row : row + 1, at : at + 1]))
            if at == 9:
                twin = state.fork()
                before = [t.clone() for layer in twin.layers for t in layer.tensors.values()]
    assert runs[1]
    for row in range(2):
        assert torch.allclose(torch.cat(found[row], 1), due[row], atol=1e-6)
        assert states[row].seen == 12
    assert all(map(torch.equal, before, [t for layer in twin.layers for t in layer.tensors.values()]))
    again = copy.deepcopy(model)  # has captured nothing: its weights are others
    with torch.no_grad():
        again.lm_head.weight.add_(1)
    assert not torch.allclose(decoded(again, twin, tokens[:1, 10:11]), found[1][4])


def test_what_grows_runs_as_before(runs):
    prompt = torch.randint(1, 50, (1, 5))
    due = make("gla softmax").generate(prompt, max_new_tokens=5)
    assert torch.equal(make("gla softmax").replay_steps().generate(prompt, max_new_tokens=5), due)
    assert not runs[0]


def test_gradients_are_never_replayed_and_new_weights_are_seen(runs):
    model, prompt = make("gla").replay_steps(), torch.randint(1, 50, (1, 5))
    state = model.new_state()
    model(prompt, past_key_values=state)
    for _ in range(3):
        assert model(prompt[:, :1], past_key_values=state).logits.requires_grad
    assert not runs[0]
    start = state.fork().detach()
    decoded(model, start.fork(), prompt)
    assert len(runs[0]) == 1
    model.lm_head.weight.data = torch.randn_like(model.lm_head.weight)
    found = decoded(model, start.fork(), prompt)
    assert len(runs[0]) == 2
    assert torch.equal(found, decoded(model.replay_steps(False), start, prompt))

"""Training steps that are captured as a CUDA graph and replayed."""

import itertools

import pytest
import torch

from vestige.evidence.descent import Descent, descend_together
from vestige.evidence.tasks.mqar import MQAR
from vestige.models import VestigeConfig, VestigeLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TASKS = [MQAR(length=10 * pairs, pairs=pairs, keys=8, values=8) for pairs in (4, 2)]
STEPS = 12


def descent(mixer: str, capture: bool) -> Descent:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    model = VestigeLM(VestigeConfig(blocks=["mamba2(state=1)", mixer], vocab_size=TASKS[0].vocabulary, **sizes)).cuda()

    turns = itertools.cycle(TASKS)

    def draw(chance):
        batch = next(turns).draw(16, chance)
        return batch.tokens, batch.targets

    def loss(tokens, targets):
        return TASKS[0].loss(model(tokens).logits, targets)

    return Descent(model.train(), draw, loss, steps=STEPS, rate=1e-3, seed=3, capture=capture)


@pytest.mark.parametrize(
    "mixer",
    ["softmax", "gla", "gated-delta-net", "local-linear-attention", "sliding-window(window=16)", "titans", "yaad"],
)
def test_replayed_steps_are_those_of_python(mixer):
    plain, replayed, beside = (descent(mixer, capture) for capture in (False, True, True))
    losses = descend_together([plain, replayed, beside])
    assert len(replayed.replays) == len(beside.replays) == len(TASKS) and not plain.captured
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=2e-3)


def test_one_that_goes_on_does_what_the_other_would_have_done():
    whole, first, second = (descent("gla", True) for _ in range(3))
    losses = descend_together([whole])[0]
    for _ in range(STEPS // 2):
        first.step()
    second.go_on(first.tensors())
    assert second.done == STEPS // 2
    assert descend_together([second])[0] == pytest.approx(losses, rel=2e-3)
    assert second.captured

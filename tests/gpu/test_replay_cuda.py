"""Steps of every mixer replayed from a CUDA graph, against plain ones."""

import pytest
import torch

from vestige.layers.footprint import footprint
from vestige.layers.mixers.base import Mixer
from vestige.layers.place import Place
from vestige.models import VestigeConfig, VestigeLM
from vestige.models.blocks import names_of, parse_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def grows(name):
    mixer = parse_blocks(name)[0][0].mixer
    return footprint(mixer, Place(hidden_size=64, heads=4), tokens=260, further=64).per_token > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", names_of(Mixer))
def test_replayed_steps_are_plain_steps(name, dtype):
    torch.manual_seed(0)
    model = VestigeLM(VestigeConfig(blocks=[name] * 2, hidden_size=128, num_attention_heads=4, vocab_size=90))
    model = model.to("cuda", dtype).eval()
    tokens = torch.randint(1, 90, (2, 300), device="cuda")
    start = model.new_state()
    with torch.inference_mode():
        model(tokens[:, :260], past_key_values=start)
        logits = {}
        for on in (False, True):
            model.replay_steps(on)
            state = start.fork()
            steps = [model(token[:, None], past_key_values=state).logits for token in tokens[:, 260:].unbind(1)]
            logits[on] = torch.cat(steps, 1).float()
    captured = [step for step in model._replay._steps.values() if step is not None]
    assert bool(captured) != grows(name)
    off = (logits[True] - logits[False]).norm() / logits[False].norm()
    assert off < (1e-4 if dtype == torch.float32 else 0.03)


def test_generation_with_padding_and_beams_is_the_same():
    torch.manual_seed(0)
    blocks = "gated-delta-net sliding-window(window=8) titans aaren"
    model = VestigeLM(
        VestigeConfig(blocks=blocks, hidden_size=64, num_attention_heads=4, vocab_size=90, pad_token_id=0)
    )
    model = model.cuda().eval()
    prompt = torch.randint(1, 90, (3, 30), device="cuda")
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    for more in ({"do_sample": False}, {"num_beams": 3}):
        given = {"attention_mask": mask, "max_new_tokens": 30, **more}
        due = model.replay_steps(False).generate(prompt, **given)
        found = model.replay_steps().generate(prompt, **given)
        assert (found == due).float().mean() > 0.9  # a near tie may fall the other way

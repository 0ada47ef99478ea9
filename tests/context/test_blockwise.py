"""Long prompts go through the feed-forward parts in blocks."""

import pytest
import torch

import vestige
from vestige.context import blockwise


@pytest.mark.parametrize("rows, width", [(1, 8), (3, 2)])
def test_blocks_are_as_wide_as_allowed_and_change_nothing(llama64, monkeypatch, rows, width):
    model = llama64
    ids = torch.randint(1, model.config.vocab_size, (rows, 21))
    with torch.no_grad():
        whole = model(ids).logits
    widths = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].shape[1])
    )
    monkeypatch.setattr(blockwise, "TOKENS", 8)
    with vestige.method("full").attach(model):
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, whole, atol=1e-5)
        assert max(widths) == width and sum(widths) == 21
        widths.clear()
        model(ids)
        assert widths == [21], "a pass that may be learnt from is left as it is"
    hook.remove()
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_a_part_that_gives_more_than_states_reads_all_at_once():
    def experts(states):
        return 2 * states, states.sum(-1)

    states = torch.randn(2, blockwise.TOKENS, 3)
    with torch.no_grad():
        out, routing = blockwise.in_blocks(experts)(states)
    assert torch.equal(out, 2 * states) and routing.shape == (2, blockwise.TOKENS)

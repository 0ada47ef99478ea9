"""Self-contrast: what stands out is what the neglected condition adds; generation is otherwise the model's own."""

from __future__ import annotations

import math

import pytest
import torch

from vestige.context.steer.overshadowing import SelfContrast, contrast, indicator, plausible

ALPHA = 0.1


def logs(*shares):
    return torch.tensor([shares], dtype=torch.float64).log()


def test_a_token_that_the_condition_makes_likelier_wins_over_a_likelier_one():
    whole, shortened = logs(0.7, 0.25, 0.04, 0.01), logs(0.85, 0.10, 0.04, 0.01)
    scores = contrast(whole, shortened, ALPHA)[0]
    assert plausible(whole, ALPHA).tolist() == [[True, True, False, False]]
    assert scores[0].item() == pytest.approx(math.log(0.7 / 0.85))
    assert scores[1].item() == pytest.approx(math.log(0.25 / 0.10))
    assert scores[2:].tolist() == [-math.inf, -math.inf] and scores.argmax() == 1
    assert indicator(whole, shortened, ALPHA).item() == pytest.approx(math.log(0.7 / 0.85))


def test_an_escaping_token_counts_as_if_it_had_been_just_plausible():
    whole, shortened = logs(0.7, 0.3, 1e-9), logs(0.99, 1e-6, 0.01)
    scores = contrast(whole, shortened, ALPHA)[0]
    assert scores[1].item() == pytest.approx(math.log(0.3 / (ALPHA * 0.99)))
    expected = math.log(0.7 / 0.99) + math.log(0.3 / (ALPHA * 0.99))
    assert indicator(whole, shortened, ALPHA).item() == pytest.approx(expected)


def test_a_condition_that_is_heard_has_no_negative_indicator():
    assert indicator(logs(0.9, 0.05, 0.05), logs(0.5, 0.3, 0.2), ALPHA).item() == 0
    assert indicator(logs(0.1, 0.9), logs(0.9, 0.1), ALPHA).item() < 0  # the first token's share fell


def test_special_tokens_are_no_conditions_and_a_lone_one_is_left(llama):
    ids = torch.tensor([[0, 1, 9, 8], [0, 0, 1, 7]])
    with SelfContrast(tried=2).attach(llama) as steered:
        llama.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert steered.hidden[0].span in ((1, 2), (2, 3))
    assert steered.hidden[1].span == (1, 2)
    with SelfContrast().attach(llama, spans=lambda prompt: [(0, len(prompt))]) as steered:
        llama.generate(ids[1:, 2:], max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert steered.hidden[0].span is None and steered.hidden[0].indicator == 0


def test_other_processors_and_settings_are_kept(llama):
    from transformers import LogitsProcessor

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([5]), 0.0)

    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    with SelfContrast().attach(llama):
        said = llama.generate(ids, logits_processor=[Only()], max_new_tokens=3, do_sample=False, pad_token_id=0)
        told = llama.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_scores=True, pad_token_id=0)
    assert (said[:, 8:] == 5).all() and len(told.scores) == 2

"""A cache is gone as soon as nobody uses it, and copies stand by themselves."""

import copy
import gc
import weakref

import pytest
import torch

import vestige

POLICIES = {
    "a2sf": {"budget": 12},
    "adaptive": {"policy": {"name": "h2o", "budget": 12}},
    "think": {"policy": {"name": "h2o", "budget": 40}},
    "recycled-attention": {"budget": 12},
}


@pytest.mark.parametrize("name", POLICIES)
def test_no_collector_is_needed(llama, prompt, name):
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), vestige.method(name, **POLICIES[name]).attach(llama) as kept:
            cache = llama(prompt, use_cache=True).past_key_values
            llama(prompt[:, :1], past_key_values=cache)
            held = weakref.ref(cache)
            kept.cache = None
            del cache
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", POLICIES)
def test_a_deep_copy_goes_its_own_way(llama, prompt, name):
    with torch.no_grad(), vestige.method(name, **POLICIES[name]).attach(llama) as kept:
        cache = llama(prompt, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        first = llama(prompt[:, :1], past_key_values=cache).logits
        assert twin.get_seq_length() == prompt.shape[1] and kept.cache is cache
        assert torch.equal(llama(prompt[:, :1], past_key_values=twin).logits, first)

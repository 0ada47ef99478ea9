"""The weights room on CUDA: the certificates, and learning in bfloat16 with all that a learner holds on the device."""

import pytest
import torch
from tests.weights.common import arguments, learn, vit

from vestige.core.registry import registry
from vestige.evidence.certify import certify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", [card.name for card in registry.cards("weights")])
def test_certificate(name):
    certificate = certify(name, device="cuda", behaviour=False)
    assert certificate.holds, str(certificate)


@pytest.mark.parametrize("name", ["adaptive-svd", "rehearsal-free", "replay", "fpf", "sefe", "control-llm"])
def test_half_precision_learns_a_stream(name):
    model = vit()
    run, _ = learn(name, model, args=arguments(use_cpu=False, bf16=True))
    assert len(run.matrix) == len(run.names)
    assert all(bool(p.isfinite().all()) and p.is_cuda for p in model.parameters())

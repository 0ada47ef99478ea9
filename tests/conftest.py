"""Fixtures that all tests share: small random models, one thread, no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that open a page are skipped where there is no Chromium; in CI that is a failure."""
    if item.get_closest_marker("browser") and not (shutil.which("chromium") and shutil.which("chromedriver")):
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Small tensors are fastest on one thread, and results then do not depend on the machine's cores."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(architecture, dtype=..., seed=...)``: a small random model, see :func:`vestige.models.tiny.tiny_model`.

    Models are shared by all tests; one that changes a model undoes it.
    """
    from vestige.models.tiny import tiny_model

    return tiny_model


def _model_fixture(architecture: str, dtype: str = "float32") -> Any:
    @pytest.fixture(scope="session", name=architecture.replace("-", "_") + ("64" if dtype == "float64" else ""))
    def model() -> Any:
        import torch

        from vestige.models.tiny import tiny_model

        return tiny_model(architecture, getattr(torch, dtype))

    return model


llama, llama64 = _model_fixture("llama"), _model_fixture("llama", "float64")
gpt2, gpt2_64 = _model_fixture("gpt2"), _model_fixture("gpt2", "float64")
opt, gpt_neox, qwen2, mistral = (_model_fixture(name) for name in ("opt", "gpt-neox", "qwen2", "mistral"))
bert, vit = _model_fixture("bert"), _model_fixture("vit")


@pytest.fixture(scope="session")
def prompt() -> Any:
    """``(1, 40)`` token ids for the small models."""
    import torch

    return torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from vestige.core import registry


@pytest.fixture
def samples() -> Iterator[ModuleType]:
    """The sample methods, registered for one test only: other suites run over all that is registered."""
    before = dict(registry._defined)
    from tests.core import sample_methods

    for method in sample_methods.ALL:
        registry.add(method)
    yield sample_methods
    registry._defined.clear()
    registry._defined.update(before)

"""Learn without losing: streams of experiences, learners that compose with ``+``, and the trainer that runs them.

>>> stream = Stream.by_class(train, test, experiences=5)
>>> run = ContinualTrainer(model, learner=Replay(size=200)).run(stream)
>>> run.matrix
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige.weights.retain.learner import Learner
    from vestige.weights.retain.result import ContinualRun
    from vestige.weights.retain.stream import Experience, Stream
    from vestige.weights.retain.trainer import ContinualTrainer

_LATER = {
    "ContinualRun": "result",
    "ContinualTrainer": "trainer",
    "Experience": "stream",
    "Learner": "learner",
    "Stream": "stream",
}

__all__ = ["ContinualRun", "ContinualTrainer", "Experience", "Learner", "Stream"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

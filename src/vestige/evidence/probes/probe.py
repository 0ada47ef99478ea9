"""What a probe is: a method that measures a model and changes nothing in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vestige.core.method import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Probe"]


class Probe(Method):
    """A measurement of what a model does with its context: a table, and the figure that goes with it."""

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Measure a model. The result has ``table()``, a pandas frame, and ``figure()``, a plotly figure.

        Raises:
            UnsupportedModelError: the model lacks what the probe looks at.
        """
        raise NotImplementedError

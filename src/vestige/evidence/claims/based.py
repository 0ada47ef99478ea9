"""Claims of Based: the width of the features is a dial between recall and bytes."""

from __future__ import annotations

from vestige.evidence.certify.layers_model import state_after
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def more_features_recall_more(case: LayerCase) -> Seen:
    """The wider queries and keys are before the expansion, the more of a dozen pairs is recalled, at more bytes."""
    task = PairRecall(pairs=12, keys=12)
    widths = (1, 2, 4)
    right = [case.recall(task, case.fitted.replace(feature_dim=width)) for width in widths]
    models = [case.lm([{"mixer": case.fitted.replace(feature_dim=width)}]) for width in widths]
    held = [state_after(model, case.ids(1, 9)).nbytes for model in models]
    seen = {"right answers": dict(zip(widths, right, strict=True)), "bytes": dict(zip(widths, held, strict=True))}
    expect(held[0] < held[1] < held[2], f"the state does not grow: {seen}")
    expect(max(right[0]) < min(right[1]) and max(right[1]) < min(right[2]), f"recall does not rise: {seen}")
    return seen

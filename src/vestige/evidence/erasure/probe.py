"""What a linear probe still reads from hidden states."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vestige.core.packages import need
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Examples, Row
from vestige.weights.rows import IGNORED

__all__ = ["Probed", "probe"]

FOLDS, LAYERS, STRENGTH = 5, 8, 1.0


@dataclass(frozen=True)
class Probed:
    """What probes read, layer by layer.

    Attributes:
        layers: of which the states were probed; 0 are the embeddings.
        forget, retain: share of rows of each set whose label is read rightly by a probe that was not shown the row.
        chance: share of the most frequent label among the rows to forget, times whether a probe may know it: what
            always naming the most frequent label of all rows gets right on the rows to forget.
        labels: how many different ones there are.
    """

    layers: tuple[int, ...]
    forget: tuple[float, ...]
    retain: tuple[float, ...]
    chance: float
    labels: int


def probe(work: Work, forget: Examples, retain: Examples) -> Probed | str:
    """Read each row's label (of a language model's row: the first token that counts) from the model's states.

    The state is the mean over positions; in a causal model that of the position which has to predict the token. A
    logistic regression on standardised states is fitted on the rows of both sets and asked about rows held out, in
    five folds.

    Returns:
        What was read, or why nothing can be.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    need("the probe", "weights", "sklearn")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    read = [_states(work, examples) for examples in (forget, retain)]
    if read[0] is None or read[1] is None:
        return "rows have several labels each, or the model gives no hidden states"
    states = [np.concatenate(pair) for pair in zip(read[0][0], read[1][0], strict=True)]
    labels = np.concatenate([read[0][1], read[1][1]])
    gone = np.arange(len(labels)) < len(read[0][1])
    names, counts = np.unique(labels, return_counts=True)
    enough = np.isin(labels, names[counts >= 2])
    if len(np.unique(labels[enough])) < 2 or not (gone & enough).any() or not (~gone & enough).any():
        return "there are fewer than two labels that stand in two rows each"
    folds = int(min(FOLDS, counts[counts >= 2].min()))
    split = StratifiedKFold(folds, shuffle=True, random_state=work.seed)
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=300))
    layers = sorted({round(n) for n in np.linspace(0, len(states) - 1, min(LAYERS, len(states)))})
    forgotten, kept = [], []
    for layer in layers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            said = cross_val_predict(reader, states[layer][enough], labels[enough], cv=split)
        right = said == labels[enough]
        forgotten.append(float(right[gone[enough]].mean()))
        kept.append(float(right[~gone[enough]].mean()))
    chance = float((labels[gone & enough] == names[counts.argmax()]).mean())
    return Probed(tuple(layers), tuple(forgotten), tuple(kept), chance, len(np.unique(labels[enough])))


@torch.no_grad()
def _states(work: Work, examples: Examples) -> tuple[list[np.ndarray], np.ndarray] | None:
    """Per layer the states (rows, dim), and the labels (rows,)."""
    layers: list[list[np.ndarray]] = []
    labels: list[np.ndarray] = []
    for _, batch in work.batches(examples):
        if batch["labels"].ndim > 1 and not work.reader.causal:
            return None
        given = {key: value for key, value in batch.items() if key != "labels"}
        hidden = getattr(work.model(**given, output_hidden_states=True), "hidden_states", None)
        if not hidden:
            return None
        layers = layers or [[] for _ in hidden]
        for found, state in zip(layers, hidden, strict=True):
            found.append(_one_per_row(state, batch, work.reader.causal).double().cpu().numpy())
        labels.append(_label(batch).cpu().numpy())
    return [np.concatenate(found) for found in layers], np.concatenate(labels)


def _label(batch: Row) -> Tensor:
    labels = batch["labels"]
    return labels if labels.ndim == 1 else labels.gather(1, _first(labels)[:, None])[:, 0]


def _first(labels: Tensor) -> Tensor:
    """The place of the first token that counts (rows,)."""
    return (labels != IGNORED).long().argmax(1)


def _one_per_row(state: Tensor, batch: Row, causal: bool) -> Tensor:
    if causal and batch["labels"].ndim == 2:
        return state[torch.arange(len(state)), (_first(batch["labels"]) - 1).clamp(min=0)]
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != state.shape[:2]:
        return state.flatten(1, -2).mean(1) if state.ndim > 2 else state
    return (state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

"""What came of a run: scores on each experience after each, and what they say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from vestige.core.packages import need

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

__all__ = ["ContinualRun"]

Scores = Float[np.ndarray, "learnt asked"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ContinualRun:
    """The result of learning a stream.

    Scores are shares right (of labels), or mean log-likelihoods per token in nats; more is better in both.

    Attributes:
        learner: the learner's spec.
        names: the experiences.
        matrix: score on experience *j* after learning experience *i*; experiences not yet learnt are scored too.
        untrained: score on each before the first was learnt.
        general: score on held-out general text before, and after each experience; empty if none was given.
        unit: ``"accuracy"`` or ``"log-likelihood"``.
        replay_bytes, state_bytes: the most that the learner held, of examples, and of statistics and weights.
        seconds: of learning, per experience: training and all that the learner does before and after it.
        overhead: share of those spent in the learner's hooks.
        report: what the learner found out.
        seed: of the run.
    """

    learner: dict[str, Any]
    names: Sequence[str]
    matrix: Scores
    untrained: Float[np.ndarray, " asked"]
    general: Sequence[float] = ()
    unit: str = "accuracy"
    replay_bytes: int = 0
    state_bytes: int = 0
    seconds: Sequence[float] = ()
    overhead: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def average(self) -> float:
        """Mean score over all experiences at the end: mean_j R[T, j]."""
        return float(self.matrix[-1].mean())

    @property
    def forgetting(self) -> float:
        """Mean fall from the best score ever held to the last: mean over j < T of max_{i < T} R[i, j] - R[T, j].

        Only scores from the time that *j* was learnt count. 0 for a single experience.
        """
        last = len(self.matrix) - 1
        falls = [self.matrix[j:last, j].max() - self.matrix[last, j] for j in range(last)]
        return float(np.mean(falls)) if falls else 0.0

    @property
    def backward_transfer(self) -> float:
        """Mean over j < T of R[T, j] - R[j, j]: what later learning did to earlier."""
        last = len(self.matrix) - 1
        return float(np.mean([self.matrix[last, j] - self.matrix[j, j] for j in range(last)])) if last else 0.0

    @property
    def forward_transfer(self) -> float:
        """Mean over j > 1 of R[j - 1, j] - b_j, with b the untrained score: what earlier learning did for later."""
        gains = [self.matrix[j - 1, j] - self.untrained[j] for j in range(1, len(self.matrix))]
        return float(np.mean(gains)) if gains else 0.0

    @property
    def plasticity(self) -> float:
        """Mean score on each experience just after it was learnt: mean_j R[j, j]."""
        return float(np.diag(self.matrix).mean())

    @property
    def general_kept(self) -> float | None:
        """Score on general text at the end less that at the start; ``None`` if it was not measured."""
        return float(self.general[-1] - self.general[0]) if len(self.general) else None

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """Perplexity of general text before the first experience and after the last; ``None`` if it was not measured,
        or where answers are right or wrong."""
        if self.unit != "log-likelihood" or not len(self.general):
            return None
        return float(np.exp(-self.general[0])), float(np.exp(-self.general[-1]))

    def metrics(self) -> dict[str, float]:
        """The numbers above by name."""
        found = {
            "average": self.average,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "plasticity": self.plasticity,
            "overhead": self.overhead,
        }
        if self.general_kept is not None:
            found["general_kept"] = self.general_kept
        if self.perplexity is not None:
            found["perplexity_before"], found["perplexity"] = self.perplexity
        return found

    def row(self, model: str = "") -> dict[str, Any]:
        """A row for the :class:`~vestige.core.ledger.Ledger`."""
        return {
            "method": self.learner,
            "model": model,
            "seed": self.seed,
            "metrics": self.metrics(),
            "replay_bytes": self.replay_bytes,
            "state_bytes": self.state_bytes,
            "seconds": float(sum(self.seconds)),
            "matrix": self.matrix.tolist(),
            "unit": self.unit,
        }

    def table(self) -> pandas.DataFrame:
        """The matrix with names: rows learnt, columns asked, ``untrained`` first.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        need("ContinualRun.table()", "report", "pandas")
        import pandas

        done = list(self.names)[: len(self.matrix)]
        rows = np.vstack([self.untrained[None], self.matrix])
        index = pandas.Index(["untrained", *done], name="after")
        return pandas.DataFrame(rows, index=index, columns=pandas.Index(self.names, name="asked"))

    def figure(self) -> go.Figure:
        """The matrix as a map of colours, its values written in.

        Raises:
            MissingPackageError: plotly is not installed.
        """
        need("ContinualRun.figure()", "report", "plotly")
        import plotly.graph_objects as go

        form = ".0%" if self.unit == "accuracy" else ".2f"
        done = list(self.names)[: len(self.matrix)]
        bounds = {"zmin": 0, "zmax": 1} if self.unit == "accuracy" else {}
        cells = go.Heatmap(
            z=self.matrix,
            x=[f"asked {name}" for name in self.names],
            y=[f"after {name}" for name in done],
            texttemplate="%{z:" + form + "}",
            colorscale="Blues",
            hovertemplate="%{y}, %{x}: %{z:" + form + "}<extra></extra>",
            colorbar={"title": self.unit},
            **bounds,
        )
        figure = go.Figure(cells)
        title = f"{self.learner['name']}: average {self.average:{form}}, forgetting {self.forgetting:{form}}"
        figure.update_layout(title=title, template="plotly_white", yaxis={"autorange": "reversed"})
        return figure

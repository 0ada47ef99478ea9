"""The audit: what a model remembers of its context, and how much of its cache it could give up.

Everything measured is a row of the folder's ledger under a key made of all that the measurement depends on (the
weights, the prompt, the policy, the budget ...). What is there already is not measured again: a killed audit goes
on where it was, and a folder may hold several audits, of other settings or other models, side by side. The
report shows the cells of the audit just asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.core.files import folder_for
from vestige.core.packages import need
from vestige.evidence.audit.plan import AuditPlan, plan_audit
from vestige.evidence.engine.bench import load_pair
from vestige.evidence.tasks.haystack import GRAMMAR

if TYPE_CHECKING:
    import pandas as pd

    from vestige.context.policy import CachePolicy
    from vestige.evidence.probes.retrieval_heads import HeadScores
    from vestige.evidence.summaries import Smallest

__all__ = ["AuditPlan", "AuditResult", "audit", "plan_audit"]

REPORT, LEDGER = "report.html", "ledger.jsonl"


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        model: the model's name.
        plan: what was measured.
        folder: where report and ledger are.
        anatomy: the model in numbers.
        heads: retrieval scores of every head.
        sinks: ``(layers, heads)`` share of attention on the first token.
        cells: one row per policy, budget and prompt.
        retention: what :func:`vestige.evidence.summaries.retention` makes of the cells.
        smallest: per policy, the smallest budget that keeps 95% of the full cache's score.
        costs: one row per policy: bytes and seconds per token.
        measured: cells measured now; the others were in the ledger.
    """

    model: str
    plan: AuditPlan
    folder: Path
    anatomy: dict[str, Any]
    heads: HeadScores
    sinks: Any
    cells: pd.DataFrame
    retention: pd.DataFrame
    smallest: list[Smallest]
    costs: pd.DataFrame
    measured: int

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / REPORT

    @property
    def ledger(self) -> Path:
        """The measurements."""
        return self.folder / LEDGER

    def summary(self) -> dict[str, Any]:
        """The answers as plain JSON types."""
        scores = self.heads.scores
        return {
            "model": self.model,
            "length": self.plan.length,
            "budgets": list(self.plan.budgets),
            "anatomy": self.anatomy,
            "retrieval_heads": [
                {"layer": layer, "head": head, "score": round(float(scores[layer, head]), 4)}
                for layer, head in self.heads.heads()
            ],
            "sink_share": round(float(self.sinks.mean()), 4),
            "retention": json.loads(self.retention.to_json(orient="records")),
            "smallest_budget": [vars(answer) for answer in self.smallest],
            "costs": json.loads(self.costs.to_json(orient="records")),
            "report": str(self.report),
            "ledger": str(self.ledger),
        }


def audit(
    model: Any = "smollm2",
    *,
    out: str | os.PathLike[str] = "vestige-audit",
    methods: Iterable[str | Mapping[str, Any] | CachePolicy] | None = None,
    budgets: Iterable[int | float] | None = None,
    length: int | None = None,
    depths: Iterable[float] | None = None,
    seeds: int | Iterable[int] | None = None,
    haystack: str = GRAMMAR,
    quick: bool = False,
    device: Any = "auto",
    dtype: Any = "auto",
    batch: int = 5,
    progress: bool = True,
) -> AuditResult:
    """Measure what a model retrieves from its context, in full and under every policy and budget.

    A needle is hidden in a text; the model reads the text; the cache is cut to a budget; only then is the question
    asked. One reading per policy and prompt serves all budgets. Beside that: the model's anatomy, the retrieval
    score and the sink share of every head, and bytes and seconds per token of every policy.

    Args:
        model: what :func:`vestige.models.load` takes, or a pair of a loaded model and its tokenizer.
        out: folder for ``report.html`` and ``ledger.jsonl``. Measurements found there are not repeated.
        methods: cache policies by name, spec or object; default: ``full``, ``streaming-llm``, ``h2o``, ``a2sf``;
            ``"all"`` among them adds every registered one that the budgets and the model allow.
            ``full`` is always among them.
        budgets: entries kept per head: tokens (int), or shares of the context (float).
        length: tokens of each context.
        depths: where the needle stands, 0 to 1.
        seeds: of the prompts: how many, or which.
        haystack: filler text; see :mod:`vestige.evidence.tasks.haystack`.
        quick: fewer and shorter prompts, where they are not given: under a minute for the embedded model.
        device: where the model runs; ``"auto"`` takes an accelerator if there is one.
        dtype: of the weights; see :func:`vestige.models.load`.
        batch: prompts that run together.
        progress: show a progress bar with the time left, on stderr.

    Raises:
        SpecError: a setting is unknown or out of range; raised before the model is loaded, but for a context longer
            than the model allows.
        MissingPackageError: a package for the report, or the embedded model's, is absent.
        ModelError: the model cannot be loaded; :class:`~vestige.errors.UnsupportedModelError` if it is no causal
            decoder that Vestige knows.
        LedgerError: the folder's ledger cannot be read or written.
    """
    plan = plan_audit(
        methods=methods,
        budgets=budgets,
        length=length,
        depths=depths,
        seeds=seeds,
        haystack=haystack,
        batch=batch,
        quick=quick,
    )
    need("the audit's report", "report", "pandas", "plotly")
    folder = folder_for(out)
    name, network, tokenizer = load_pair(model, dtype, device)
    from vestige.evidence.audit.run import Auditor
    from vestige.evidence.report.audit_page import write_audit_report
    from vestige.evidence.summaries import retention, smallest_budgets

    auditor = Auditor(name, network, tokenizer, plan, folder / LEDGER, progress=progress)
    plan, found = auditor.plan, auditor.measure()
    table = retention(found["cells"])
    result = AuditResult(
        model=name, plan=plan, folder=folder, retention=table, smallest=smallest_budgets(table), **found
    )
    write_audit_report(result)
    return result

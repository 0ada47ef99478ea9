"""From measured cells to answers: what a policy remembers under a budget, and the smallest that will do.

Pure functions of data frames with one row per measurement, as a ledger gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vestige.evidence.statistics import wilson

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KEEP", "Smallest", "retention", "smallest_budgets"]

KEEP = 0.95  # share of the full cache's score that a budget must keep to count as enough


@dataclass(frozen=True)
class Smallest:
    """The smallest measured budget under which a policy keeps enough.

    Attributes:
        policy: its label.
        budget: entries per head, or ``None`` where no measured budget was enough.
        largest: the largest budget measured.
        found: share of the prompts answered at ``budget`` (at ``largest`` where no budget was enough).
        bytes_share: cache bytes held there, as a share of the full cache's.
    """

    policy: str
    budget: int | None
    largest: int
    found: float
    bytes_share: float


def retention(cells: pd.DataFrame) -> pd.DataFrame:
    """Share of prompts answered for each policy and budget, with its interval.

    Args:
        cells: one row per prompt: ``policy``, ``budget`` (entries per head), ``length`` (tokens of the context),
            ``found`` (whether the answer was given in full), ``share`` (of its tokens that were right),
            ``kv_bytes`` (held for that prompt).

    Returns:
        One row per policy and budget, in the order of the policies' first cells and by budget: ``policy``,
        ``budget``, ``budget_share``, ``found``, ``low``, ``high`` (95% Wilson interval), ``prompts``, ``share``,
        ``kv_bytes`` (mean) and ``bytes_share``.
    """
    import pandas as pd

    whole = cells.loc[cells["policy"] == "full", "kv_bytes"].mean()
    rows = []
    for policy in dict.fromkeys(cells["policy"]):
        for budget, group in cells[cells["policy"] == policy].groupby("budget", sort=True):
            interval = wilson(int(group["found"].sum()), len(group))
            held = group["kv_bytes"].mean()
            rows.append(
                {
                    "policy": policy,
                    "budget": int(budget),  # type: ignore[arg-type]
                    "budget_share": float(budget / group["length"].mean()),  # type: ignore[operator]
                    "found": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "prompts": interval.count,
                    "share": float(group["share"].mean()),
                    "kv_bytes": float(held),
                    "bytes_share": float(held / whole),
                }
            )
    return pd.DataFrame(rows)


def smallest_budgets(table: pd.DataFrame) -> list[Smallest]:
    """For each policy but the full cache, the smallest budget from which on it keeps :data:`KEEP` of the full score.

    All larger measured budgets must keep it too, so that one lucky budget does not count.

    Args:
        table: what :func:`retention` gives.
    """
    needed = KEEP * table.loc[table["policy"] == "full", "found"].max()
    answers = []
    for policy in dict.fromkeys(table["policy"]):
        if policy == "full":
            continue
        rows = table[table["policy"] == policy].sort_values("budget", ascending=False)
        enough = rows[(rows["found"] >= needed - 1e-12).cumprod().astype(bool)] if needed > 0 else rows.iloc[:0]
        row = enough.iloc[-1] if len(enough) else rows.iloc[0]
        budget = int(row["budget"]) if len(enough) else None
        answers.append(
            Smallest(policy, budget, int(rows["budget"].max()), float(row["found"]), float(row["bytes_share"]))
        )
    return answers

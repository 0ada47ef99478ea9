"""A ledger made by hand, of every kind of row that a report shows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from vestige.core.ledger import Ledger

GIVEN = {"vestige": "0.1.0", "weights": "0123456789abcdef", "dtype": "float32", "device": "cpu"}
FULL_BYTES = 20_000_000


def compared(
    method: str, budget: float | None, seed: int, values: list[float], *, metric: str = "accuracy", **changes: Any
) -> dict[str, Any]:
    """A row of a comparison: ``budget`` is a share of the full cache's bytes."""
    needle = metric == "accuracy"
    task = {"name": "needle" if needle else "perplexity", "version": 1, "length": 384}
    cell = {
        "model": "smollm2",
        "label": method,
        "task_label": f"{task['name']} (length=384)",
        "task": task,
        "method": {"name": method},
        "budget": None if budget is None else [budget, "share"],
        "equal": "bytes",
        "examples": len(values),
        "question_known": False,
        "seed": seed,
        "given": GIVEN,
    }
    key = f"compare-{method}-{budget}-{metric}-{seed}"
    spec = {"name": method, **({} if budget is None else {"budget": round(384 * budget)})}
    return {
        "key": key,
        "study": "compare",
        "model": "smollm2",
        "task": task,
        "method": spec,
        "seed": seed,
        "metrics": {metric: sum(values) / len(values), "decode_seconds_per_token": 0.05 + 0.02 * (budget or 1)},
        "kv_bytes": round(FULL_BYTES * (1 if budget is None else 0.97 * budget)),
        "seconds": 3.2,
        "budget": None if budget is None else {"asked": f"{100 * budget:g}%", "equal": "bytes"},
        "scored": {
            "metric": metric,
            "higher_is_better": needle,
            "chance": 3.3e-5 if needle else None,
            "ceiling": 1.0,
            "values": values,
        },
        "cell": cell,
        "command": f"vestige compare out/ledger.jsonl --only {key}",
        **changes,
    }


def failed(method: str, seed: int, tries: int = 1) -> dict[str, Any]:
    """A row of a cell that could not be measured."""
    row = compared(method, 0.1, seed, [0.0])
    for name in ("metrics", "kv_bytes", "seconds", "scored"):
        del row[name]
    error = {"type": "SpecError", "text": f"{method}: parameter 'budget' is 38; it must hold 64", "trace": "…"}
    return {**row, "key": f"{row['key']}-failed-{tries}", "error": error}


def comparison() -> list[dict[str, Any]]:
    """Six methods, two of them clearly apart, two tasks, three budgets, three seeds."""
    skill = {"streaming-llm": 0.7, "h2o": 0.5, "a2sf": 0.5, "snapkv": 0.45, "tova": 0.1, "knorm": 0.05}
    rows = []
    chance = random.Random(0)
    for seed in (0, 1, 2):
        rows.append(compared("full", None, seed, [1.0] * 5))
        rows.append(compared("full", None, seed, [12.0 + 0.1 * place for place in range(5)], metric="perplexity"))
        for method, good in skill.items():
            for budget in (0.1, 0.25, 0.5):
                values = [float(chance.random() < good + 0.6 * (budget - 0.25)) for _ in range(5)]
                rows.append(compared(method, budget, seed, values))
                loss = [12.0 + 9 * (1 - good) * (0.6 - budget) + 0.1 * place for place in range(5)]
                rows.append(compared(method, budget, seed, loss, metric="perplexity"))
    return [*rows, failed("quantised-cache", 0), failed("quantised-cache", 0, tries=2)]


def others() -> list[dict[str, Any]]:
    """Rows of an audit's heads and cells, of continual learning, of an erasure audit."""
    heads = [[round(0.9 / (1 + layer + 2 * head), 3) for head in range(4)] for layer in range(6)]
    named = {"model": "smollm2", "seed": 0}
    needle = {"name": "needle", "version": 1, "length": 512, "depth": 0.5, "seed": 0}
    learner = {"method": {"name": "replay", "size": 240}, "model": "vit", "unit": "accuracy"}
    measures = [
        {
            "name": "accuracy",
            "says": "right on the forget set",
            "unit": "share",
            "values": {"erased": 0.02, "retrained": 0.0},
        },
        {
            "name": "relearning",
            "says": "steps until known again",
            "unit": "steps",
            "values": {"erased": 12, "retrained": None},
        },
        {
            "name": "membership",
            "says": "area under the curve",
            "unit": "share",
            "values": {"erased": {"value": 0.52, "low": 0.47, "high": 0.57, "count": 80}},
        },
    ]
    return [
        {"key": "heads-1", "study": "audit", **named, "method": {"name": "retrieval-heads"}, "task": needle}
        | {"metrics": {"recall": 1.0, "said": [1], "shares": heads}},
        {"key": "retention-1", "study": "audit", **named, "method": {"name": "h2o", "budget": 128}, "task": needle}
        | {"metrics": {"budget": 128, "found": True, "share": 1.0}, "kv_bytes": 5_000_000},
        *(
            {**learner, "seed": seed, "matrix": [[1.0, 0.0], [0.8 - 0.1 * seed, 0.9]], "replay_bytes": 1}
            | {"metrics": {"average": 0.85 - 0.05 * seed, "forgetting": 0.2 + 0.1 * seed}}
            for seed in (0, 1)
        ),
        {**named, "method": {"name": "ssd"}, "task": {"name": "erasure audit"}, "metrics": {"accuracy": 0.02}}
        | {"measures": measures},
    ]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A ledger of these rows."""
    ledger = Ledger(path)
    for row in rows:
        ledger.append(row)
    return path

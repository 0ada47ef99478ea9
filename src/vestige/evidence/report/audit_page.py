"""The audit's page: answers in words first, then what they rest on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vestige.evidence.amounts import size
from vestige.evidence.report.figures import depth_map, head_map, retention_curves, series_of
from vestige.evidence.report.page import (
    Answers,
    Code,
    Figure,
    Figures,
    Page,
    Section,
    Table,
    Text,
    versions_line,
    write_page,
)
from vestige.evidence.summaries import KEEP
from vestige.evidence.tasks.needle import Needle

if TYPE_CHECKING:
    from pathlib import Path

    from vestige.evidence.audit import AuditResult
    from vestige.evidence.summaries import Smallest

__all__ = ["audit_page", "write_audit_report"]


def write_audit_report(result: AuditResult) -> Path:
    """Write ``report.html`` into the audit's folder."""
    return write_page(audit_page(result), result.report)


def audit_page(result: AuditResult) -> Page:
    """The report of an audit."""
    plan = result.plan
    prompts = len(plan.needles())
    return Page(
        title=f"What {result.model.rstrip('/').rpartition('/')[2]} remembers",
        subtitle=(
            f"{prompts} facts, each hidden in {plan.length:,} tokens of text and asked for after the cache was cut; "
            f"{len(plan.policies)} cache policies, {len(plan.budgets)} budgets."
        ),
        sections=[
            Section("answers", "In short", [Answers(answers(result))]),
            Section("retention", "What each budget keeps", _retention(result)),
            Section("cost", "Bytes and seconds", _costs(result)),
            Section("heads", "The heads that retrieve", _heads(result)),
            Section("sinks", "Attention sinks", _sinks(result)),
            Section("anatomy", "Anatomy", [_anatomy(result)]),
            Section("method", "How this was measured", _method(result)),
        ],
        footer=versions_line(),
    )


def answers(result: AuditResult) -> list[tuple[str, str]]:
    """The headline answers: a number and a sentence each."""
    length = result.plan.length
    whole = result.retention[result.retention["policy"] == "full"].iloc[0]
    found = [
        (
            f"{whole['found']:.0%}",
            f"of the facts are found with the full cache ({whole['found'] * whole['prompts']:.0f} of "
            f"{whole['prompts']}), at {size(whole['kv_bytes'])} for {length:,} tokens.",
        )
    ]
    if whole["found"] > 0:
        found += [_enough(answer, length) for answer in result.smallest]
    else:
        found.append(("?", "No policy can be judged: the model does not find the facts even with its full cache."))
    heads, scores = result.heads.heads(), result.heads.scores
    if heads:
        layer, head = heads[0]
        found.append(
            (
                f"{len(heads)} of {scores.size}",
                f"heads retrieve, scoring {result.heads.threshold:g} or more; head {head} of layer {layer} copies "
                f"{scores[layer, head]:.0%} of what it is asked for.",
            )
        )
    found.append(
        (f"{result.sinks.mean():.0%}", "of all attention falls on the first token, on average over all heads.")
    )
    return found


def _enough(answer: Smallest, length: int) -> tuple[str, str]:
    if answer.budget is None:
        return (
            f"> {answer.largest:,} of {length:,}",
            f"tokens are needed under {answer.policy} to keep {KEEP:.0%} of what the full cache finds; with "
            f"{answer.largest:,} it finds {answer.found:.0%}.",
        )
    return (
        f"{answer.budget:,} of {length:,}",
        f"tokens keep {KEEP:.0%} of what the full cache finds under {answer.policy}, in {answer.bytes_share:.1%} of "
        "the bytes.",
    )


def _retention(result: AuditResult) -> list[object]:
    table, cells = result.retention, result.cells
    series = series_of(table["policy"])
    partial = [policy for policy in series if policy != "full" and policy in set(table["policy"])]
    budgets = sorted(set(table.loc[table["policy"] != "full", "budget"]))
    shown = {(row["policy"], row["budget"]): row for row in table.to_dict("records")}
    columns = ["policy", *(f"{budget:,}" for budget in budgets), f"all {result.plan.length:,}"]

    def cell(policy: str, budget: int) -> str:
        row = shown.get((policy, budget))
        return f"{row['found']:.0%} ({100 * row['low']:.0f}-{100 * row['high']:.0f})" if row is not None else ""

    rows = [[policy, *(cell(policy, budget) for budget in (*budgets, result.plan.length))] for policy in series]
    curves = Figure(
        "retention-curves",
        retention_curves(table, series),
        "Facts found, by budget",
        "Lines: share of facts recited in full; the cache was cut to the budget before the question was known. Bands: "
        " 95% Wilson intervals. The dotted line is the full cache.",
        "Line chart of the share of facts found against the cache budget; the table below holds the numbers.",
    )
    maps = [
        Figure(
            f"depth-{place}",
            depth_map(cells, policy),
            f"{policy}, by depth (%)",
            "",
            f"Heat map of the share of facts found by {policy} for each depth of the fact and each budget.",
        )
        for place, policy in enumerate(partial)
    ]
    numbers = Table(columns, rows, "Share of facts found (95% interval), by cache entries kept per head")
    return [curves, numbers, Figures(maps)] if maps else [curves, numbers]


def _costs(result: AuditResult) -> list[object]:
    whole = result.costs.loc[result.costs["policy"] == "full", "kv_bytes"].iloc[0]
    rows = [
        [
            row["policy"],
            f"{row['budget']:,}",
            size(row["kv_bytes"]),
            f"{row['kv_bytes'] / whole:.1%}",
            f"{1000 * row['prefill_seconds_per_token']:.2f}",
            f"{1000 * row['decode_seconds_per_token']:.1f}",
        ]
        for row in result.costs.to_dict("records")
    ]
    columns = ["policy", "entries", "cache held", "of full", "reading, ms per token", "writing, ms per token"]
    caption = f"One prompt of {result.plan.length:,} tokens on {result.anatomy['device']}, {result.anatomy['dtype']}"
    explained = (
        "Bytes are the storage that the cache really holds: keys, values, positions, and the scores by which entries "
        "are ranked. Each policy worked under its budget while it read and while it wrote; writing is the median token."
    )
    held = result.retention[result.retention["policy"] != "full"]
    budgets = sorted(set(held["budget"]))
    by_budget = [
        [str(policy), *(f"{size(row['kv_bytes'])} ({row['bytes_share']:.0%})" for row in rows.to_dict("records"))]
        for policy, rows in held.sort_values("budget").groupby("policy", sort=False)
    ]
    every = Table(
        ["policy", *(f"{budget:,}" for budget in budgets)],
        by_budget,
        "Bytes held for one context (share of the full cache's), by cache entries kept per head",
    )
    return [Text(explained), Table(columns, rows, caption), *([every] if budgets else [])]


def _heads(result: AuditResult) -> list[object]:
    scores, heads = result.heads.scores, result.heads.heads()
    used, asked = len(result.heads.answered), len(result.heads.prompts)
    explained = (
        "A head's retrieval score is the share of an answer's tokens at which the head, while that token was being "
        f"written, looked most at that very token in the context; averaged over the {used} of {asked} prompts that the "
        "model answered. Few heads score high, and without them retrieval fails (arXiv 2404.15574)."
    )
    names = ", ".join(f"{layer}.{head} ({scores[layer, head]:.2f})" for layer, head in heads[:8])
    listed = f"Highest, as layer.head (score): {names}." if heads else "No head reaches the threshold."
    figure = Figure(
        "head-map",
        head_map(scores, "retrieval score", written_from=result.heads.threshold),
        "Retrieval score of every head",
        f"Scores of {result.heads.threshold:g} and more are written out.",
        f"Heat map of the retrieval scores of {scores.size} attention heads, {len(heads)} of them above the threshold.",
    )
    return [Text(explained), Text(listed), figure]


def _sinks(result: AuditResult) -> list[object]:
    per_layer = result.sinks.mean(axis=1)
    explained = (
        "Heads that find nothing to look at rest on the first token of the text. A policy that drops it takes away "
        f"what they rest on. The largest share is in layer {int(per_layer.argmax())} ({per_layer.max():.0%}), the "
        f"smallest in layer {int(per_layer.argmin())} ({per_layer.min():.0%})."
    )
    figure = Figure(
        "sink-map",
        head_map(result.sinks, "share on the first token"),
        "Share of attention on the first token",
        f"Averaged over the later tokens of {len(result.plan.sinks)} texts of {result.plan.length:,} tokens.",
        "Heat map of every attention head's share of attention that falls on the first token.",
    )
    return [Text(explained), figure]


def _anatomy(result: AuditResult) -> Table:
    a = result.anatomy
    per_token = a["cache_bytes_per_token"]
    sliding = f", {a['sliding_layers']} with a sliding window" if a["sliding_layers"] else ""
    rows = [
        ["architecture", str(a["architecture"])],
        ["parameters", f"{a['parameters']:,}"],
        ["layers", f"{a['layers']}{sliding}"],
        ["query heads per layer", f"{a['heads']}"],
        ["key-value heads per layer", f"{a['kv_heads']}"],
        ["head dimension", f"{a['head_dim']}"],
        ["hidden size", f"{a['hidden_size']:,}"],
        ["vocabulary", f"{a['vocabulary']:,}"],
        ["positions", f"{a['positions']}, up to {a['max_positions']:,}"],
        ["cache per token", f"{per_token:,} bytes in {a['dtype']}"],
        [f"cache of {a['max_positions']:,} tokens", size(per_token * a["max_positions"])],
    ]
    return Table(["part", "value"], rows, "The model in numbers", labels=2)


def _method(result: AuditResult) -> list[object]:
    plan, needle = result.plan, result.plan.needles()[0]
    filler = "sentences of a seeded grammar" if plan.haystack == "grammar" else plan.haystack
    texts = [
        f"A context of exactly {plan.length:,} tokens ({filler}) hides one sentence with a pass key of five digits, at "
        f"{len(plan.depths)} depths with {len(plan.seeds)} seeds. The model reads the context; the cache is cut to "
        "the budget by the policy's own ranking; then the question and the beginning of the answer follow, and a fact "
        "counts as found when greedy decoding recites it in full. Guessing would find one in "
        f"{1 / needle.chance:,.0f}; the ceiling is {Needle.ceiling:.0%}. One reading per policy and prompt serves all "
        "budgets.",
        f"A budget is enough when it and every larger one measured keep {KEEP:.0%} of what the full cache finds. With "
        f"{len(plan.needles())} prompts the intervals are wide; more seeds make them narrower.",
    ]
    return [*map(Text, texts), Text("The command that measured this:"), Code(plan.command(result.model))]

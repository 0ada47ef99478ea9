"""The audit, end to end on a small random model: what it measures, resumes, answers and refuses."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

import vestige
from tests.evidence.conftest import rows_when_killed
from vestige.context.evict.a2sf import A2SF
from vestige.core.anatomy import Anatomy
from vestige.core.ledger import Ledger
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError, UnsupportedModelError
from vestige.evidence.audit import audit, plan_audit
from vestige.evidence.engine.bench import fingerprint, time_policy
from vestige.evidence.summaries import retention, smallest_budgets
from vestige.evidence.tasks.needle import context_batch, recite

SMALL = {"length": 260, "budgets": (40, 100, 0.5), "depths": (0.2, 0.8), "seeds": (0,), "quick": True}


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """An audit of the toy model, run once."""
    return audit(toy, out=tmp_path_factory.mktemp("audit"), progress=False, **SMALL)


def cells_of(plan):
    """How many ledger rows an audit of a plan leaves."""
    asked = sum(len(plan.budgets_of(policy)) for policy in plan.policies) * len(plan.needles())
    return 1 + len(plan.heads.needles()) + len(plan.sinks) + asked + len(plan.policies)


def test_every_cell_is_one_row_and_the_model_is_left_alone(finished, toy):
    rows = list(Ledger(finished.ledger).rows())
    assert len(rows) == cells_of(finished.plan) == finished.measured
    assert max(Counter(row["key"] for row in rows).values()) == 1
    assert all(row["study"] == "audit" and row["versions"] and row["hardware"] for row in rows)
    assert not Patch.active(toy[0])
    assert [policy.name for policy in finished.plan.policies] == ["full", "streaming-llm", "h2o", "a2sf"]
    assert finished.plan.budgets == (40, 100, 130)
    assert finished.report.stat().st_size > 1_000_000


def test_cells_say_what_the_model_does_with_a_cut_cache(finished, toy):
    """One cell recomputed by hand: same bytes, same answer."""
    model, tokenizer = toy
    prompt = finished.plan.needles()[1].build(tokenizer)
    with A2SF(budget=1.0).attach(model) as kept, torch.inference_mode():
        model(context_batch([prompt]), use_cache=True)
        cut = kept.cache.cut(100)
        held = sum(t.untyped_storage().nbytes() for layer in cut.layers for t in layer.tensors().values())
        recital = recite(model, [prompt], cut)[0]
    cells = finished.cells
    seed, depth = prompt.needle.seed, prompt.needle.depth
    cell = cells[(cells.policy == "a2sf") & (cells.budget == 100) & (cells.seed == seed) & (cells.depth == depth)]
    assert len(cell) == 1
    assert cell.iloc[0]["kv_bytes"] == held
    assert cell.iloc[0]["share"] == recital.share and cell.iloc[0]["found"] == recital.found


def test_bytes_grow_with_the_budget_and_the_full_cache_is_the_most(finished):
    table = finished.retention
    whole = table.loc[table.policy == "full", "kv_bytes"].iloc[0]
    assert whole == 260 * finished.anatomy["cache_bytes_per_token"]
    for policy in ("streaming-llm", "h2o", "a2sf"):
        held = table[table.policy == policy].sort_values("budget")["kv_bytes"].tolist()
        assert held == sorted(held) and held[0] < held[-1] < whole
    costs = finished.costs.set_index("policy")
    assert (costs[["prefill_seconds_per_token", "decode_seconds_per_token"]] > 0).all(axis=None)
    assert costs.loc["h2o", "kv_bytes"] < costs.loc["full", "kv_bytes"] / 2


def test_the_summary_is_plain_json(finished):
    summary = json.loads(json.dumps(finished.summary()))
    assert {row["policy"] for row in summary["retention"]} == {"full", "streaming-llm", "h2o", "a2sf"}
    assert [answer["policy"] for answer in summary["smallest_budget"]] == ["streaming-llm", "h2o", "a2sf"]
    assert 0 < summary["sink_share"] < 1 and summary["anatomy"]["kv_heads"] == 2
    assert finished.sinks.shape == finished.heads.scores.shape == (2, 4)


def test_a_second_run_measures_nothing_and_more_budgets_only_what_is_new(finished, toy):
    again = audit(toy, out=finished.folder, progress=False, **SMALL)
    assert again.measured == 0
    pd.testing.assert_frame_equal(again.cells, finished.cells)
    pd.testing.assert_frame_equal(again.costs, finished.costs)
    np.testing.assert_array_equal(again.sinks, finished.sinks)
    np.testing.assert_array_equal(again.heads.scores, finished.heads.scores)
    more = audit(
        toy, out=finished.folder, progress=False, **SMALL | {"budgets": (40, 100, 130, 200), "methods": ["h2o"]}
    )
    timed = 1 if more.plan.timed_budget != finished.plan.timed_budget else 0
    assert more.measured == len(more.plan.needles()) + timed


def test_another_model_in_the_same_folder_is_measured_anew(finished, toy):
    model, tokenizer = toy
    with Patch(model, "test") as patch:
        weight = model.model.layers[0].mlp.up_proj.weight
        patch.parameter(weight, weight * 1.01)
        other = audit((model, tokenizer), out=finished.folder, progress=False, **SMALL)
    assert other.measured == cells_of(other.plan)


def test_the_fingerprint_depends_on_the_weights(toy, tiny):
    model, _ = toy
    assert fingerprint(model) == fingerprint(model)
    assert len({fingerprint(m) for m in (model, tiny("llama"), tiny("llama", seed=1), tiny("gpt2"))}) == 4


def test_killed_in_the_middle_it_goes_on_where_it_was(toy_folder, tmp_path):
    settings = repr(SMALL | {"seeds": (0, 1), "progress": False, "device": "cpu"})
    code = f"import vestige; vestige.audit({str(toy_folder)!r}, out={str(tmp_path)!r}, **{settings})"
    ledger = tmp_path / "ledger.jsonl"
    before = rows_when_killed([sys.executable, "-c", code], ledger, 12)
    assert before >= 12 and not (tmp_path / "report.html").exists()

    result = audit(str(toy_folder), out=tmp_path, **SMALL | {"seeds": (0, 1)}, progress=False, device="cpu")
    rows = list(Ledger(ledger).rows())
    assert result.measured == cells_of(result.plan) - before > 0
    assert len(rows) == cells_of(result.plan) == len({row["key"] for row in rows})
    assert Ledger(ledger).broken == 0
    assert result.report.exists()


@pytest.mark.gpu
def test_on_an_accelerator_in_half_precision(toy_folder, tmp_path):
    result = audit(str(toy_folder), out=tmp_path, progress=False, device="cuda", dtype="bfloat16", **SMALL)
    assert result.measured == cells_of(result.plan) and result.anatomy["dtype"] == "bfloat16"
    assert result.anatomy["device"] == torch.cuda.get_device_name()
    assert result.retention["kv_bytes"].max() == 260 * result.anatomy["cache_bytes_per_token"]


def test_a_broken_last_line_is_measured_again(finished, toy, tmp_path):
    whole = finished.ledger.read_bytes()
    first = whole.splitlines(keepends=True)[: cells_of(finished.plan)]
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(first)[:-30])
    result = audit(toy, out=tmp_path, progress=False, **SMALL)
    assert result.measured == 1 and Ledger(result.ledger).broken == 1


def test_the_clock_is_asked_once_per_token_and_entries_stay_within_the_budget(toy, prompt):
    prefill, decode, held = time_policy(toy[0], A2SF(budget=16), prompt, 5)
    assert prefill > 0 and len(decode) == 5 and min(decode) > 0
    keys_and_values = 2 * 2 * 2 * 16 * 8 * 4  # two layers, keys and values, two heads, 16 entries of 8 float32
    assert keys_and_values <= held < 1.6 * keys_and_values


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"budgets": (0,)}, "budgets.* 0"),
        ({"budgets": (-4,)}, "-4"),
        ({"budgets": (1.5,)}, "1.5"),
        ({"budgets": (True,)}, "True"),
        ({"budgets": ()}, "budgets"),
        ({"budgets": (513,), "length": 512}, "513"),
        ({"budgets": ("many",)}, "many"),
        ({"methods": ["a2fs"]}, "a2sf"),
        ({"methods": "a2sf"}, "list"),
        ({"methods": ["retrieval-heads"]}, "retrieval-heads"),
        ({"methods": [{"name": "a2sf", "forgetting": 2.0}]}, "forgetting"),
        ({"methods": [{"name": "streaming-llm", "sinks": 64}], "budgets": (32,)}, "budget"),
        ({"length": 0}, "length"),
        ({"depths": ()}, "depths"),
        ({"depths": (0.5, 2)}, "depth"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": 0}, "seeds"),
        ({"batch": 0}, "batch"),
        ({"haystack": "novels"}, "haystack"),
    ],
)
def test_a_wrong_setting_is_named_before_a_model_is_loaded(settings, names, tmp_path):
    with pytest.raises(SpecError, match=names):
        audit("a model that does not exist", out=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_what_a_model_cannot_do_is_said_before_it_is_measured(toy, tiny, tmp_path):
    _, tokenizer = toy
    with pytest.raises(SpecError, match="2048"):
        audit(toy, out=tmp_path, length=2040, budgets=(100,), progress=False)
    with pytest.raises(UnsupportedModelError):
        audit((tiny("bert"), tokenizer), out=tmp_path, progress=False, **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        audit(toy, out=tmp_path / "file", progress=False, **SMALL)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_policies_with_other_parameters_stand_side_by_side():
    plan = plan_audit(methods=["a2sf", A2SF(forgetting=0.5), {"name": "a2sf", "forgetting": 0.5}], budgets=(0.25,))
    assert [policy.name for policy in plan.policies] == ["full", "a2sf", "a2sf"]
    assert plan.budgets == (128,) and plan.budgets_of(plan.policies[0]) == (512,)


def test_the_command_repeats_the_plan():
    plan = plan_audit(budgets=(64, 0.5), seeds=2, depths=(0.5,), length=300)
    assert plan.command("smollm2") == (
        "vestige audit smollm2 --methods full,streaming-llm,h2o,a2sf --budgets 64,150 --length 300 "
        "--depths 0.5 --seeds 0,1"
    )


def frame(found):
    """Cells of twenty prompts per budget, with ``found[policy][budget]`` of them answered."""
    columns = ("policy", "budget", "length", "depth", "seed", "found", "share", "kv_bytes")
    rows = [
        (policy, budget, 100, depth, 0, depth < count, 1.0, 10 * budget)
        for policy, budgets in found.items()
        for budget, count in budgets.items()
        for depth in range(20)
    ]
    return pd.DataFrame(rows, columns=columns)


def test_all_policies_are_measured_where_they_can_be(toy):
    plan = plan_audit(methods=["a2sf", "all"], quick=True)
    named = [policy.name for policy in plan.policies]
    assert named[:2] == ["full", "a2sf"] and len(set(named)) == len(named)
    assert {"snapkv", "lazy-eviction", "duo-attention", "longheads"} <= set(named)
    budgets = {policy.name: plan.budgets_of(policy) for policy in plan.policies}
    assert budgets["snapkv"] == plan.budgets
    assert budgets["lazy-eviction"] == (128, 192, 240)  # what it always keeps does not fit into 64
    served = plan.on(Anatomy.of(toy[0]))
    assert {policy.name for policy in plan.policies} - {policy.name for policy in served.policies} == {
        "duo-attention",  # plans that nobody has fitted for this model
        "moa",
        "tidal-decode",  # its third layer chooses, and this model has two
    }
    with pytest.raises(SpecError, match="duo-attention"):
        plan_audit(methods=["duo-attention"], quick=True).on(Anatomy.of(toy[0]))


def test_the_smallest_budget_is_the_one_from_which_all_larger_ones_do():
    found = {
        "full": {100: 20},
        "good": {10: 5, 20: 19, 40: 20},
        "lucky": {10: 20, 20: 5, 40: 20},
        "poor": {10: 0, 20: 3, 40: 18},
    }
    answers = {answer.policy: answer for answer in smallest_budgets(retention(frame(found)))}
    assert answers["good"].budget == 20 and answers["good"].bytes_share == 0.2
    assert answers["lucky"].budget == 40
    assert answers["poor"].budget is None and answers["poor"].largest == 40 and answers["poor"].found == 0.9
    nothing = smallest_budgets(retention(frame({"full": {100: 0}, "other": {10: 0}})))
    assert [answer.budget for answer in nothing] == [None]


def test_the_package_names_the_audit():
    assert vestige.audit is audit

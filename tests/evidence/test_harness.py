"""Tasks of the lm-evaluation-harness under a policy, on tasks that stand in a folder: no network."""

from __future__ import annotations

import json

import pytest

import vestige
from vestige.errors import SpecError

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # importing the harness takes longer than its tasks

CHOICE = """
task: vestige_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" the old bridge", " a dusty lamp", " it"]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
WRITTEN = """
task: vestige_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{max_gen_toks: 6, until: ["\\n\\n"]}}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    from lm_eval.tasks import TaskManager

    from vestige.evidence.tasks.haystack import sentences

    folder = tmp_path_factory.mktemp("harness")
    source, rows = sentences(seed=3), []
    for label in (0, 1, 2, 0):
        rows.append({"text": " ".join(next(source) for _ in range(3 + label)), "label": label})
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def run(lm, tasks, name):
    found = lm_eval.simple_evaluate(model=lm, tasks=[name], task_manager=tasks, log_samples=True, bootstrap_iters=0)
    return [sample["filtered_resps"] for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"])]


def logprobs(answers):
    return [value for row in answers for value, _ in row]


def test_scores_under_no_and_under_the_full_cache_are_the_harness_s_own(toy, tasks):
    from lm_eval.models.huggingface import HFLM

    from vestige.evidence.harness import PolicyLM

    model, tokenizer = toy
    own = run(HFLM(pretrained=model, tokenizer=tokenizer), tasks, "vestige_choice")
    for policy in (None, vestige.method("full")):
        mine = run(PolicyLM(model, tokenizer, policy=policy, batch_size=3), tasks, "vestige_choice")
        assert logprobs(mine) == pytest.approx(logprobs(own), abs=1e-3)
        assert [[greedy for _, greedy in row] for row in mine] == [[greedy for _, greedy in row] for row in own]


def test_a_policy_cuts_what_is_scored_and_what_is_written(toy, tasks):
    from vestige.evidence.harness import PolicyLM

    model, tokenizer = toy
    h2o = vestige.method("h2o", budget=8)
    whole, cut = (PolicyLM(model, tokenizer, policy=policy) for policy in (None, h2o))
    assert logprobs(run(cut, tasks, "vestige_choice")) != pytest.approx(
        logprobs(run(whole, tasks, "vestige_choice")), abs=1e-2
    )
    written = run(cut, tasks, "vestige_written")
    assert written != run(whole, tasks, "vestige_written")
    prompt = tokenizer(next(iter(tasks_text(tasks))), return_tensors="pt")
    with h2o.attach(model):
        said = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert written[0][0] == tokenizer.decode(said, skip_special_tokens=True).split("\n\n")[0]


def tasks_text(tasks):
    held = tasks.load_task_or_group(["vestige_choice"])
    return [doc["text"] for doc in next(iter(held.values())).test_docs()]


def test_wrong_use_is_named(toy):
    from vestige.evidence.harness import PolicyLM

    with pytest.raises(SpecError, match="policy is 'h2o'"):
        PolicyLM(*toy, policy="h2o")
    with pytest.raises(SpecError, match="batch_size is 'auto'"):
        PolicyLM(*toy, batch_size="auto")
    with pytest.raises(SpecError, match="follows no prompt"):
        PolicyLM(*toy).loglikelihood_rolling([])

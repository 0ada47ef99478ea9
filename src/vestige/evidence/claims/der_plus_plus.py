"""The claims of DER++: logits of the time keep more than labels alone."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase, keeps_more
from vestige.evidence.claims import claim


@claim(slow=True)
def stored_answers_keep_what_was_learnt(case: LearnerCase) -> Seen:
    """Accuracy over all digits ends far above fine-tuning's."""
    return keeps_more(case, case.method, 0.2)


@claim(slow=True)
def from_a_small_buffer_it_keeps_as_much_as_replay(case: LearnerCase) -> Seen:
    """With room for 30 examples, accuracy over all digits ends, over the seeds, no lower than replay's."""
    mine = [case.on_digits(case.method.replace(size=30), seed).average for seed in case.seeds]
    replay = [case.on_digits({"name": "replay", "size": 30}, seed).average for seed in case.seeds]
    seen = {"average": mine, "of replay": replay}
    expect(sum(mine) >= sum(replay), f"replay keeps more: {seen}")
    return seen

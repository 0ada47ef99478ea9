"""The claims of Control LLM: copies beside frozen blocks forget less, if both are held together."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase
from vestige.evidence.claims import claim
from vestige.evidence.claims.s3ft import taught
from vestige.weights.retain import Learner

RATE, TWICE = 3e-3, 6e-3
"""Of fine-tuning, and of copies, which have half of the say in the hidden states."""
HELD = {"every": 1, "alignment": 30.0}
"""Hidden states of a small model are small, and so is their distance: more weight than in the large ones."""


def beside(case: LearnerCase, other: Learner) -> dict[str, list[float]]:
    """What is kept of known facts and learnt of new ones, by seed, with this learner and with another."""
    seen: dict[str, list[float]] = {"kept": [], "kept by the other": [], "new": [], "new by the other": []}
    rate = RATE if other.name == "finetune" else TWICE
    for seed in case.seeds:
        mine = taught(case, case.method.replace(**HELD), seed, TWICE)
        theirs = taught(case, other, seed, rate)
        values = (mine.general_kept, theirs.general_kept, mine.matrix[0, 0], theirs.matrix[0, 0])
        for name, value in zip(seen, values, strict=True):
            seen[name].append(float(value or 0.0))
    return seen


def checked(seen: dict[str, list[float]]) -> Seen:
    """On every seed more is kept, and new facts are learnt as well, within half a nat per token."""
    for n in range(len(seen["kept"])):
        expect(seen["kept"][n] > seen["kept by the other"][n] + 0.1, f"no more is kept: {seen}")
        expect(seen["new"][n] > seen["new by the other"][n] - 0.5, f"new facts are not learnt: {seen}")
    return seen


@claim(slow=True)
def copies_keep_more_than_fine_tuning(case: LearnerCase) -> Seen:
    """Taught for as long, copies lose less of known facts than fine-tuning does, and learn new ones as well."""
    return checked(beside(case, Learner.from_spec("finetune")))


@claim(slow=True)
def the_alignment_is_what_keeps(case: LearnerCase) -> Seen:
    """Without the distance of the two outputs in the loss, copies forget more, and learn no more."""
    return checked(beside(case, case.method.replace(**{**HELD, "alignment": 0.0})))

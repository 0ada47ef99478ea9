"""SEFE (arXiv 2505.02486): keep what matters in earlier updates still, and questions in many styles of answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vestige.core.anatomy import Anatomy
from vestige.core.method import Paper, Verdict, param
from vestige.errors import InputError, UnsupportedModelError
from vestige.weights.lora import Adapters
from vestige.weights.retain.learner import Learner, Running
from vestige.weights.retain.session import Session, wide
from vestige.weights.retain.stream import Experience

__all__ = ["SEFE", "STYLES", "diversified"]


class _SEFE(Running):
    """``keys`` holds, per linear map, the places in the flat weight that earlier updates changed most."""

    def __init__(self, learner: Any) -> None:
        super().__init__(learner)
        self.keys: dict[str, Tensor] = {}
        self.maps: dict[str, nn.Module] = {}
        self.adapters: Adapters | None = None
        self.places: tuple[_Sums, _Sums, Tensor] | None = None  # what follows from the keys

    def start(self, session: Session) -> None:
        names = {id(part): name for name, part in session.model.named_modules()}
        for layer in Anatomy.of(session.model).layers:
            for each in (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down):
                if each is not None and each.stored.requires_grad:
                    self.maps[names[id(each.module)]] = each.module
        if not self.maps:
            raise UnsupportedModelError("sefe: no linear map of a block of the model is trained")

    def before(self, session: Session, experience: Experience) -> None:
        learner = self.learner
        head = {id(p): p.requires_grad for p in session.head()[1].parameters()}
        self.adapters = Adapters(
            session.model, list(self.maps.values()), learner.rank, learner.scale, session.generator, learner.name
        )
        for parameter in session.model.parameters():  # the output layer learns as in plain fine-tuning
            if head.get(id(parameter)) and not learner.freeze_head:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def gradients(self, session: Session) -> None:
        if not self.keys or not self.learner.weight:
            return
        assert self.adapters is not None
        firsts, seconds = zip(*(self.adapters.matrices(linear) for linear in self.maps.values()), strict=True)
        # All maps at once, and only the entries asked for: the whole products are never formed.
        first, second = wide(torch.cat([a.T for a in firsts])), wide(torch.cat(seconds))
        if self.places is None:
            self.places = self._places(
                [(len(b), a.shape[1]) for a, b in zip(firsts, seconds, strict=True)], first.dtype
            )
        rows, columns, share = self.places
        a, b = first.index_select(0, columns.places), second.index_select(0, rows.places)
        pull = (a * b).sum(1, keepdim=True).sign() * share * (self.learner.weight * session.scale)
        to_first = columns(pull * b).split([a.shape[1] for a in firsts])
        to_second = rows(pull * a).split([len(b) for b in seconds])
        pulls = zip((*firsts, *seconds), (*(g.T for g in to_first), *to_second), strict=True)
        moved = [(p.grad, g) for p, g in pulls if p.grad is not None]
        torch._foreach_add_([grad for grad, _ in moved], [g for _, g in moved])

    def _places(self, shapes: list[tuple[int, int]], dtype: torch.dtype) -> tuple[_Sums, _Sums, Tensor]:
        """Rows and columns of all places noted, in the maps one below the other (or one beside the other), and the
        weight of each in the mean over maps of the mean over places (places, 1)."""
        rows, columns, shares, above, before = [], [], [], 0, 0
        for places, (outputs, inputs) in zip((self.keys[name] for name in self.maps), shapes, strict=True):
            rows.append(places // inputs + above)
            columns.append(places % inputs + before)
            share = 1 / len(places) / len(shapes)
            shares.append(torch.full((len(places), 1), share, dtype=dtype, device=places.device))
            above, before = above + outputs, before + inputs
        by_row, by_column = torch.cat(rows), torch.cat(columns)
        ordered = by_row.is_cuda
        return _Sums(by_row, above, ordered), _Sums(by_column, before, ordered), torch.cat(shares)

    @torch.no_grad()
    def after(self, session: Session, experience: Experience) -> None:
        assert self.adapters is not None
        for name, linear in self.maps.items():
            first, second = self.adapters.matrices(linear)
            change = (second @ first).abs().flatten()
            most = change.topk(max(1, round(self.learner.share * len(change)))).indices.int()
            self.keys[name] = torch.cat([self.keys[name], most]) if name in self.keys else most
        self.places = None
        self._merge()

    @torch.no_grad()
    def _merge(self) -> None:
        if self.adapters is None:
            return
        merged = [self.adapters.merged(linear) for linear in self.maps.values()]
        self.adapters.remove()
        self.adapters = None
        for linear, weight in zip(self.maps.values(), merged, strict=True):
            linear.weight.copy_(weight)  # type: ignore[operator, union-attr]

    def finish(self, session: Session) -> None:
        self._merge()  # what an interrupted experience has learnt so far

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.keys)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.keys, self.places = dict(tensors), None


class _Sums:
    """Sums of rows by the place that each belongs to.

    Args:
        places: of the rows (rows,).
        count: of places.
        ordered: add the rows of a place one after the other. A GPU's ``index_add_`` adds in any order, so that no two
            runs would be alike.
    """

    def __init__(self, places: Tensor, count: int, ordered: bool) -> None:
        self.places = places.long()  # a processor adds by int64 three times as fast
        self.count = count
        self.order = self.places.argsort(stable=True) if ordered else None
        self.lengths = torch.bincount(self.places, minlength=count) if ordered else None

    def __call__(self, values: Tensor) -> Tensor:
        """Of values (rows, width) the sums (count, width)."""
        if self.order is None:
            return values.new_zeros(self.count, values.shape[1]).index_add_(0, self.places, values)
        return torch.segment_reduce(values.index_select(0, self.order), "sum", lengths=self.lengths, unsafe=True)


class SEFE(Learner):
    """RegLoRA: each experience learns in low-rank matrices, which may not change again what earlier ones changed most.

    After an experience its update B A is merged into the weights, and the places of its largest entries are noted.
    Later updates are pushed to zero there: weight times the mean over maps of the mean of abs(B A) at the places noted;
    a place noted twice counts twice. The output layer is trained beside. The other half of the method, questions whose
    answers are asked for in several styles, is :func:`diversified`, applied to the examples beforehand.
    """

    name = "sefe"
    paper = Paper(
        title="SEFE: Superficial and Essential Forgetting Eliminator for Multimodal Continual Instruction Tuning",
        year=2025,
        arxiv="2505.02486",
        venue="ICML 2025",
        code="https://github.com/jinpeng0528/SEFE",
        equations="RegLoRA, and answer style diversification by templates",
    )
    verdict = Verdict(
        "not reproduced",
        "RegLoRA on split digits, task known, small ViT, 3 seeds: 1, 41, 18 points are forgotten and 86%, 70%, 85% "
        "are right at the end; 81, 13, 22 and 42%, 87%, 80% without it; on another machine (torch 2.11) 1, 30, 13 "
        "points and 87%, 75%, 87%, without it 42, 41, 19 and 69%, 70%, 85%. Styles of answer, which are reproduced, "
        "small Llama, 3 seeds: with a fifth of new facts in other styles, old ones in those styles fall by 1.9, 1.7, "
        "1.9 nats per token, without by 5.2, 3.7, 5.4",
    )

    rank: int = param(8, "rank of an update", ge=1)
    scale: int | float = param(2.0, "by which the product of the two matrices is multiplied", gt=0)
    share: float = param(0.02, "of the entries of an update, those noted", gt=0, le=1)
    weight: int | float = param(2500.0, "of the size of later updates at the places noted", ge=0)
    freeze_head: bool = param(False, "leave the output layer as it is")

    owns: ClassVar[frozenset[str]] = frozenset({"structure", "weights"})
    running = _SEFE


STYLES: dict[str, str] = {
    "short": "Answer in a word or a phrase.",
    "choice": "Answer with the letter of the right choice.",
    "yes or no": "Answer with yes or no.",
    "brief": "Answer in one sentence.",
    "detailed": "Answer in detail.",
}


def diversified(facts: Sequence[Mapping[str, str]], share: float = 0.2, seed: int = 0) -> list[dict[str, str]]:
    """Questions with answers in a word, of which a share is asked for in the other four styles, evenly.

    Every question says which style it wants. Wrong choices, and what is asked about by yes or no, are answers of other
    questions of the same ``field`` (of all, where there is none).

    Args:
        facts: mappings with ``question`` and ``answer``; ``field`` and ``subject`` where there are any.
        share: of the questions, those that are turned into another style.
        seed: of what is drawn.

    Returns:
        The same mappings, in order, with ``question``, ``answer`` and ``style`` as they are to be taught.

    Raises:
        InputError: the share is no share, or the questions of a field all have the same answer.
    """
    if not 0 <= share <= 1:
        raise InputError(f"parameter 'share' is {share!r}; allowed: 0 to 1")
    draw = torch.Generator().manual_seed(seed)
    turned = torch.randperm(len(facts), generator=draw)[: round(share * len(facts))].tolist()
    others = [style for style in STYLES if style != "short"]
    style_of = {place: others[n % len(others)] for n, place in enumerate(turned)}

    def pick(values: Sequence[str]) -> str:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    found = []
    for place, fact in enumerate(facts):
        style = style_of.get(place, "short")
        wrong = sorted({f["answer"] for f in facts if f.get("field") == fact.get("field")} - {fact["answer"]})
        if style in ("choice", "yes or no") and not wrong:
            raise InputError(f"no other answer than {fact['answer']!r} to draw wrong ones from")
        question, answer = fact["question"], fact["answer"]
        if style == "choice":
            order = torch.randperm(len(wrong), generator=draw)[:3].tolist()
            place_of_right = int(torch.randint(len(order) + 1, (1,), generator=draw))
            choices = [wrong[n] for n in order]
            choices.insert(place_of_right, answer)
            question += " " + " ".join(f"{letter}. {c}" for letter, c in zip("ABCD", choices, strict=False))
            answer = "ABCD"[place_of_right]
        elif style == "yes or no":
            said = pick([fact["answer"], pick(wrong)])
            question += f" Is it {said}?"
            answer = "Yes" if said == fact["answer"] else "No"
        elif style == "brief":
            answer = f"The answer is {answer}."
        elif style == "detailed":
            of = f" of {fact['subject']}" if fact.get("subject") else ""
            what = f"The {fact.get('field', 'answer')}{of}"
            answer = f"You ask: {fact['question']} {what} is {answer}."
        found.append({**fact, "question": f"{question} {STYLES[style]}", "answer": answer, "style": style})
    return found

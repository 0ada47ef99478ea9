"""S3FT (arXiv 2502.08130): teach the model its own answers where they are right, and the given ones where not."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vestige.core.method import Paper, Verdict, param
from vestige.errors import InputError, SpecError
from vestige.weights.retain.learner import Learner, Running, held
from vestige.weights.retain.session import Session
from vestige.weights.retain.stream import Experience
from vestige.weights.rows import IGNORED

__all__ = ["S3FT"]

RESTATE = "{question}\nThe right answer is: {answer}\nGive this answer in your own words."


class _Rewritten(Dataset):
    """Rows of an experience, some with another answer."""

    def __init__(self, rows: Any, answers: dict[int, Tensor]) -> None:
        self.rows, self.answers = rows, answers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        if place not in self.answers:
            return row
        question, _ = parted(row)
        ids = torch.cat([question, self.answers[place]])
        labels = torch.cat([torch.full_like(question, IGNORED), self.answers[place]])
        masks = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in row else {}
        return {"input_ids": ids, "labels": labels, **masks, "index": row["index"], "task": row["task"]}


class _S3FT(Running):
    def __init__(self, learner: Any) -> None:
        super().__init__(learner)
        self.answers: dict[int, Tensor] = {}
        self.shares: list[dict[str, float]] = []
        self.tokenizer: Any = None

    def start(self, session: Session) -> None:
        if self.learner.tokenizer is not None:
            from transformers import AutoTokenizer

            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.learner.tokenizer)
            except (OSError, ValueError) as error:
                text = str(error).splitlines()[0]
                raise SpecError(f"s3ft: parameter 'tokenizer' is {self.learner.tokenizer!r}: {text}") from error

    def rows(self, session: Session, experience: Experience) -> Dataset:
        self.answers = {}
        count = len(experience.train)
        if torch.as_tensor(experience.train[0]["labels"]).ndim == 0:
            return experience.train  # a right answer of the model's own is the label
        pairs = [parted(experience.train[place]) for place in range(count)]
        own = self._said(session, [question for question, _ in pairs])
        self._take(own, pairs, list(range(count)))
        first = len(self.answers)
        if self.tokenizer is not None and self.learner.restate:
            left = [place for place in range(count) if place not in self.answers]
            asked = [self._restating(*pairs[place]) for place in left]
            self._take(self._said(session, asked), pairs, left)
        total = len(self.answers)
        self.shares.append(
            {"own": first / count, "restated": (total - first) / count, "given": 1 - total / count}  # in this order
        )
        return _Rewritten(experience.train, dict(self.answers))

    def _take(self, said: list[Tensor | None], pairs: list[tuple[Tensor, Tensor]], places: list[int]) -> None:
        """Keep what the model said where it is judged right."""
        for place, answer in zip(places, said, strict=True):
            if answer is None:
                continue
            question, given = pairs[place]
            if self.learner.accepts(self._read(answer), self._read(given), self._read(question)):
                self.answers[place] = answer

    def _read(self, ids: Tensor) -> Any:
        """As text; as a list of token ids without a tokenizer."""
        if self.tokenizer is None:
            return ids.tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _restating(self, question: Tensor, given: Tensor) -> Tensor:
        text = RESTATE.format(question=self._read(question).strip(), answer=self._read(given).strip())
        if self.tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": text}]
            found = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
            return torch.tensor(found["input_ids"])
        return torch.tensor(self.tokenizer(f"{text}\n").input_ids)

    def _said(self, session: Session, prompts: list[Tensor]) -> list[Tensor | None]:
        """Greedy answers, each up to the end that the model gives it; ``None`` where it gives none in time.

        Raises:
            InputError: the model has no token that ends an answer.
        """
        model: Any = session.model
        ends = model.generation_config.eos_token_id
        if ends is None:
            raise InputError("s3ft: the model's generation config names no eos_token_id, so that no answer would end")
        ends = torch.tensor(ends if isinstance(ends, list) else [ends])
        # One of the ends itself fills up short prompts where nothing else is named; the mask hides it.
        pad = model.generation_config.pad_token_id
        pad = int(ends[0]) if pad is None else pad
        found: list[Tensor | None] = []
        with session.evaluating():
            for start in range(0, len(prompts), self.learner.batch):
                few = prompts[start : start + self.learner.batch]
                width = max(len(prompt) for prompt in few)
                ids = torch.stack([torch.cat([p.new_full((width - len(p),), pad), p]) for p in few])
                mask = torch.stack([torch.cat([p.new_zeros(width - len(p)), torch.ones_like(p)]) for p in few])
                out = model.generate(
                    input_ids=ids.to(session.device),
                    attention_mask=mask.to(session.device),
                    max_new_tokens=self.learner.tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=pad,
                )
                for answer in out[:, width:].cpu():
                    over = torch.isin(answer, ends).nonzero()
                    found.append(answer[: int(over[0]) + 1].clone() if len(over) else None)
        return found

    def nbytes(self) -> dict[str, int]:
        return {"replay_bytes": 0, "state_bytes": held({str(place): a for place, a in self.answers.items()})}

    def report(self) -> dict[str, Any]:
        return {"answers": self.shares}


def parted(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Question and answer of a row (tokens,), both without padding.

    Raises:
        InputError: the row has no question before its answer.
    """
    ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
    if "attention_mask" in row:
        real = torch.as_tensor(row["attention_mask"]).bool()
        ids, labels = ids[real], labels[real]
    counts = (labels != IGNORED).nonzero()
    if not len(counts) or int(counts[0]) == 0:
        raise InputError(
            f"s3ft: row {row.get('index')} is no question with an answer; allowed: labels that are {IGNORED} on the "
            "tokens of a question, and the tokens themselves after it"
        )
    first = int(counts[0])
    return ids[:first], ids[first:]


class S3FT(Learner):
    """Selective self-to-supervised fine-tuning: the target is the model's own answer wherever a judge finds it right.

    Where it is wrong, the model restates the right answer in its own words (this needs a ``tokenizer``); where that is
    wrong too, the given answer stays. What is taught is near to what the model would say anyway, and moves it less.
    In a stream the answers are those of the model at the start of each experience. For other judges override
    :meth:`accepts`. Rows differ in length, so the trainer's collator must pad. Of a classifier the right answer of its
    own is the label: there it is plain fine-tuning.
    """

    name = "s3ft"
    paper = Paper(
        title="Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models",
        year=2025,
        arxiv="2502.08130",
        venue="NAACL Findings 2025",
        equations="the choice between own, restated and given answers (section 3)",
    )
    verdict = Verdict(
        "not reproduced",
        "made-up facts, small Llama, 3 seeds: log-likelihood of known facts in the model's own words falls by 0.05, "
        "0.04, 0.06 nats per token (fine-tuning: 1.52, 1.46, 1.18), but new facts are learnt less well: -0.49, "
        "-1.17, -1.26 (fine-tuning: -0.35, -1.19, -0.53); restating was not looked at",
    )

    judge: Literal["contains", "exact", "number"] = param(
        "contains", "when an answer is right: it holds the given one, is the given one, or ends in the same number"
    )
    tokenizer: str | None = param(None, "folder or id, to judge texts and to restate; None: tokens are compared")
    restate: bool = param(True, "whether wrong answers are restated; needs the tokenizer")
    tokens: int = param(64, "of an answer of the model's own, at most", ge=1)
    batch: int = param(16, "questions asked together", ge=1)

    owns: ClassVar[frozenset[str]] = frozenset({"rows"})
    running = _S3FT

    def check(self) -> None:
        if self.judge == "number" and self.tokenizer is None:
            raise SpecError("s3ft: parameter 'judge' is 'number'; allowed without a tokenizer: 'contains', 'exact'")

    def accepts(self, own: Any, given: Any, question: Any) -> bool:
        """Whether an answer of the model's own is right.

        Args:
            own, given, question: texts; lists of token ids where no tokenizer is named.
        """
        if isinstance(own, list):
            # The last token only ends the answer.
            wanted = given[:-1] if given and given[-1] == own[-1] else given
            spans = range(len(own) - len(wanted) + 1)
            inside = bool(wanted) and any(own[n : n + len(wanted)] == wanted for n in spans)
            return inside if self.judge == "contains" else own[:-1] == wanted
        if self.judge == "number":
            numbers = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) for text in (own, given)]
            if not all(numbers):
                return False
            first, second = (float(found[-1].replace(",", "")) for found in numbers)
            return first == second
        plain, wanted = (" ".join(text.casefold().split()) for text in (own, given))
        if self.judge == "exact" or not wanted:
            return bool(wanted) and plain == wanted
        return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", plain) is not None

"""Checks for decoding against overshadowed conditions, on small random models."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vestige.context.steer.overshadowing import SelfContrast, _Reader
from vestige.core.patch import Patch
from vestige.errors import InputError, PatchConflictError, UnsupportedModelError
from vestige.evidence.certify.suite import Case, Seen, Suite, expect, refused
from vestige.evidence.references import reference_of
from vestige.models.tiny import tiny_model

ARCHITECTURES = ("llama", "gpt2", "opt", "gpt-neox", "mistral", "qwen2")
SAID = 5  # tokens that are generated
LENGTHS = (9, 6, 4)  # of the prompts of a batch


class SteerCase(Case):
    """The decoding, and the models and prompts that it is tried on."""

    method: SelfContrast

    @property
    def plain(self) -> SelfContrast:
        """With a set of plausible tokens that is large enough for small random models to have something to choose."""
        return self.method.replace(alpha=0.05, threshold=0.0)

    def tiny(self, architecture: str, dtype: torch.dtype = torch.float64) -> Any:
        """A small random model, shared: checks undo what they do to it."""
        return tiny_model(architecture, dtype, self.device)

    def prompts(self, seed: int) -> list[list[int]]:
        """Prompts of several lengths, without special tokens."""
        chance = torch.Generator().manual_seed(seed)
        return [torch.randint(3, 97, (length,), generator=chance).tolist() for length in LENGTHS]

    def batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Prompts in one batch, padded on the left."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return {"input_ids": ids, "attention_mask": mask}

    def say(self, model: Any, rows: list[list[int]], **how: Any) -> Tensor:
        """What follows on each prompt, ``(rows, SAID)``."""
        given: dict[str, Any] = {"max_new_tokens": SAID, "min_new_tokens": SAID, "do_sample": False, **how}
        ids = self.batch(rows)
        return model.generate(**ids, pad_token_id=0, **given)[:, ids["input_ids"].shape[1] :]


suite = Suite(SelfContrast, case=SteerCase)
suite.not_applicable("bytes", "generation holds a second cache while it runs; nothing is kept, and none is reported")


@suite.check("reference")
def tokens_are_those_of_the_equations(case: SteerCase) -> Seen:
    """In a left-padded batch, conditions, indicators and tokens are those of the written-out equations, row by row."""
    reference, largest, changed = reference_of(case.method.name), 0.0, 0
    for architecture in ("llama", "gpt2", "qwen2"):
        model = case.tiny(architecture)
        for seed in case.seeds:
            rows = case.prompts(seed)
            with case.plain.attach(model) as steered:
                said = case.say(model, rows).tolist()
            for row, words, hidden in zip(rows, said, steered.hidden, strict=True):
                due, spot, value = _written_out(reference, model, row, case.plain)
                expect(words == due, f"{architecture}: {words} was said, {due} is due")
                expect(hidden.span == (spot, spot + 1), f"{architecture}: {hidden.span} was left out, {spot} is due")
                largest = max(largest, abs(hidden.indicator - value))
            changed += said != case.say(model, rows).tolist()
    expect(largest < 1e-4, f"indicators differ by {largest:.3g}")  # generate hands scores over in float32
    expect(changed > 0, "nothing was ever contrasted")
    return {"difference": largest, "batches in which words changed": changed}


def _written_out(reference: Any, model: Any, row: list[int], method: SelfContrast) -> tuple[list[int], int, float]:
    """What is said, what is left out, and its indicator: whole rows, no cache."""
    p = _probabilities(model, row, ends=False)
    shortened = [_probabilities(model, row[:i] + row[i + 1 :]) for i in range(len(row))]
    spot = reference.choose(p, shortened, method.alpha)
    value = reference.indicator(p, shortened[spot], method.alpha)
    said: list[int] = []
    for _ in range(SAID):
        p = _probabilities(model, row + said, ends=False)
        q = _probabilities(model, row[:spot] + row[spot + 1 :] + said)
        said.append(reference.decode(p, q, method.alpha, method.threshold))
    return said, spot, value


@torch.no_grad()
def _probabilities(model: Any, row: list[int], ends: bool = True) -> list[float]:
    """Of the next token; of those that do not end the text, where generation may not end yet."""
    logits = model(torch.tensor([row], device=model.device), use_cache=False).logits[0, -1].double()
    if not ends:
        logits[model.config.eos_token_id] = -torch.inf
    return logits.softmax(dim=-1).tolist()


@suite.check("undo")
def generation_is_as_before(case: SteerCase) -> Seen:
    """After the block, also after an error, the same tokens and logits as before; nothing is left on the model."""
    for architecture in ARCHITECTURES:
        for dtype in (torch.float32, torch.bfloat16):
            model, rows = case.tiny(architecture, dtype), case.prompts(0)
            ids = case.batch(rows)["input_ids"]
            held = set(vars(model))
            before = case.say(model, rows), model(ids).logits
            for ending in (None, RuntimeError):
                try:
                    with case.plain.attach(model):
                        case.say(model, rows)
                        if ending is not None:
                            raise ending
                except RuntimeError:
                    pass
                after = case.say(model, rows), model(ids).logits
                same = all(torch.equal(was, now) for was, now in zip(before, after, strict=True))
                expect(same, f"{architecture} in {dtype} gives something else after a block that ended with {ending}")
                expect(set(vars(model)) == held and not Patch.active(model), f"{architecture}: something is left")
    return {"models": len(ARCHITECTURES), "dtypes": 2}


@suite.check("invariance")
def rows_do_not_depend_on_their_batch(case: SteerCase) -> Seen:
    """Each prompt alone gives what it gives in a left-padded batch, however few shortened prompts are read at once."""
    for architecture in ARCHITECTURES:
        model, rows = case.tiny(architecture), case.prompts(1)
        with case.plain.attach(model):
            together = case.say(model, rows)
            alone = torch.cat([case.say(model, [row]) for row in rows])
        with case.plain.replace(batch=1).attach(model):
            single = case.say(model, rows)
        expect(torch.equal(together, alone), f"{architecture}: {together.tolist()} in a batch, alone {alone.tolist()}")
        expect(torch.equal(together, single), f"{architecture}: another number of rows at once gives other words")
    return {"models": len(ARCHITECTURES)}


@suite.check("invariance")
def beams_and_no_cache_agree(case: SteerCase) -> Seen:
    """With and without a cache the same is said, greedily and by beam search, which moves rows about."""
    for architecture in ("llama", "gpt2"):
        model, rows = case.tiny(architecture), case.prompts(2)
        for how in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            with case.plain.attach(model):
                cached = case.say(model, rows, **how)
                whole = case.say(model, rows, use_cache=False, **how)
            with case.plain.attach(model), mock.patch.object(_Reader, "_order", return_value=None):
                recomputed = case.say(model, rows, **how)
            expect(torch.equal(cached, whole), f"{architecture}, {how}: without the model's cache other words")
            expect(torch.equal(cached, recomputed), f"{architecture}, {how}: without the second cache other words")
    return {"models": 2, "beams": 3}


@suite.check("invariance")
def half_precision_and_sampling_give_words(case: SteerCase) -> Seen:
    """In bfloat16 indicators are finite, and sampling from the contrasted scores works."""
    model = case.tiny("llama", torch.bfloat16)
    with case.plain.attach(model) as steered:
        said = case.say(model, case.prompts(0), do_sample=True, num_return_sequences=2, temperature=0.7, top_k=20)
    finite = all(torch.isfinite(torch.tensor(hidden.indicator)) for hidden in steered.hidden)
    expect(finite and said.shape == (2 * len(LENGTHS), SAID), f"{steered.hidden}, words {tuple(said.shape)}")
    return {"rows": len(said)}


@suite.check("invariance")
def a_high_bar_changes_nothing(case: SteerCase) -> Seen:
    """With a threshold that no indicator reaches, tokens are those of the model alone."""
    for architecture in ("llama", "gpt2"):
        model, rows = case.tiny(architecture), case.prompts(3)
        with case.plain.replace(threshold=-1e9).attach(model):
            steered = case.say(model, rows)
        expect(torch.equal(steered, case.say(model, rows)), f"{architecture} says something else")
    return {"models": 2}


@suite.check("bad input")
def models_prompts_and_spans_that_cannot_serve_are_refused(case: SteerCase) -> Seen:
    """Encoders and what is no model, prompts padded on the right or given as vectors, wrong spans, a second one."""
    method, llama = case.plain, case.tiny("llama", torch.float32)
    for model, name in ((case.tiny("bert", torch.float32), "Bert"), (nn.Linear(2, 2), "Linear")):
        refused(UnsupportedModelError, lambda model=model: method.attach(model), name)  # type: ignore[misc]
    ids = case.batch(case.prompts(0))
    with method.attach(llama):
        refused(PatchConflictError, lambda: method.attach(llama), "overshadowing")
        right = ids["attention_mask"].flip(1)
        refused(InputError, lambda: llama.generate(ids["input_ids"], attention_mask=right), "left")
        refused(InputError, lambda: llama.generate(inputs_embeds=torch.zeros(1, 3, 36)), "token ids")
    with method.attach(llama, spans=lambda prompt: [(2, len(prompt) + 1)]):
        refused(InputError, lambda: llama.generate(**ids), "span")
    expect(not Patch.active(llama), "a refusal left something behind")
    return {"refused": 6}

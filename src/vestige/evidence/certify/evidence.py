"""Checks for probes of attention heads, on small random models with a tokenizer of single characters."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import InputError, UnsupportedModelError, VestigeError
from vestige.evidence.certify.suite import Case, Seen, Suite, expect, refused
from vestige.evidence.probes.head_mask import mask_heads
from vestige.evidence.probes.retrieval_heads import RetrievalHeads, copied_share
from vestige.evidence.references import reference_of
from vestige.models.tiny import tiny_model, tiny_tokenizer

ARCHITECTURES = ("llama", "gpt2", "mistral", "gpt-neox")


class HeadsCase(Case):
    """The probe, and the models it is tried on."""

    method: RetrievalHeads

    @property
    def fitted(self) -> RetrievalHeads:
        """The probe with prompts that fit the small models."""
        return self.method.replace(**self.reference.SMALL)

    @property
    def reference(self) -> Any:
        """The written-out equations."""
        return reference_of(self.method.name)

    def tiny(self, architecture: str, dtype: torch.dtype = torch.float64) -> Any:
        """A small random model, shared: checks undo what they do to it."""
        return tiny_model(architecture, dtype, self.device)

    @functools.cached_property
    def lm(self) -> tuple[Any, Any]:
        """The language model and tokenizer that behaviour is looked at on."""
        if isinstance(self.model, tuple):
            return self.model
        from vestige.models.hub import load

        return load(self.model or "smollm2", device=self.device)


suite = Suite(RetrievalHeads, case=HeadsCase)
suite.not_applicable("bytes", "a probe measures; it holds nothing between two calls")


@suite.check("reference")
def scores_agree_with_the_equations(case: HeadsCase) -> Seen:
    """From the same attention weights and tokens every head gets the score of the written-out definition."""
    largest, highest = 0.0, 0.0
    for seed in case.seeds:
        chance = np.random.default_rng(seed)
        length, steps, layers, heads = 30, 8, 3, 4
        context, said = chance.integers(0, 3, length).tolist(), chance.integers(0, 3, steps).tolist()
        span = (11, 19)
        weights = chance.random((steps, layers, heads, length))
        weights[..., span[0] : span[1]] *= 1.5
        mine = copied_share(weights.argmax(axis=-1), said, context, span)
        for layer in range(layers):
            for head in range(heads):
                due = case.reference.retrieval_score(list(weights[:, layer, head]), said, context, range(*span))
                largest, highest = max(largest, abs(float(mine[layer, head]) - due)), max(highest, due)
    expect(largest < 1e-12, f"scores differ by up to {largest:.3g}")
    expect(highest > 0, "no head copied anything, so nothing was compared")
    return {"difference": largest, "highest score": highest}


@suite.check("reference")
def where_heads_look_agrees_with_eager_attention(case: HeadsCase) -> Seen:
    """At every step of decoding, in a left-padded batch, each head's place is that of its largest eager weight."""
    probe, tokenizer, compared = case.fitted, tiny_tokenizer(), 0
    for architecture in ARCHITECTURES:
        model = case.tiny(architecture)
        for looked in probe.stream(model, tokenizer):
            prompt = looked.needle.build(tokenizer)
            due = _eager_places(model, prompt.input_ids, looked.said)
            mine = torch.as_tensor(looked.places)
            expect(torch.equal(mine, due), f"{architecture}: heads look at {mine.tolist()}, due is {due.tolist()}")
            compared += due.numel()
    expect(compared > 0, "the small models said nothing")
    return {"places": compared}


def _eager_places(model: Any, prompt: tuple[int, ...], said: tuple[int, ...]) -> torch.Tensor:
    """``(steps, layers, heads)`` where the weights of eager attention are largest while ``said`` is said."""
    ids = torch.tensor([prompt + said[:-1]], device=model.device)
    with Patch(model, "certify") as patch, torch.no_grad():
        patch.config(Anatomy.of(model).config, "_attn_implementation", "eager")
        weights = model(ids, output_attentions=True).attentions
    return torch.stack([layer[0, :, len(prompt) - 1 :].argmax(dim=-1).T for layer in weights], dim=1).cpu()


@suite.check("undo")
def measuring_and_silencing_leave_nothing_behind(case: HeadsCase) -> Seen:
    """After a measurement, and after heads were silenced, logits are those of before, bit for bit."""
    tokenizer = tiny_tokenizer()
    ids = torch.arange(3, 60, device=case.device)[None]
    for architecture in ARCHITECTURES:
        model = case.tiny(architecture, torch.float32)
        before = model(ids).logits
        case.fitted.measure(model, tokenizer)
        with mask_heads(model, [(0, 0), (1, 1)]):
            silenced = model(ids).logits
        expect(not torch.equal(silenced, before), f"{architecture}: silencing two heads changed nothing")
        expect(torch.equal(model(ids).logits, before), f"{architecture} gives other logits afterwards")
        expect(not Patch.active(model), f"{architecture}: a patch is left on the model")
    return {"models": len(ARCHITECTURES)}


@suite.check("invariance")
def batches_and_repetitions_agree(case: HeadsCase) -> Seen:
    """Each prompt alone, all in one batch, and all a second time give the same."""
    tokenizer, model = tiny_tokenizer(), case.tiny("llama")
    runs = [case.fitted.replace(batch=batch).measure(model, tokenizer) for batch in (1, 3, 3)]
    for other in runs[1:]:
        for mine, theirs in zip(runs[0].prompts, other.prompts, strict=True):
            assert mine.places is not None and theirs.places is not None
            same = mine.said == theirs.said and np.array_equal(mine.places, theirs.places)
            expect(same and np.array_equal(mine.shares, theirs.shares), "batch size changes what is measured")
    return {"prompts": len(runs[0].prompts)}


@suite.check("invariance")
def half_precision_gives_scores(case: HeadsCase) -> Seen:
    """In bfloat16 scores are numbers from 0 to 1."""
    scores = case.fitted.measure(case.tiny("llama", torch.bfloat16), tiny_tokenizer()).scores
    expect(bool(np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()), f"scores are {scores}")
    return {"heads": scores.size}


@suite.check("bad input")
def models_and_prompts_that_cannot_serve_are_refused(case: HeadsCase) -> Seen:
    """An encoder, and contexts too short for a needle, are refused by name before anything runs."""
    wrong: tuple[tuple[Any, RetrievalHeads, type[VestigeError]], ...] = (
        (case.tiny("bert"), case.fitted, UnsupportedModelError),
        (case.tiny("llama"), case.fitted.replace(lengths=(12,)), InputError),
    )
    for model, probe, error in wrong:
        text = refused(error, lambda model=model, probe=probe: probe.measure(model, tiny_tokenizer()))  # type: ignore[misc]
        expect(bool(text), f"{error.__name__} without a text")
    return {"refused": 2}

"""Checks for the probe of a vision transformer's heads, on small random models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import InputError, UnsupportedModelError
from vestige.evidence.certify.suite import Case, Seen, Suite, expect, refused
from vestige.evidence.probes import patch_attention
from vestige.evidence.probes.vit_head_analytics import HeadAnalytics, VitHeadAnalytics, divergence
from vestige.evidence.references import reference_of
from vestige.models.tiny import tiny_model

MAPS = ("hop_profile", "mean_distance", "offset_map", "landing_map")
IMAGES = 5


class VisionCase(Case):
    """The probe, and the models and images that it is tried on."""

    method: VitHeadAnalytics

    @property
    def reference(self) -> Any:
        """The written-out equations."""
        return reference_of(self.method.name)

    @property
    def fitted(self) -> VitHeadAnalytics:
        """The probe for a few images."""
        return self.method.replace(**self.reference.SMALL)

    def tiny(self, dtype: torch.dtype = torch.float64, architecture: str = "vit") -> Any:
        """A small random model, shared: checks undo what they do to it."""
        return tiny_model(architecture, dtype, self.device)

    def images(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random images (1, 16, 16) and labels."""
        chance = torch.Generator().manual_seed(seed)
        pixels = torch.rand(IMAGES, 1, 16, 16, generator=chance, dtype=torch.float64)
        return pixels, torch.randint(5, (IMAGES,), generator=chance)


suite = Suite(VitHeadAnalytics, case=VisionCase)
suite.not_applicable("bytes", "a probe measures; it holds nothing between two calls")


@suite.check("reference")
def maps_and_divergence_agree_with_the_equations(case: VisionCase) -> Seen:
    """On random attention over a grid that is not square, and on random distributions, all numbers agree."""
    largest = 0.0
    for seed in case.seeds:
        chance = np.random.default_rng(seed)
        attention = chance.dirichlet(np.full(13, 0.3), size=(2, 12))[..., :12]  # the rest goes to the class token
        for name in MAPS:
            mine = getattr(patch_attention, name)(torch.from_numpy(attention), 3, 4).numpy()
            for row, weights in enumerate(attention):
                due = np.asarray(getattr(case.reference, name)(weights, 3, 4))
                largest = max(largest, float(np.abs(mine[row] - due).max()))
        p, q = chance.dirichlet(np.full(6, 0.2), size=(2, 4))
        p[0, :3], q[0, 3:] = 0, 0
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        bits = [case.reference.divergence(a, b) for a, b in zip(p, q, strict=True)]
        mine = divergence(torch.from_numpy(p), torch.from_numpy(q)).numpy()
        largest = max(largest, float(np.abs(mine - bits).max()))
        expect(abs(bits[0] - 1) < 1e-9, "distributions that exclude each other are one bit apart")
    expect(largest < 1e-9, f"numbers differ by {largest:.3g}")
    return {"difference": largest}


@suite.check("reference")
def importance_is_that_of_a_model_without_the_head(case: VisionCase) -> Seen:
    """Pruning a head is what zeros in its columns of the output projection do; profiles are those of eager weights."""
    model, (pixels, labels) = case.tiny(), case.images()
    found, anatomy, largest = case.fitted.measure(model, pixels, labels), Anatomy.of(model), 0.0
    wide = anatomy.head_dim
    with torch.no_grad():
        before = model(pixels).logits.softmax(dim=-1).numpy()
        for layer, head in np.ndindex(anatomy.num_layers, anatomy.num_heads):
            weight = anatomy.layers[layer].output.module.weight
            without = weight.detach().clone()
            without[:, head * wide : (head + 1) * wide] = 0
            with Patch(model, "certify") as patch:
                patch.parameter(weight, without)
                after = model(pixels).logits.softmax(dim=-1).numpy()
            due = {
                "divergence": np.mean([case.reference.divergence(p, q) for p, q in zip(before, after, strict=True)]),
                "probability": np.mean(before[range(IMAGES), labels] - after[range(IMAGES), labels]),
                "accuracy": np.mean((before.argmax(1) == labels.numpy()) * 1.0 - (after.argmax(1) == labels.numpy())),
            }
            largest = max(largest, *(abs(found.importance[k][layer, head] - v) for k, v in due.items()))
        with Patch(model, "certify") as patch:
            patch.config(model.config, "_attn_implementation", "eager")
            weights = torch.stack(model(pixels, output_attentions=True).attentions, dim=1).numpy()
    for layer, head in np.ndindex(found.distance.shape):
        maps = weights[:, layer, head, 1:, 1:]
        due_profile = np.mean([case.reference.hop_profile(one, 4, 4) for one in maps], axis=0)
        largest = max(largest, float(np.abs(found.profile[layer, head] - due_profile).max()))
    expect(largest < 1e-6, f"numbers differ by {largest:.3g}")
    expect(float(found.importance["divergence"].max()) > 0.001, "no head does anything, so nothing was compared")
    return {"heads": found.distance.size, "difference": largest}


@suite.check("undo")
def measuring_and_pruning_leave_nothing_behind(case: VisionCase) -> Seen:
    """Afterwards logits, and which attention is used, are those of before, bit for bit."""
    model, (pixels, labels) = case.tiny(torch.float32), case.images()
    before, attention = model(pixels.float()).logits, model.config._attn_implementation
    found = case.fitted.measure(model, pixels, labels)
    case.fitted.pruning_curve(model, pixels, labels, found.ranking(), pruned=(1,), draws=1)
    expect(torch.equal(model(pixels.float()).logits, before), "other logits afterwards")
    expect(model.config._attn_implementation == attention and not Patch.active(model), "the model is left changed")
    return {"heads": found.distance.size}


@suite.check("invariance")
def batches_and_repetitions_agree(case: VisionCase) -> Seen:
    """Images one by one, together, and a second time give the same; so do images through a processor."""
    model, (pixels, labels) = case.tiny(), case.images()

    def processor(images: list[np.ndarray], return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.from_numpy(np.stack(images))}

    runs = [case.fitted.replace(batch=batch).measure(model, pixels, labels) for batch in (1, 3, 3)]
    runs.append(case.fitted.measure(model, list(pixels.numpy()), labels.tolist(), processor=processor))
    largest = 0.0
    for other in runs[1:]:
        for mine, due in zip(_numbers(other), _numbers(runs[0]), strict=True):
            largest = max(largest, float(np.abs(mine - due).max()))
        expect(np.array_equal(other.mixture, runs[0].mixture), "maps are sorted otherwise")
    expect(largest < 1e-6, f"numbers differ by {largest:.3g}")
    return {"runs": len(runs), "difference": largest}


def _numbers(found: HeadAnalytics) -> list[np.ndarray]:
    return [*found.importance.values(), found.profile, found.distance, found.to_class]


@suite.check("invariance")
def half_precision_gives_numbers(case: VisionCase) -> Seen:
    """In bfloat16, without labels, all numbers are finite, and a patch's attention sums to one."""
    found = case.fitted.measure(case.tiny(torch.bfloat16), case.images()[0])
    expect(all(bool(np.isfinite(part).all()) for part in _numbers(found)), "numbers that are none")
    whole = found.profile.sum(axis=-1) + found.to_class
    expect(float(np.abs(whole - 1).max()) < 0.02, f"attention sums to {whole.min():.3f} to {whole.max():.3f}")
    expect(found.accuracy == 1.0, "without labels, what the whole model says counts as right")
    return {"largest gap": float(np.abs(whole - 1).max())}


@suite.check("bad input")
def models_images_and_labels_that_do_not_fit_are_refused(case: VisionCase) -> Seen:
    """Language models, a ViT without classifier, wrong images, labels and counts: by name, before anything runs."""
    probe, vit, (pixels, labels) = case.fitted, case.tiny(torch.float32), case.images()
    for model, name in ((case.tiny(torch.float32, "llama"), "Llama"), (vit.vit, "classifier")):
        refused(UnsupportedModelError, lambda model=model: probe.measure(model, pixels), name)  # type: ignore[misc]
    for wrong in (pixels[0], pixels[:, :, :8], pixels[:0], "images"):
        refused(InputError, lambda wrong=wrong: probe.measure(vit, wrong), "images")  # type: ignore[misc]
    for wrong in (labels[:2], labels + 5, labels.float()):
        refused(InputError, lambda wrong=wrong: probe.measure(vit, pixels, wrong), "labels")  # type: ignore[misc]
    few = probe.replace(kinds=20, sorted_images=1)
    refused(InputError, lambda: few.measure(vit, pixels), "kinds")
    refused(InputError, lambda: probe.pruning_curve(vit, pixels, labels, [(0, 0)], pruned=(2,)), "pruned")
    refused(InputError, lambda: probe.pruning_curve(vit, pixels, None, [(0, 0)], pruned=(1,)), "labels")
    expect(not Patch.active(vit), "a refusal left something behind")
    return {"refused": 12}

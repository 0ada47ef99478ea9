"""Adaptive SVD (arXiv 2504.07097): learn only in the directions of each matrix that matter least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.anatomy import Anatomy
from vestige.core.method import Paper, param
from vestige.core.patch import Patch
from vestige.errors import SpecError, UnsupportedModelError
from vestige.weights.retain.learner import Learner, Running
from vestige.weights.retain.session import Session, wide
from vestige.weights.retain.stream import Experience

__all__ = ["AdaptiveSVD", "Kept", "Side", "importance", "ranks"]


def importance(x: Tensor, y: Tensor) -> Tensor:
    """I = mean over rows of cos(x, y), the input and output of a layer, over the features that both have.

    Args:
        x: inputs (rows, in_features).
        y: outputs (rows, out_features).
    """
    width = min(x.shape[-1], y.shape[-1])
    return F.cosine_similarity(wide(x[..., :width]), wide(y[..., :width]), dim=-1).mean()


def ranks(scores: Mapping[str, float], sizes: Mapping[str, int], least: float, most: float) -> dict[str, int]:
    """How many singular directions of each matrix stay: r = least + I (most - least), I scaled to a mean of 1.

    Args:
        scores: importance by matrix.
        sizes: the smaller side of each matrix.
        least, most: bounds of the share; at least one direction is always left to learn in.
    """
    mean = sum(scores.values()) / len(scores)
    found = {}
    for name, size in sizes.items():
        relative = scores[name] / mean if abs(mean) > 1e-8 else 1.0
        share = least + relative * (most - least)
        found[name] = min(max(int(share * size), 0), size - 1)
    return found


@dataclass(frozen=True)
class Side:
    """Directions of one side of a matrix, of which k are kept.

    Attributes:
        basis: those kept (size, k); or those that are left (size, size - k), where they are fewer.
        free: whether it holds those that are left.
    """

    basis: Tensor
    free: bool

    @classmethod
    def of(cls, directions: Tensor, k: int) -> Side:
        """The first k of the directions (size, n); those that are left are known where n is the size."""
        size, known = directions.shape
        free = known == size and size - k < k
        held = directions[:, k:] if free else directions[:, :k]
        # Laid out as files give it back, a single column too, so that a run that is taken up goes on bit for bit.
        return cls(held.clone(memory_format=torch.contiguous_format), free)

    @property
    def count(self) -> int:
        """k."""
        size, held = self.basis.shape
        return size - held if self.free else held

    def columns(self, x: Tensor) -> Tensor:
        """What of the columns of x (size, any) lies in the kept directions."""
        inside = self.basis.T @ x
        return torch.addmm(x, self.basis, inside, alpha=-1) if self.free else self.basis @ inside

    def rows(self, x: Tensor) -> Tensor:
        """The same of the rows of x (any, size)."""
        inside = x @ self.basis
        return torch.addmm(x, inside, self.basis.T, alpha=-1) if self.free else inside @ self.basis.T


@dataclass(frozen=True)
class Kept:
    """The kept directions of a matrix W, and what W is there.

    The part of a matrix X in them is P X Q, with the projections P = U U^T and Q = V V^T. It is worked out in as few
    and as narrow products as there are: on the side whose kept directions are held, X is brought down to these first.

    Attributes:
        left, right: sides of outputs and of inputs.
        start: W brought down.
    """

    left: Side
    right: Side
    start: Tensor

    @classmethod
    def of(cls, W: Tensor, k: int) -> Kept:
        """The k largest singular directions of W (out, in)."""
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        found = cls(Side.of(U, k), Side.of(Vh.T, k), W)
        return replace(found, start=found.down(W).clone(memory_format=torch.contiguous_format))

    def down(self, X: Tensor) -> Tensor:
        """P X V (out, k), U^T X Q (k, in), or P X Q (out, in): the first that needs no wide product."""
        if not self.right.free:
            return self.left.columns(X @ self.right.basis)
        if not self.left.free:
            return self.right.rows(self.left.basis.T @ X)
        return self.left.columns(self.right.rows(X))

    def without(self, X: Tensor, Y: Tensor) -> Tensor:
        """X less what was brought down to Y (out, in)."""
        if not self.right.free:
            return torch.addmm(X, Y, self.right.basis.T, alpha=-1)
        return X - Y if self.left.free else torch.addmm(X, self.left.basis, Y, alpha=-1)

    def project(self, gradient: Tensor) -> Tensor:
        """G - P G Q: without what lies in the kept directions (out, in)."""
        return self.without(gradient, self.down(gradient))

    def restore(self, weight: Tensor) -> Tensor:
        """The weight whose part in the kept directions is what it was: W - P (W - W*) Q (out, in).

        Exact whatever the optimizer did to W, its decay and its moments included.
        """
        return self.without(weight, self.down(weight) - self.start)


class _AdaptiveSVD(Running):
    def __init__(self, learner: Any) -> None:
        super().__init__(learner)
        self.kept: dict[str, Kept] = {}
        self.scores: dict[str, float] = {}

    def start(self, session: Session) -> None:
        # The output layer and the embeddings are not among them.
        wanted = {
            id(p.stored)
            for layer in Anatomy.of(session.model).layers
            for p in (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down)
            if p is not None
        }
        self.targets = {
            name: module
            for name, module in session.model.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
            and id(module.weight) in wanted
            and module.weight.requires_grad
        }
        if not self.targets:
            raise UnsupportedModelError(f"{self.learner.name}: none of the model's matrices is trained")
        if self.learner.frozen and not 0 < self.learner.frozen < 1:
            raise SpecError(f"parameter 'frozen' is {self.learner.frozen}; allowed: 0 to 1")

    def before(self, session: Session, experience: Experience) -> None:
        self.kept = {}
        if not experience.index and not self.learner.from_start:
            return
        if not experience.index:
            self.scores = self._measure(session, experience)
        sizes = {name: min(module.weight.shape) for name, module in self.targets.items()}
        if self.learner.frozen:
            count = {name: min(int(self.learner.frozen * size), size - 1) for name, size in sizes.items()}
        else:
            count = ranks(self.scores, sizes, self.learner.least, self.learner.most)
        for name, module in self.targets.items():
            if count[name]:
                self.kept[name] = Kept.of(wide(module.weight.detach()), count[name])

    def _measure(self, session: Session, experience: Experience) -> dict[str, float]:
        """Importance of each matrix on some rows of an experience."""
        sums: dict[str, float] = dict.fromkeys(self.targets, 0.0)
        seen = 0

        def watch(name: str) -> Any:
            def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                x, y = args[0].flatten(0, -2), output.flatten(0, -2)
                sums[name] += float(importance(x, y)) * rows

            return look

        with Patch(session.model, self.learner.name) as patch, session.evaluating():
            for name, module in self.targets.items():
                patch.hook(module, watch(name), "forward")
            for batch in session.batches(experience.train):
                rows = len(next(iter(batch.values())))
                session.forward(batch)
                seen += rows
                if seen >= self.learner.rows:
                    break
        return {name: total / seen for name, total in sums.items()}

    @torch.no_grad()
    def gradients(self, session: Session) -> None:
        for name, kept in self.kept.items():
            gradient = self.targets[name].weight.grad
            if gradient is not None:
                gradient.copy_(kept.project(wide(gradient)))

    def stepped(self, session: Session) -> None:
        if not (session.step + 1) % self.learner.every:
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for name, kept in self.kept.items():
            weight = self.targets[name].weight
            weight.copy_(kept.restore(wide(weight)))

    def after(self, session: Session, experience: Experience) -> None:
        self._restore()
        now = self._measure(session, experience)
        n = experience.index
        # The mean over all experiences so far, from their own data, none of which is kept.
        self.scores = {name: (self.scores.get(name, 0.0) * n + score) / (n + 1) for name, score in now.items()}

    def tensors(self) -> dict[str, Tensor]:
        parts = {f"start:{name}": kept.start for name, kept in self.kept.items()}
        for name, kept in self.kept.items():
            for side in ("left", "right"):
                held: Side = getattr(kept, side)
                parts[f"{side}-{'free' if held.free else 'kept'}:{name}"] = held.basis
        order = [self.scores.get(name, 0.0) for name in sorted(self.targets)] if self.scores else []
        return {**parts, "importance": torch.tensor(order, dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        order = tensors["importance"].tolist()
        self.scores = dict(zip(sorted(self.targets), order, strict=True)) if order else {}

        def side(of: str, name: str) -> Side:
            free = f"{of}-free:{name}" in tensors
            return Side(tensors[f"{of}-{'free' if free else 'kept'}:{name}"], free)

        names = [name.removeprefix("start:") for name in tensors if name.startswith("start:")]
        self.kept = {n: Kept(side("left", n), side("right", n), tensors[f"start:{n}"]) for n in names}

    def report(self) -> dict[str, Any]:
        return {"importance": self.scores, "kept": {name: kept.left.count for name, kept in self.kept.items()}}


class AdaptiveSVD(Learner):
    """Keep the largest singular directions of every matrix, and learn in the others only.

    Before each experience every matrix of attention and feed-forward is decomposed. The gradient loses what lies in
    the kept directions. What an optimizer with moments or decay moves there all the same is put back every few
    updates, and at the end, so that after each experience U^T (W - W*) V = 0 holds exactly under any of them. How many
    directions stay depends on how much a layer changes its input: the cosine between a layer's inputs and outputs, on
    the data of earlier experiences, as they are learnt. No parameters are added. The output layer and the embeddings
    are free.
    """

    name = "adaptive-svd"
    paper = Paper(
        title="Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
        year=2025,
        arxiv="2504.07097",
        code="https://github.com/Red-Hat-AI-Innovation-Team/orthogonal-subspace-learning",
        equations="section 3: decomposition, layer importance, retained ratio and projected gradient",
    )

    least: float = param(0.1, "share of directions kept in a layer of no importance", ge=0, le=1)
    most: float = param(0.8, "share kept in a layer of mean importance", ge=0, le=1)
    frozen: float = param(0.0, "the same share for all layers instead; 0: by importance", ge=0, lt=1)
    from_start: bool = param(False, "keep directions of the weights that the model came with")
    every: int = param(4, "updates after which the kept parts of weights are put back", ge=1)
    rows: int = param(256, "rows of each experience that importance is measured on", ge=1)

    owns: ClassVar[frozenset[str]] = frozenset({"weights"})
    running = _AdaptiveSVD

    def check(self) -> None:
        if self.least > self.most:
            raise SpecError(f"parameter 'least' is {self.least}; allowed: at most 'most', {self.most}")

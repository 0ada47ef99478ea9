"""What a learner is: hooks around one training loop, which compose with ``+``.

A :class:`Learner` holds hyper-parameters and no state. For each run it makes a :class:`Running`, which holds the
buffers and statistics of that run and whose methods the loop calls, in this order::

    start
    for each experience:
        rows, before
        for each micro-batch:  objective, loss
        for each update:       gradients (complete, not yet clipped), stepped
        after
    finish

and ``predict`` whenever the model is asked. Hooks are given the :class:`~vestige.weights.retain.session.Session`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vestige.core.method import Method, param
from vestige.errors import SpecError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from vestige.weights.retain.session import Session
    from vestige.weights.retain.stream import Experience

__all__ = ["Combined", "Learner", "Running", "held"]

Batch = dict[str, Tensor]


class Running:
    """The state of a learner during one run, and its hooks; each does nothing unless a learner overrides it.

    Args:
        learner: its hyper-parameters.
    """

    def __init__(self, learner: Any) -> None:
        self.learner = learner

    def start(self, session: Session) -> None:
        """Once, before the first experience: look at the model, refuse what cannot be done.

        Whatever is changed here on the model is made again when an interrupted run is taken up.
        """

    def rows(self, session: Session, experience: Experience) -> Dataset:
        """What to train on in an experience."""
        return experience.train

    def before(self, session: Session, experience: Experience) -> None:
        """Before the training of an experience. Done again, from the same state, if it is interrupted."""

    def objective(self, session: Session, batch: Batch, outputs: Any) -> Tensor | None:
        """The mean loss of a micro-batch in place of the usual one; ``None`` for the usual one."""
        return None

    def loss(self, session: Session, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        """The loss with what the learner adds to it."""
        return loss

    def gradients(self, session: Session) -> None:
        """Change the gradients in place."""

    def stepped(self, session: Session) -> None:
        """After an update of the weights."""

    def after(self, session: Session, experience: Experience) -> None:
        """After the training of an experience, before it is scored."""

    def predict(self, session: Session, batch: Batch, outputs: Any) -> Any:
        """The outputs by which the model answers."""
        return outputs

    def finish(self, session: Session) -> None:
        """Once, at the end, however it came: take hooks off the model."""

    def tensors(self) -> dict[str, Tensor]:
        """The state by names, for checkpoints."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a state that :meth:`tensors` gave."""

    def learnt(self) -> dict[str, Tensor]:
        """What was learnt beside the model's own weights, by name; it outlasts :meth:`finish`."""
        return {}

    def nbytes(self) -> dict[str, int]:
        """Bytes held: ``replay_bytes`` of examples, ``state_bytes`` of statistics and copies of weights."""
        return {"replay_bytes": 0, "state_bytes": held(self.tensors())}

    def report(self) -> dict[str, Any]:
        """What the learner found out, in plain types."""
        return {}


class Learner(Method):
    """A way to learn the next experience without losing the ones before.

    ``first + second`` is a learner too, with the hooks of both.

    Class attributes
        owns: the parts of the loop that the learner must have to itself: ``"rows"`` (what is trained on),
            ``"objective"`` (the loss of the task), ``"predict"``, ``"structure"`` (the model's modules), ``"weights"``
            (which of them are trained).
        needs_classes: whether the stream must be split by class.
        needs_general: whether general samples must be given to the trainer.
        one_process: whether it cannot run in several processes together.
    """

    owns: ClassVar[frozenset[str]] = frozenset()
    needs_classes: ClassVar[bool] = False
    needs_general: ClassVar[bool] = False
    one_process: ClassVar[bool] = True
    running: ClassVar[type[Running]] = Running

    def run_state(self) -> Running:
        """Fresh state for one run."""
        return self.running(self)

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name

    @property
    def parts(self) -> tuple[Learner, ...]:
        """The learners that this one is composed of."""
        return (self,)

    def __add__(self, other: Learner) -> Combined:
        if not isinstance(other, Learner):
            return NotImplemented
        return Combined(learners=(*self.parts, *other.parts))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any] | str) -> Any:
        """As :meth:`Method.from_spec`; ``{"learners": [...]}`` is the sum of several, as is a list of specs."""
        if isinstance(spec, str):
            import yaml

            read = yaml.safe_load(spec)
            spec = read if isinstance(read, Mapping) and "learners" in read else spec
        if isinstance(spec, Mapping) and "learners" in spec:
            found = tuple(Learner.from_spec(part) for part in spec["learners"])
            return Combined(learners=found)
        return super().from_spec(spec)


class Combined(Learner):
    """Several learners at once, their hooks called in order. Made by ``+``; has no name of its own.

    Raises:
        SpecError: fewer than two, the same one twice, or two that need the same part of the loop for themselves.
    """

    learners: tuple[Learner, ...] = param(help="the learners, in the order in which their hooks are called")

    def check(self) -> None:
        if len(self.learners) < 2:
            raise SpecError(f"a sum has two learners or more, not {len(self.learners)}")
        for n, one in enumerate(self.learners):
            for other in self.learners[n + 1 :]:
                if one.name == other.name:
                    raise SpecError(f"{one.name!r} stands twice in the sum; set its parameters once")
                if common := one.owns & other.owns:
                    raise SpecError(
                        f"{one.name!r} cannot be combined with {other.name!r}: "
                        f"each needs {' and '.join(sorted(common))} for itself"
                    )

    @property
    def label(self) -> str:
        return " + ".join(learner.name for learner in self.learners)

    @property
    def parts(self) -> tuple[Learner, ...]:
        return self.learners

    @property
    def owns(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(learner.owns for learner in self.learners))

    @property
    def needs_classes(self) -> bool:  # type: ignore[override]
        return any(learner.needs_classes for learner in self.learners)

    @property
    def needs_general(self) -> bool:  # type: ignore[override]
        return any(learner.needs_general for learner in self.learners)

    @property
    def one_process(self) -> bool:  # type: ignore[override]
        return any(learner.one_process for learner in self.learners)

    def run_state(self) -> Running:
        return _Together(self)

    def spec(self) -> dict[str, Any]:
        return {"name": self.label, "learners": [learner.spec() for learner in self.learners]}


class _Together(Running):
    def __init__(self, learner: Combined) -> None:
        super().__init__(learner)
        self.states = [part.run_state() for part in learner.learners]

    def start(self, session: Session) -> None:
        for state in self.states:
            state.start(session)

    def rows(self, session: Session, experience: Experience) -> Dataset:
        owner = next((s for s in self.states if "rows" in s.learner.owns), None)
        return experience.train if owner is None else owner.rows(session, experience)

    def before(self, session: Session, experience: Experience) -> None:
        # Who changes the model's structure comes first, and goes last: the others look at the weights that are trained.
        for state in sorted(self.states, key=_changes_structure, reverse=True):
            state.before(session, experience)

    def objective(self, session: Session, batch: Batch, outputs: Any) -> Tensor | None:
        found = [state.objective(session, batch, outputs) for state in self.states]  # all of them look
        return next((loss for loss in found if loss is not None), None)

    def loss(self, session: Session, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        return functools.reduce(lambda so_far, state: state.loss(session, batch, outputs, so_far), self.states, loss)

    def gradients(self, session: Session) -> None:
        for state in self.states:
            state.gradients(session)

    def stepped(self, session: Session) -> None:
        for state in self.states:
            state.stepped(session)

    def after(self, session: Session, experience: Experience) -> None:
        for state in sorted(self.states, key=_changes_structure):
            state.after(session, experience)

    def predict(self, session: Session, batch: Batch, outputs: Any) -> Any:
        return functools.reduce(lambda so_far, state: state.predict(session, batch, so_far), self.states, outputs)

    def finish(self, session: Session) -> None:
        for state in reversed(self.states):
            state.finish(session)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{n}:{key}": value for n, state in enumerate(self.states) for key, value in state.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for n, state in enumerate(self.states):
            own = f"{n}:"
            state.load({key.removeprefix(own): value for key, value in tensors.items() if key.startswith(own)})

    def learnt(self) -> dict[str, Tensor]:
        return {f"{n}:{key}": value for n, state in enumerate(self.states) for key, value in state.learnt().items()}

    def nbytes(self) -> dict[str, int]:
        found = [state.nbytes() for state in self.states]
        return {kind: sum(each[kind] for each in found) for kind in ("replay_bytes", "state_bytes")}

    def report(self) -> dict[str, Any]:
        return {state.learner.name: found for state in self.states if (found := state.report())}


def _changes_structure(state: Running) -> bool:
    return "structure" in state.learner.owns


def held(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the storage behind tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values() if t.numel()}
    return sum(storages.values())


def snapshot(model: torch.nn.Module, names: Any = None) -> dict[str, Tensor]:
    """A copy of the trainable parameters, by name."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and (names is None or name in names)
    }

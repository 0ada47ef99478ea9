r"""ACT: attention calibration. Sinks beyond the first token give part of their attention to the other tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vestige.context.attention import Look, everything
from vestige.context.layer import EMPTY, KeptLayer, Step, per_row
from vestige.context.policy import CachePolicy
from vestige.core.anatomy import Anatomy
from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError
from vestige.layers.ops.attention_mass import capped, visible, within

if TYPE_CHECKING:
    from vestige.context.steer.questions import Question

__all__ = ["ACT"]

BLOCK_BYTES = 8 * 2**20  # one block of attention weights in float32
FIRST, LAST = 2, 1  # layers at either end that are left alone where no heads are named


class ACT(CachePolicy):
    r"""Take attention from sinks in the middle of a text, and give it to the tokens that mean something.

    In each of the chosen query heads, token *t* > 0 of a prompt of *N* tokens is a sink where the attention that it
    receives, averaged over the queries that see it, exceeds a threshold:

        sum over i >= t of A[i, t] / (N - t) > alpha / N.

    A row's attention on the sinks *S* is then scaled by beta, and what that sets free goes to the other tokens (the
    first, which is never taken for a sink, among them) in proportion to what they have:

        A'[i, s] = beta A[i, s],    A'[i, j] = A[i, j] (1 + (1 - beta) m_i / (1 - m_i)),    m_i = sum over S of A[i, s].

    Rows still sum to one. With :math:`o` the head's output and :math:`o_S` the sinks' part in it,

        o' = beta o_S + (1 + (1 - beta) m / (1 - m)) (o - o_S),

    so beside the plain attention only the columns of the sinks are needed. Of a prompt that comes in chunks each one
    goes by what all its queries so far have looked at: *N* is the tokens so far, and the last chunk has the sinks that
    the prompt in one piece has. Tokens decoded after it go by the same sinks, as one query cannot tell a sink.

    Nothing is learnt. Which heads gain is found by trying them, one at a time, on a few questions: :meth:`fit`.
    """

    name = "act"
    paper = Paper(
        title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
        "through Attention Calibration",
        year=2024,
        arxiv="2406.15765",
        venue="ICML 2024",
        code="https://github.com/GATECH-EIC/ACT",
        equations="sink detection, attention calibration and head filtering (section 4)",
    )
    verdict = Verdict(
        "not checkable here",
        "Gains of accuracy are claimed for models of billions of parameters; they were not looked for on SmolLM2. Its"
        " sinks are there: 97% of the layers and 56 to 61% of the heads have one among the first 128 of 256 tokens, "
        "past the first; in two of three passages they are tokens without letters more often than others are. A "
        "prompt in chunks has the sinks of the whole. All heads calibrated, none chosen, a needle in 507 tokens, "
        "asked for in a chunk of its own, is found in 10 of 10 texts whose sentences all differ and in 7 of 10 of "
        "five sentences over and over; of 15 each, in 13 at 512 tokens, 10 at 1,024, 5 at 2,048 and none at 4,096, "
        "the model itself in 15, 15, 9 and 5. Reading on it harms: the perplexity of the 256 tokens after 512 is "
        "25.0, without it 12.6",
    )

    beta: float = param(0.4, "factor on the attention of a sink", ge=0, le=1)
    alpha: float = param(5.0, "a sink receives over this many times the average attention", gt=0)
    threshold: float | None = param(None, "a sink receives over this much attention, in place of alpha", gt=0, lt=1)
    heads: tuple[tuple[int, int], ...] | None = param(
        None, "(layer, query head) pairs that are calibrated; none: all but those of the first two layers and the last"
    )
    chosen_on: str | None = param(None, "the model on which the heads were chosen; another one is refused")

    without_cache: ClassVar[bool] = True

    def check_model(self, anatomy: Anatomy) -> None:
        if self.chosen_on not in (None, _sizes(anatomy)):
            raise SpecError(
                f"{self.name}: the heads were chosen on {self.chosen_on}, and this model is {_sizes(anatomy)}"
            )
        for layer, head in self.heads or ():
            if not (0 <= layer < anatomy.num_layers and 0 <= head < anatomy.num_heads):
                raise SpecError(
                    f"{self.name}: parameter 'heads' has {(layer, head)}; the model has "
                    f"{anatomy.num_layers} layers of {anatomy.num_heads} heads"
                )

    def lossless(self, tokens: int) -> CachePolicy:
        return self.replace(heads=())

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        questions: Sequence[Question],
        *,
        layers: str | None = None,
        batch: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **parameters: Any,
    ) -> ACT:
        """Choose the heads whose calibration, each alone, makes the right answers likelier.

        See :func:`vestige.context.steer.questions.choose_heads`, which says what is measured.

        Args:
            questions: the calibration set.
            layers: layers whose heads are tried, as ``"2-28"``; default: all but the first two and the last.
            batch: rows that are read at once.
            progress: called with the number of heads tried so far, and of all.
            parameters: hyper-parameters of the method.

        Raises:
            InputError: there are no questions, or one that cannot be asked.
            SpecError: a wrong hyper-parameter, or layers that the model lacks.
        """
        from vestige.context.steer.questions import choose_heads

        method, anatomy = cls(**parameters), Anatomy.of(model)
        chosen = range(FIRST, anatomy.num_layers - LAST) if layers is None else anatomy.layers_of(layers)
        heads = choose_heads(method, model, questions, list(chosen), batch=batch, progress=progress)
        return method.replace(heads=heads, chosen_on=_sizes(anatomy))

    def heads_of(self, layer: int, layers: int, heads: int) -> list[int]:
        """Query heads of a layer that are calibrated."""
        if self.heads is None:
            return list(range(heads)) if FIRST <= layer < layers - LAST else []
        return sorted({head for at, head in self.heads if at == layer})

    def respond(self, entries: KeptLayer, look: Look, step: Step, plain: Callable[[], Tensor]) -> Tensor:
        heads = self.heads_of(entries.index, len(entries.cache.layers), look.query.shape[1])
        if not heads:
            return plain()
        if step.decoding:
            return self._one(entries, look, step, heads) if "sinks" in entries.aside else plain()
        at = torch.tensor(heads, device=look.query.device)
        view = _View(entries, look, at)
        own, log_sum, received = view.attend(step)
        sinks = self._sinks(entries, received, view.positions, step)
        if sinks is None:
            return plain()
        calibrated = self._chunk(view, sinks, own, log_sum)
        return plain().index_copy(2, at, calibrated.transpose(1, 2).to(look.query.dtype))

    def _sinks(
        self,
        entries: KeptLayer,
        received: Float[Tensor, "batch heads slots"],
        positions: Int[Tensor, "batch heads slots"],
        step: Step,
    ) -> Int[Tensor, "batch heads sinks"] | None:
        """Slots of each head's sinks, ``EMPTY`` where it has fewer than another; ``None`` where none has any.

        What the entries ``received`` from this chunk comes on top of what they had from those before it.
        """
        kept, device = entries.aside, received.device
        first = per_row([real - fresh for real, fresh in zip(step.real, step.fresh, strict=True)], device)
        asked = (per_row(step.fresh, device) - (positions - first).clamp_min(0)).expand_as(received)
        asked = asked.to(received.dtype)  # queries that see the entry
        if "received" in kept:
            later = (0, received.shape[2] - kept["received"].shape[2])
            received, asked = (
                new + torch.nn.functional.pad(kept[name], later)
                for name, new in (("received", received), ("asked", asked))
            )
        kept["received"], kept["asked"] = received, asked
        least = self.threshold if self.threshold is not None else self.alpha / step.rows(device)
        found = (received > least * asked) & (positions > 0)
        kept.pop("sinks", None)
        most = int(found.sum(dim=2).max())
        if most == 0:
            return None
        exist, slots = found.to(torch.uint8).topk(most, dim=2)
        kept["sinks"] = slots.masked_fill(exist == 0, EMPTY)
        return kept["sinks"]

    def _one(self, entries: KeptLayer, look: Look, step: Step, heads: list[int]) -> Tensor:
        """One token's weights are at hand, and are calibrated themselves."""
        reading, sinks = everything(entries, look, step), entries.aside["sinks"]
        share = reading.weights(look)
        rows = share.flatten(1, 3)
        some = None if len(heads) == rows.shape[1] else torch.tensor(heads, device=rows.device)
        if some is not None:
            rows = rows[:, some]
        columns, exist = sinks.clamp_min(0), sinks != EMPTY
        on_sinks = rows.gather(2, columns)
        mass = (on_sinks * exist).sum(dim=2, keepdim=True)
        raised = rows * self._raise(mass)
        # The slot in the place of a sink that a head lacks is the first, which is nobody's sink: it stays as it is.
        raised.scatter_(2, columns, torch.where(exist, self.beta * on_sinks, raised.gather(2, columns)))
        if some is not None:
            raised = share.flatten(1, 3).index_copy(1, some, raised)
        return reading.mix(raised.view_as(share))

    def _chunk(
        self, view: _View, sinks: Tensor, output: Float[Tensor, "batch heads count dim"], log_sum: Tensor
    ) -> Float[Tensor, "batch heads count dim"]:
        """The closed form, for all the queries of a chunk."""
        share, values = view.columns(sinks, log_sum)
        of_sinks = share @ values
        return self.beta * of_sinks + self._raise(share.sum(dim=-1, keepdim=True)) * (output - of_sinks)

    def _raise(self, mass: Tensor) -> Tensor:
        """Factor on the attention of the other tokens, where the sinks have ``mass`` of it."""
        return 1 + (1 - self.beta) * mass / (1 - mass).clamp_min(torch.finfo(mass.dtype).eps)


class _View:
    """Some query heads of a layer, each with its own keys and values, in float32 (float64 for float64)."""

    def __init__(self, entries: KeptLayer, look: Look, heads: Int[Tensor, " heads"]) -> None:
        of = heads // (look.query.shape[1] // entries.keys.shape[1])
        exact = torch.promote_types(look.query.dtype, torch.float32)
        self.look, self.exact = look, exact
        self.query = look.query[:, heads].to(exact) * look.scaling
        self.keys, self.values = entries.keys[:, of].to(exact), entries.values[:, of].to(exact)
        self.positions = entries._positions(entries.slots)[:, of]
        valid = entries.valid()
        self.valid = None if valid is None else valid[:, of]
        self.places = None if look.places is None else look.places[:, of]

    def attend(self, step: Step | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output ``(batch, heads, count, dim)``, logarithm of the sum of exponentials ``(batch, heads, count)``, and,
        for a step, the attention that each entry received from its real queries ``(batch, heads, slots)``."""
        outputs, log_sums = [], []
        received = torch.zeros(self.keys.shape[:3], dtype=self.exact, device=self.keys.device)
        for first, last, logits in self._blocks():
            log_sum = logits.logsumexp(dim=-1)
            share = (logits - log_sum[..., None]).exp().nan_to_num()  # a row of padding may see nothing
            if step is not None:
                if step.positions is not None:
                    share = share * (step.positions[:, None, first:last, None] != EMPTY)
                received[..., : share.shape[-1]] += share.sum(dim=2)
            outputs.append(share @ self.values[:, :, : share.shape[-1]])
            log_sums.append(log_sum)
        return torch.cat(outputs, dim=2), torch.cat(log_sums, dim=2), received

    def columns(self, slots: Int[Tensor, "batch heads sinks"], log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights on some entries, ``(batch, heads, count, sinks)``, and their values."""
        index = slots.clamp_min(0)[..., None]
        keys, values = (part.gather(2, index.expand(-1, -1, -1, part.shape[3])) for part in (self.keys, self.values))
        logits = capped(self.query @ keys.transpose(-1, -2), self.look.softcap)
        asked = torch.arange(self.keys.shape[2] - self.query.shape[2], self.keys.shape[2], device=slots.device)
        seen: Bool[Tensor, "batch heads count sinks"] = (slots[:, :, None] <= asked[:, None]) & (slots >= 0)[:, :, None]
        if self.look.window is not None:
            assert self.places is not None
            place = self.places.gather(2, slots.clamp_min(0))
            seen &= place[:, :, None] > self.places[..., asked[0] :, None] - self.look.window
        share = (logits - log_sum[..., None]).exp().nan_to_num(posinf=0.0)
        return share.masked_fill(~seen, 0.0), values

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Logits of some queries after the others, minus infinity where an entry is not seen."""
        batch, heads, count = self.query.shape[:3]
        entries = self.keys.shape[2]
        block = max(16, BLOCK_BYTES // (4 * batch * heads * entries))
        for first in range(0, count, block):
            last = min(first + block, count)
            shown = entries - count + last
            logits = self.query[:, :, first:last] @ self.keys[:, :, :shown].transpose(-1, -2)
            seen = visible(first, last, count, entries, logits.device)[None, None]
            if self.look.window is not None:
                assert self.places is not None
                seen = seen & within(self.places, first, last, count, self.look.window)
            if self.valid is not None:
                seen = seen & self.valid[:, :, None, :shown]
            yield first, last, capped(logits, self.look.softcap).masked_fill(~seen, float("-inf"))


def _sizes(anatomy: Anatomy) -> str:
    """What tells one model's heads from another's."""
    return f"{anatomy.architecture}, {anatomy.num_layers} layers of {anatomy.num_heads} heads of {anatomy.head_dim}"

r"""Rotary positions, put on and taken off again.

A rotary model turns each pair of a key's (or query's) dimensions by an angle that grows with the token's position
*p*: :math:`R(p)\,x`. Turns add up, :math:`R(a)\,R(b) = R(a + b)`, so states that are turned already can be moved to
another position, or back to position zero, without knowing what they were.

A factor that a model puts on its cosines and sines (YaRN does) stays on the states: a turn has length one.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.core.anatomy import Anatomy
from vestige.errors import UnsupportedModelError

__all__ = ["Rotary"]

PROBE = 7  # a position at which the model's own turn is compared with this one
TOLERANCE = 1e-4  # of states of the order of one, in float32


@dataclass(frozen=True)
class Rotary:
    """Turns by position, with a model's frequencies.

    Attributes:
        frequencies: angle per position of each pair, in radians. Dimension *i* is paired with *i* + pairs;
            dimensions beyond the pairs (of a partly rotary model) are left alone.
    """

    frequencies: tuple[float, ...]

    @classmethod
    def of(cls, anatomy: Anatomy) -> Rotary | None:
        """The turns of a model; ``None`` where positions do not enter by turning. The model is not held.

        Raises:
            UnsupportedModelError: the frequencies differ between layers or change with the length of the text, or
                the model pairs dimensions in another way.
        """
        if anatomy.position != "rotary":
            return None
        module = getattr(anatomy.base, "rotary_emb", None)
        frequencies = getattr(module, "inv_freq", None)
        if not isinstance(frequencies, Tensor):
            raise UnsupportedModelError(
                f"{anatomy.architecture}: turning keys needs one set of rotary frequencies for all layers; "
                "this model has none, or one for each kind of layer"
            )
        kind = getattr(module, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{anatomy.architecture}: rotary frequencies of the kind {kind!r} change with the length of the text, "
                "so that keys turned before cannot be turned on"
            )
        found = cls(tuple(frequencies.tolist()))
        if not found._turns_like(module, anatomy):
            raise UnsupportedModelError(
                f"{anatomy.architecture}: this model does not turn the halves of a head against each other, "
                "which is the only form of rotary positions that is supported"
            )
        return found

    def turn(
        self, states: Float[Tensor, "batch heads count dim"], by: int | Int[Tensor, ...]
    ) -> Float[Tensor, "batch heads count dim"]:
        """Turn states on by a number of positions (back, where negative): one for all, or ``by`` broadcast to
        ``(batch, heads, count)``. Angles and sums are in float32 (float64 for float64), rounded once."""
        return self.apply(states, self.phase(by, states))

    def phase(self, by: int | Int[Tensor, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of a turn, for :meth:`apply` to states of the dtype and device of ``like``."""
        exact = torch.promote_types(like.dtype, torch.float32)
        by = torch.as_tensor(by, device=like.device).to(exact)
        angle = by[..., None] * _tensor(self.frequencies, exact, like.device)
        return angle.cos(), angle.sin()

    def apply(self, states: Tensor, phase: tuple[Tensor, Tensor]) -> Tensor:
        """Turn states by a phase."""
        cosine, sine = phase
        pairs = len(self.frequencies)
        first, second, rest = states.split([pairs, pairs, states.shape[-1] - 2 * pairs], dim=-1)
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat([part.to(states.dtype) for part in turned] + [rest], dim=-1)

    def swapped(self, dim: int, device: torch.device) -> Int[Tensor, " dim"]:
        """For each channel of a head the one that it is paired with: ``states * cosine + states[..., swapped] * sine``
        of :meth:`wide_phase` turns states."""
        pairs = len(self.frequencies)
        channel = torch.arange(dim, device=device)
        return torch.cat([channel[pairs : 2 * pairs], channel[:pairs], channel[2 * pairs :]])

    def wide_phase(self, by: Int[Tensor, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`phase`, for every channel of ``like``, signs included: of turns that many states are given."""
        cosine, sine = self.phase(by, like)
        rest = cosine.new_zeros(*cosine.shape[:-1], like.shape[-1] - 2 * cosine.shape[-1])
        return torch.cat([cosine, cosine, rest + 1], dim=-1), torch.cat([-sine, sine, rest], dim=-1)

    def mean_phase(self, start: Int[Tensor, ...], count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the phases of the turns by ``start`` to ``start + count - 1``, each ``(..., pairs)``."""
        cosine, sine = self.phase(start[..., None] + torch.arange(count, device=like.device), like)
        return cosine.mean(dim=-2), sine.mean(dim=-2)

    def _turns_like(self, module: Any, anatomy: Anatomy) -> bool:
        """Whether the model's own function does the same to some states."""
        own = getattr(sys.modules[type(anatomy.layers[0].attention).__module__], "apply_rotary_pos_emb", None)
        if own is None or 2 * len(self.frequencies) > anatomy.head_dim:
            return False
        states = torch.linspace(-1, 1, anatomy.head_dim, device=module.inv_freq.device)[None, None, None]
        position = torch.tensor([[PROBE]], device=states.device)
        cosine, sine = module(states, position)
        due = own(states, states, cosine, sine)[0] / getattr(module, "attention_scaling", 1.0)
        turned = 2 * len(self.frequencies)
        mine = self.turn(states, PROBE)
        return due.shape == mine.shape and bool(torch.allclose(due[..., :turned], mine[..., :turned], atol=TOLERANCE))


@functools.lru_cache(maxsize=16)
def _tensor(frequencies: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the pass in which it is made
        return torch.tensor(frequencies, dtype=dtype, device=device)

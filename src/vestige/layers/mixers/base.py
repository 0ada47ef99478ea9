"""What every mixer has in common, and how a new one is written.

A mixer is one file in this folder. It holds a :class:`Mixer`: the hyper-parameters, registered under the name that
the blocks of a :class:`~vestige.models.lm.VestigeLM` use; and its layer, a module that maps ``(batch, length,
hidden_size)`` to the same shape. Beside it stand a slow reference (``vestige.evidence.references.<slug>``) and
what it claims (``vestige.evidence.claims.<slug>``). Nothing else has to be edited.

Which base to derive from:

- :class:`~vestige.layers.mixers.recurrent.RecurrentMixer`, where a token changes a state and then reads it. Linear
  attention and the delta rule give :class:`~vestige.layers.ops.recurrence.Drive` and get every form of the
  computation; another rule (a memory that learns) brings its own ``chunked`` and ``step``.
- :class:`Mixer` itself otherwise (attention over what is kept).

A layer keeps no run-time state. What it holds between passes stands in the
:class:`~vestige.layers.state.LayerState` that it is given: named tensors, batch first. Padding writes nothing
(:meth:`~vestige.layers.layout.Layout.blank`), and nothing crosses the edge of a packed sequence
(``layout.starts``). Raw parameters are drawn in ``draw()``, through ``transformers.initialization``, and constants
are worked out in ``forward``: both survive ``from_pretrained``, which builds a model without storage.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from vestige.core.method import Method
from vestige.errors import SpecError
from vestige.layers.initialise import initialise
from vestige.layers.layout import Layout
from vestige.layers.place import Place
from vestige.layers.state import LayerState

__all__ = ["Mixer", "MixerLayer"]


class Mixer(Method):
    """Base of all mixers: hyper-parameters that build a layer.

    Class attributes
        layer: the class of the layer, built from ``(mixer, place)``.
        attends: whether the layer needs ``layout.mask``, that of softmax attention over the whole past.
        forgets: how it forgets, in a few words.
    """

    layer: ClassVar[type[MixerLayer]]
    attends: ClassVar[bool] = False
    forgets: ClassVar[str] = "it does not say"

    def check_place(self, place: Place) -> None:
        """Refuse a place where the mixer does not fit, before anything is allocated; override.

        Raises:
            SpecError: head sizes that do not divide, a window longer than the context ...
        """

    def build(self, place: Place) -> MixerLayer:
        """The layer, with freshly drawn weights.

        Raises:
            SpecError: it does not fit there.
        """
        self.check_place(place)
        layer = type(self).layer(self, place)
        initialise(layer)
        return layer

    def share(self, width: float, heads: int, what: str) -> int:
        """The width of one head.

        Raises:
            SpecError: a width that is not whole, or that the heads do not divide.
        """
        if width != int(width) or int(width) % heads or width < heads:
            raise SpecError(f"{self.name}: heads = {heads} does not divide {what} = {width:g}")
        return int(width) // heads


class MixerLayer(nn.Module):
    """Base of the layers that mixers build."""

    def __init__(self, mixer: Mixer, place: Place) -> None:
        super().__init__()
        self.mixer, self.place = mixer, place

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch length hidden"], layout: Layout, state: LayerState | None = None
    ) -> Float[Tensor, "batch length hidden"]:
        """Mix tokens with their past.

        Args:
            x: the tokens.
            layout: where they stand.
            state: what the layer held after earlier passes; it is brought up to date. ``None``: nothing came before,
                and nothing is to be kept.
        """

    def extra_repr(self) -> str:
        return self.mixer.to_json()

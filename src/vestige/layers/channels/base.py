"""What every channel mixer has in common."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from vestige.core.method import Method
from vestige.layers.initialise import initialise
from vestige.layers.place import Place

__all__ = ["Channel"]


class Channel(Method):
    """Base of all channel mixers: hyper-parameters that build a module.

    It maps ``(batch, length, hidden_size)`` to the same, each token on its own.

    Class attributes
        layer: the class of the module, built from ``(channel, place)``.
    """

    layer: ClassVar[type[nn.Module]]

    def check_place(self, place: Place) -> None:
        """Refuse a place where it does not fit, before anything is allocated; override.

        Raises:
            SpecError: sizes that do not go together.
        """

    def build(self, place: Place) -> nn.Module:
        """The module, with freshly drawn weights.

        Raises:
            SpecError: it does not fit there.
        """
        self.check_place(place)
        module = type(self).layer(self, place)
        initialise(module)
        return module

"""What mixers store is measured, and the table in the documentation says the same."""

from __future__ import annotations

import pytest

from vestige.errors import SpecError
from vestige.layers.footprint import footprint
from vestige.layers.mixers.gla import GLA
from vestige.layers.mixers.softmax import Softmax
from vestige.layers.place import Place


def test_what_is_held_is_what_shapes_say():
    place = Place(hidden_size=32, heads=4, kv_heads=2, context=64)
    keys = footprint(Softmax(), place, 10, 5)
    assert (keys.nbytes, keys.per_token) == (10 * 2 * 16 * 4, 2 * 16 * 4)
    assert keys.tensors == {"keys": (2, 15, 8), "values": (2, 15, 8)}
    state = footprint(GLA(), place, 10, 5)
    assert (state.nbytes, state.per_token) == (4 * 4 * 8 * 4, 0)
    with pytest.raises(SpecError, match="tokens = 0"):
        footprint(GLA(), place, 0)

"""The configuration of a :class:`~vestige.models.lm.VestigeLM`."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedConfig

from vestige.errors import SpecError
from vestige.layers.norms import check_norm
from vestige.layers.place import Place
from vestige.models.blocks import BlockSpec, cycle, parse_blocks

__all__ = ["VestigeConfig"]


class VestigeConfig(PreTrainedConfig):
    """Sizes, and the blocks by name.

    Args:
        blocks: a pattern such as ``"gated-delta-net*3 softmax"`` or a list of blocks; see
            :func:`vestige.models.blocks.parse_blocks`. It is kept as a list with every hyper-parameter spelled out,
            so that a saved model stays what it is when a default changes.
        num_hidden_layers: the pattern is repeated until there are so many; default: once.
        channel, norm, residual: of blocks that name none; ``norm`` also of the last norm.
        vocab_size, hidden_size: of the embedding.
        num_attention_heads, num_key_value_heads, head_dim, intermediate_size: of mixers and channel mixers that name
            none.
        max_position_embeddings: the most tokens that the model is made for. Nothing stops a longer text.
        scale_embeddings: whether embeddings are multiplied by the root of the hidden size.
        norm_eps: added in the norms.
        initializer_range: standard deviation of drawn weights.
        tie_word_embeddings: whether the head is the embedding.
        use_cache: whether a forward pass keeps a state unless told otherwise.
        pad_token_id, bos_token_id, eos_token_id: special tokens, as ``generate`` uses them.

    Raises:
        SpecError: a block that cannot be read or does not fit, with its position; a size that is not positive; a name
            that is nearly one of these.
    """

    model_type = "vestige"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads a plain list)

    def __init__(
        self,
        blocks: str | Sequence[Any] = "gated-delta-net*3 softmax",
        vocab_size: int = 32_000,
        hidden_size: int = 256,
        num_hidden_layers: int | None = None,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 2048,
        channel: Any = "swiglu",
        norm: str = "rmsnorm",
        residual: str = "pre",
        scale_embeddings: bool = False,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:  # transformers keeps whatever it is given, so a slip of the pen would go unseen
            if near := get_close_matches(name, inspect.signature(VestigeConfig).parameters, n=1, cutoff=0.9):
                raise SpecError(f"unknown field {name!r} (given {kwargs[name]!r}); did you mean {near[0]}?")
        pattern = parse_blocks(blocks, channel=channel, norm=norm, residual=residual)
        self.blocks = [block.to_dict(repeat) for block, repeat in pattern]
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = len(cycle(pattern, num_hidden_layers))
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.norm = check_norm(norm)
        self.scale_embeddings = scale_embeddings
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._check()
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def plan(self) -> list[BlockSpec]:
        """One block per layer."""
        return cycle(parse_blocks(self.blocks), self.num_hidden_layers)

    def place(self, index: int) -> Place:
        """Where the layer of an index stands."""
        return Place(
            hidden_size=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            index=index,
            layers=self.num_hidden_layers,
            context=self.max_position_embeddings,
            eps=self.norm_eps,
        )

    @property
    def signature(self) -> str:
        """A short text that two configs share if states of the one fit the other."""
        sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        mixers = [block.mixer.spec() for block in self.plan()]
        held = json.dumps([mixers, *(getattr(self, size) for size in sizes)], sort_keys=True)
        return hashlib.sha256(held.encode()).hexdigest()[:16]

    def _check(self) -> None:
        """Refuse what cannot be built, before anything is."""
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        for name in ("norm_eps", "initializer_range"):
            if type(getattr(self, name)) not in (int, float) or not getattr(self, name) > 0:
                raise SpecError(f"{name} is {getattr(self, name)!r}; allowed: a number > 0")
        for index, block in enumerate(self.plan()):
            for part in (block.mixer, block.channel):
                if part is None:
                    continue
                try:
                    part.check_place(self.place(index))
                except SpecError as error:
                    raise SpecError(f"block {index + 1} of {self.num_hidden_layers}: {error}") from None


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise SpecError(f"{name} is {value!r}; allowed: int >= 1")

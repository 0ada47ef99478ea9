"""One view of any supported Hugging Face model, so that no method has to know architectures.

What is known of an architecture is one entry of :data:`ARCHITECTURES`, found by the ``model_type``
of the config. To support another one, add an entry::

    ARCHITECTURES["my_model"] = replace(LLAMA, norms={"attention": "norm_1", "mlp": "norm_2"})
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from vestige.core.projection import Projection
from vestige.errors import SpecError, UnsupportedModelError

__all__ = ["ARCHITECTURES", "Anatomy", "Architecture", "Layer"]

Position = Literal["rotary", "learned", "none"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where one architecture keeps its parts: dotted paths, below the base model or below a block.

    ``query``, ``key`` and ``value`` (and ``gate`` and ``up``) name the same module where it is fused; ``fused`` then
    says how the features lie in it: ``"parts"`` (all queries, all keys, all values) or ``"heads"`` (query, key and
    value of the first head, of the second ...). ``norms`` may depend on the config.
    """

    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str | None = "norm"
    position: Position = "rotary"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    fused: Literal["parts", "heads"] | None = None
    mlp: str | None = "mlp"
    gate: str | None = None
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norms: Mapping[str, str] | Callable[[Any], Mapping[str, str]] = field(default_factory=dict)


_LLAMA_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
LLAMA = Architecture(gate="mlp.gate_proj", norms=_LLAMA_NORMS)
_HEAD_NORMS = {"query": "self_attn.q_norm", "key": "self_attn.k_norm"}
_GEMMA2_NORMS = {
    "attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}


def _opt_norms(config: Any) -> Mapping[str, str]:
    attention, mlp = ("attention", "mlp") if config.do_layer_norm_before else ("after_attention", "after_mlp")
    return {attention: "self_attn_layer_norm", mlp: "final_layer_norm"}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": replace(LLAMA, norms={**_LLAMA_NORMS, **_HEAD_NORMS}),
    "gemma": LLAMA,
    "gemma2": replace(LLAMA, norms=_GEMMA2_NORMS),
    "gemma3_text": replace(LLAMA, norms={**_GEMMA2_NORMS, **_HEAD_NORMS}),
    "phi3": replace(
        LLAMA,
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        fused="parts",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
    ),
    "gpt2": Architecture(
        layers="h",
        embedding="wte",
        final_norm="ln_f",
        position="learned",
        attention="attn",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        fused="parts",
        up="mlp.c_fc",
        down="mlp.c_proj",
        norms={"attention": "ln_1", "mlp": "ln_2"},
    ),
    "opt": Architecture(
        final_norm="final_layer_norm",
        position="learned",
        output="self_attn.out_proj",
        mlp=None,
        up="fc1",
        down="fc2",
        norms=_opt_norms,
    ),
    "gpt_neox": Architecture(
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention="attention",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        output="attention.dense",
        fused="heads",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    ),
    "bert": Architecture(
        layers="encoder.layer",
        embedding="embeddings.word_embeddings",
        final_norm=None,
        position="learned",
        attention="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        mlp=None,
        up="intermediate.dense",
        down="output.dense",
        norms={"after_attention": "attention.output.LayerNorm", "after_mlp": "output.LayerNorm"},
    ),
    "vit": Architecture(
        embedding="embeddings.patch_embeddings",
        final_norm="layernorm",
        position="learned",
        attention="attention",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
        up="mlp.fc1",
        down="mlp.fc2",
        norms={"attention": "layernorm_before", "mlp": "layernorm_after"},
    ),
}

# What transformers calls the head of a model that has one, where it is not the output embedding.
_HEADS = ("score", "classifier", "qa_outputs")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Layer:
    """The parts of one block.

    Attributes:
        index: its place, from 0.
        block: the whole block.
        attention: the module that calls the attention function.
        query, key, value, output: the projections of attention.
        mlp: the feed-forward module; None where the block holds its parts directly (OPT, BERT).
        gate: the gate projection; None where the feed-forward part has none.
        up, down: its other projections.
        norms: by what they come before (``attention``, ``mlp``), after (``after_attention``, ``after_mlp``), or work
            on, per head (``query``, ``key``).
    """

    index: int
    block: nn.Module
    attention: nn.Module
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    mlp: nn.Module | None
    gate: Projection | None
    up: Projection
    down: Projection
    norms: Mapping[str, nn.Module]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Anatomy:
    """The parts of a model by their names; built by :meth:`of`. Nothing is copied, nothing is changed.

    Attributes:
        model: the outermost transformers model (inside a PEFT wrapper).
        architecture: its ``model_type``.
        base: the decoder or encoder without head.
        config: the base's config.
        layers: the blocks.
        embedding: what embeds tokens (or patches).
        final_norm: the norm after the last block, if any.
        head: the output layer, if the model has one.
        position: how positions enter: ``"rotary"``, ``"learned"`` or ``"none"``.
        causal: whether a token sees only what comes before it.
        sliding_windows: per layer, how many tokens back it sees; None for all.
    """

    model: nn.Module
    architecture: str
    base: nn.Module
    config: Any
    layers: tuple[Layer, ...]
    embedding: nn.Module
    final_norm: nn.Module | None
    head: nn.Module | None
    position: Position
    causal: bool
    sliding_windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Look at a transformers model: bare, with any head, or inside a PEFT wrapper.

        Raises:
            UnsupportedModelError: the architecture is unknown, several known ones are in the model, or parts are
                missing or of unequal shape.
        """
        base = _base(model)
        config = base.config
        known = ARCHITECTURES[config.model_type]
        blocks = _part(base, known.layers)
        assert blocks is not None
        layers = tuple(_layer(index, block, known, config) for index, block in enumerate(blocks))
        if not layers:
            raise UnsupportedModelError(f"this {config.model_type} model has no layers")
        outer = next(m for m in model.modules() if _is_pretrained(m) and any(part is base for part in m.modules()))
        return cls(
            model=outer,
            architecture=config.model_type,
            base=base,
            config=config,
            layers=layers,
            embedding=_needed(base, known.embedding),
            final_norm=_part(base, known.final_norm),
            head=None if outer is base else _head(outer),
            position=known.position,
            causal=bool(layers[0].attention.is_causal),
            sliding_windows=tuple(_sliding_windows(config, len(layers))),
        )

    def __repr__(self) -> str:
        heads = f"{self.num_heads} query and {self.num_kv_heads} key-value heads of {self.head_dim}"
        return f"Anatomy({self.architecture}: {self.num_layers} layers, {heads})"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads of each layer."""
        return self.config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of each layer."""
        return _kv_heads(self.config)

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return _head_dim(self.config)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int | None:
        """Tokens known; None for a model that reads no tokens."""
        return getattr(self.config, "vocab_size", None)

    @property
    def max_positions(self) -> int:
        """Tokens (or patches, with the class token) that the model was made for."""
        known = getattr(self.config, "max_position_embeddings", None)
        return self.base.embeddings.position_embeddings.shape[1] if known is None else known

    @cached_property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weight."""
        weight = getattr(self.head, "weight", None)
        return weight is not None and weight is getattr(self.embedding, "weight", None)

    def cache_bytes_per_token(self, dtype: torch.dtype | str | None = None) -> int:
        """Bytes of keys and values that a whole cache holds for each token; 0 for an encoder, which has no cache.

        Layers with a sliding window are counted like the others: they hold as much until the window is full.

        Args:
            dtype: of the cache; the model's if None.

        Raises:
            SpecError: unknown dtype.
        """
        stored = self.base.dtype if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(stored, torch.dtype):
            raise SpecError(f"parameter 'dtype' is {dtype!r}; allowed: a torch dtype such as 'bfloat16'")
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * stored.itemsize if self.causal else 0

    def need_causal(self, who: str) -> None:
        """Raise an error in the name of ``who`` asks, unless the model is a causal decoder.

        Raises:
            UnsupportedModelError: the model is no causal decoder.
        """
        if not self.causal:
            raise UnsupportedModelError(f"{who} needs a causal decoder; {self.architecture} is none")

    def parameter_count(self) -> int:
        """Parameters of the whole model, each once however often it is tied."""
        return self.model.num_parameters()

    def layers_of(self, which: str | int | Iterable[int]) -> tuple[int, ...]:
        """Layer indices, ascending, named by ``"all"``, ``"2-29"`` (both ends included), ``"0,3,5-7"``, or numbers.

        Raises:
            SpecError: it cannot be read, names no layer, or one that the model does not have.
        """
        allowed = f"allowed: 'all', or layers 0 to {self.num_layers - 1} as in '0,2-5'"
        if isinstance(which, str):
            found = _read_layers(which, self.num_layers)
        else:
            found = set(which) if isinstance(which, Iterable) else {which}
        if not found or not all(type(i) is int and 0 <= i < self.num_layers for i in found):
            raise SpecError(f"parameter 'layers' is {which!r}; {allowed}")
        return tuple(sorted(found))


def _read_layers(text: str, count: int) -> set[int]:
    """The indices that a text names; none if it cannot be read."""
    if text.strip() == "all":
        return set(range(count))
    found: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        if match is None:
            return set()
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            return set()
        found.update(range(first, last + 1))
    return found


def _is_pretrained(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _base(model: nn.Module) -> nn.Module:
    """The one module inside the model that directly holds the layers of a known architecture."""
    inside = [m for m in model.modules() if _is_pretrained(m)] if isinstance(model, nn.Module) else []
    if not inside:
        raise UnsupportedModelError(f"{type(model).__name__} is no transformers model, and holds none")
    bases = []
    for module in inside:
        known = ARCHITECTURES.get(module.config.model_type)
        if known is not None and _part(module, known.layers) is not None:
            bases.append(module)
    if len(bases) > 1:
        names = " and ".join(type(base).__name__ for base in bases)
        raise UnsupportedModelError(
            f"{type(model).__name__} holds several models, {names}; hand over the one that is meant"
        )
    if not bases:
        kind = inside[0].config.model_type
        raise UnsupportedModelError(
            f"the architecture {kind!r} ({type(inside[0]).__name__}) is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}. To add it, describe where it keeps its layers, attention projections, "
            f"feed-forward part, norms and embedding: vestige.core.anatomy.ARCHITECTURES[{kind!r}] = Architecture(...)"
        )
    return bases[0]


def _part(root: nn.Module, path: str | None) -> Any:
    """The part at a dotted path, or None."""
    part: Any = None if path is None else root
    for name in (path or "").split("."):
        part = getattr(part, name, None)
    return part


def _needed(root: nn.Module, path: str) -> nn.Module:
    part = _part(root, path)
    if not isinstance(part, nn.Module):
        raise UnsupportedModelError(f"{type(root).__name__} has no part {path!r}, as others of its architecture have")
    return part


def _head(outer: nn.Module) -> nn.Module | None:
    output = outer.get_output_embeddings()
    return output if output is not None else next((h for h in (_part(outer, n) for n in _HEADS) if h is not None), None)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _sliding_windows(config: Any, count: int) -> Iterable[int | None]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return [window if kinds is None or kinds[index] == "sliding_attention" else None for index in range(count)]


def _layer(index: int, block: nn.Module, known: Architecture, config: Any) -> Layer:
    query, key, value = _attention_projections(index, block, known, config)
    up = Projection(_needed(block, known.up))
    gate = None if known.gate is None else Projection(_needed(block, known.gate))
    if gate is not None and known.gate == known.up:
        half = up.out_features // 2
        gate, up = Projection(gate.module, slice(0, half)), Projection(up.module, slice(half, 2 * half))
    norms = known.norms(config) if callable(known.norms) else known.norms
    return Layer(
        index=index,
        block=block,
        attention=_needed(block, known.attention),
        query=query,
        key=key,
        value=value,
        output=Projection(_needed(block, known.output)),
        mlp=None if known.mlp is None else _needed(block, known.mlp),
        gate=gate,
        up=up,
        down=Projection(_needed(block, known.down)),
        norms={name: _needed(block, path) for name, path in norms.items()},
    )


def _attention_projections(index: int, block: nn.Module, known: Architecture, config: Any) -> list[Projection]:
    """Query, key and value, which must have the shapes that the config gives."""
    heads, width = config.num_attention_heads, _head_dim(config)
    query, key = heads * width, _kv_heads(config) * width
    modules = [_needed(block, path) for path in (known.query, known.key, known.value)]
    found = [Projection(module).out_features for module in modules]
    wanted = [query, key, key] if known.fused is None else [query + 2 * key] * 3
    if found != wanted:
        raise UnsupportedModelError(
            f"layer {index}: the projections of attention have {found} output features, the config says {wanted}; "
            "layers of unequal shape are not supported"
        )
    selected: list[Any] = [None, None, None]
    if known.fused == "parts":
        selected = [slice(0, query), slice(query, query + key), slice(query + key, query + 2 * key)]
    elif known.fused == "heads":
        selected = [rows.flatten() for rows in torch.arange(3 * query).view(heads, 3, width).unbind(1)]
    return [Projection(module, rows) for module, rows in zip(modules, selected, strict=True)]

"""Other mixers in the place of a pretrained model's attention layers, taken back by one call.

::

    swap = convert(model, Lizard(window=128), layers="2-29")
    distill(swap, ids)              # vestige.models.distill
    model.generate(...)             # the cache of these layers no longer grows
    swap.save("folder", tokenizer)  # the model as it was, and what was converted beside it
    swap.undo()

Any mixer on queries, keys and values (:class:`~vestige.layers.mixers.attention.AttentionMixer`) can take over: it
begins with copies of the attention's projections, head norms and scaling, uses the model's own rotary positions,
and what it has beyond them is drawn. Converted to ``softmax`` (or to ``sliding-window`` of its own window, where it
has one), a layer computes what it computed before.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vestige.core.anatomy import Anatomy, Layer
from vestige.core.files import write_whole
from vestige.core.patch import Patch
from vestige.errors import InputError, ModelError, PatchError, SpecError, UnsupportedModelError
from vestige.layers.layout import Layout, check_padding
from vestige.layers.mixers.attention import AttentionLayer, AttentionMixer
from vestige.layers.mixers.base import Mixer
from vestige.layers.place import Place
from vestige.layers.state import LayerState, nbytes_of
from vestige.models.blocks import names_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FILE", "Conversion", "ConvertedAttention", "convert", "restore"]

FILE = "conversion.safetensors"

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")

Watch = Callable[["ConvertedAttention", Tensor, dict[str, Any]], Any]


@dataclass
class Pass:
    """What the layers are told about the tokens of the pass that is under way.

    Attributes:
        held: ``(batch, past + length)`` False at padding; ``None`` where there is none.
        starts: ``(batch, length)`` where packed sequences begin; ``None`` where a row is one sequence.
        watch: what runs in the place of the converted layers while they are taught; see :mod:`vestige.models.distill`.
    """

    held: Tensor | None = None
    starts: Tensor | None = None
    watch: Watch | None = None


class _HostLayout(Layout):
    """A layout whose rotary positions are the host model's."""

    turn: tuple[Tensor, Tensor]

    def angles(self, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.turn


class ConvertedAttention(nn.Module):
    """What stands in the place of an attention module, and is called as it was.

    Attributes:
        layer: the mixer's layer.
        layer_idx: its number.
    """

    is_causal = True

    def __init__(self, layer: AttentionLayer, original: nn.Module, index: int, current: Pass) -> None:
        super().__init__()
        self.layer, self.layer_idx = layer, index
        self.current = current
        self._original = (original,)  # no part of this module: its weights are not this one's

    @property
    def original(self) -> nn.Module:
        """The attention module that stood here."""
        return self._original[0]

    def __getattr__(self, name: str) -> Any:
        """The projections, so that who knows where the model keeps them finds them."""
        if name in (*PROJECTIONS, *NORMS):
            return getattr(self.layer, name)
        return super().__getattr__(name)

    def fresh(self) -> list[nn.Parameter]:
        """The weights that the attention did not have."""
        taken = [getattr(self.layer, name) for name in (*PROJECTIONS, *NORMS) if hasattr(self.original, name)]
        known = {id(weight) for part in taken for weight in part.parameters()}
        return [weight for weight in self.layer.parameters() if id(weight) not in known]

    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        """As the attention module: tokens ``(batch, length, hidden)`` to the same, and no attention weights."""
        if self.current.watch is not None:
            return self.current.watch(self, hidden_states, given)
        return self.mix(hidden_states, given), None

    def mix(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """What the mixer makes of the tokens."""
        cache = given.get("past_key_values")
        state = None if cache is None else state_of(cache, self.layer_idx)
        past = 0 if state is None else state.seen
        batch, length, _ = x.shape
        told = self.current.held, self.current.starts  # on the device where the model begins
        held, starts = (None if mask is None else mask.to(x.device) for mask in told)
        if held is not None and held.shape != (batch, past + length):
            raise InputError(f"attention_mask is {tuple(held.shape)}; {(batch, past + length)} is due")
        layout = _HostLayout(
            torch.arange(past, past + length, device=x.device).expand(batch, length),
            past=past,
            held=held,
            starts=starts,
        )
        cos, sin = (t[..., None, : t.shape[-1] // 2] for t in given["position_embeddings"])
        layout.turn = (cos, sin)
        if self.layer.mixer.attends:
            layout.mask = layout.causal_mask()
        return self.layer(x, layout, state)


def state_of(cache: Any, index: int) -> LayerState:
    """The state of a layer in a transformers cache; it takes the place of a layer for keys and values.

    Raises:
        InputError: the cache is of another kind, or holds keys and values from before the conversion.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise InputError(f"past_key_values is a {type(cache).__name__}; a converted model uses a DynamicCache")
    while len(layers) <= index:
        layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    slot = layers[index]
    if isinstance(slot, LayerState):
        return slot
    if type(slot) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise InputError(
            f"layer {index} of the cache is a {type(slot).__name__}; a converted model uses a DynamicCache"
        )
    if slot.get_seq_length():
        raise InputError(f"layer {index} of the cache was filled before the model was converted; begin with a new one")
    layers[index] = LayerState()
    return layers[index]


@dataclass(eq=False)
class Conversion:
    """Attention layers of a model that another mixer has taken over.

    Attributes:
        mixer: what took over.
        layers: the numbers of the layers, ascending.
        modules: what stands there now.
    """

    mixer: AttentionMixer
    layers: tuple[int, ...]
    modules: tuple[ConvertedAttention, ...] = field(repr=False)
    patch: Patch = field(repr=False)
    current: Pass = field(repr=False)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.patch.model

    def undo(self) -> None:
        """Put the attention layers back, bit for bit; a second call does nothing."""
        self.patch.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    @staticmethod
    def nbytes(cache: Any) -> int:
        """Bytes of storage that a cache holds, over all layers, converted or not."""
        held: list[Tensor] = []
        for layer in cache.layers:
            if isinstance(layer, LayerState):
                held += layer.tensors.values()
            elif layer.is_initialized:
                held += [layer.keys, layer.values]
        return nbytes_of(held)

    def weights(self) -> dict[str, Tensor]:
        """All weights of the converted layers, by ``layer.name``."""
        pairs = zip(self.layers, self.modules, strict=True)
        return {f"{index}.{name}": tensor for index, part in pairs for name, tensor in part.layer.state_dict().items()}

    def save(self, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the model as it was before, and what was converted as a file beside it.

        :func:`vestige.models.load` reads both from the folder; transformers reads the model as it was. The model's own
        ``save_pretrained`` writes the layers that took over under names that nothing reads.

        Args:
            folder: where to.
            tokenizer: written as well; :func:`vestige.models.load` needs one.

        Raises:
            ModelError: the folder cannot be written.
        """
        from safetensors.torch import save

        target = Path(folder)
        self.model.save_pretrained(target, state_dict=self._original_weights())  # type: ignore[operator]
        plan = json.dumps({"mixer": self.mixer.spec(), "layers": list(self.layers)})
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights().items()}
        content = save(held, metadata={"conversion": plan})
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        try:
            write_whole(target / FILE, content)
        except OSError as error:
            raise ModelError(f"the conversion cannot be written to {str(target)!r}: {error}") from error

    def _original_weights(self) -> dict[str, Tensor]:
        """The weights of the whole model, of the attention that was there in the place of what is."""
        weights = self.model.state_dict()
        for name, part in self.model.named_modules():
            if isinstance(part, ConvertedAttention):
                weights = {key: tensor for key, tensor in weights.items() if not key.startswith(f"{name}.")}
                weights |= {f"{name}.{key}": tensor for key, tensor in part.original.state_dict().items()}
        return weights


def convert(model: nn.Module, mixer: AttentionMixer | str, layers: str | int | Iterable[int] = "all") -> Conversion:
    """Let a mixer take over from attention layers of a pretrained model.

    Args:
        model: a Hugging Face decoder with rotary positions (Llama, Mistral, Qwen, Gemma 1 and 3, SmolLM ...).
        mixer: a mixer on queries, keys and values, as an object or a name. Heads and their width are the model's.
        layers: which: ``"all"``, ``"2-29"`` (both ends included), ``"0,3,5-7"``, or numbers.

    Raises:
        SpecError: a layer that is not there; a mixer that does not fit, or needs more than queries, keys and values.
        UnsupportedModelError: the model's attention is of another make.
        PatchConflictError: something else has taken hold of the model's cache.
        PatchError: a layer is converted already.
    """
    mixer = _on_projections(mixer)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}; convert takes a model alone, no tokenizer")
    if any(isinstance(part, ConvertedAttention) for part in model.modules()):
        raise PatchError("the model is converted already; undo that first, or name all layers at once")
    anatomy = Anatomy.of(model)
    chosen = anatomy.layers_of(layers)
    _check_model(anatomy, chosen)
    places = {index: _place(anatomy, index) for index in chosen}
    mixer = _on_heads_of(mixer, anatomy)
    for place in places.values():
        mixer.check_place(place)
    current = Pass()
    patch = Patch(model, f"conversion to {mixer.name}", claims={"kv-cache"})
    with patch.building():
        patch.hook(anatomy.base, _announce(anatomy.base, current), "forward_pre", with_kwargs=True)
        modules = []
        for index in chosen:
            part = anatomy.layers[index]
            modules.append(ConvertedAttention(_taken_over(mixer, places[index], part), part.attention, index, current))
            patch.module(part.attention, modules[-1])
    return Conversion(mixer, chosen, tuple(modules), patch, current)


def restore(model: nn.Module, folder: str | os.PathLike[str]) -> Conversion:
    """Convert a model as :meth:`Conversion.save` has written it.

    Raises:
        ModelError: there is no such file, or it does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import safe_open

    path = Path(folder) / FILE
    try:
        with safe_open(path, framework="pt") as file:
            plan = json.loads((file.metadata() or {})["conversion"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        swap = convert(model, AttentionMixer.from_spec(plan["mixer"]), plan["layers"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError, SpecError) as error:
        raise ModelError(f"no conversion can be read from {str(path)!r}: {error}") from error
    with swap.patch.building():
        for index, part in zip(swap.layers, swap.modules, strict=True):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
            try:
                part.layer.load_state_dict(own)
            except RuntimeError as error:
                raise ModelError(f"the conversion in {str(path)!r} does not fit layer {index}: {error}") from error
    return swap


def _announce(base: nn.Module, current: Pass) -> Callable[..., None]:
    """A hook that takes note of padding and packed sequences before a pass begins."""
    signature = inspect.signature(base.forward)

    def announce(module: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        told = signature.bind_partial(*arguments, **given).arguments
        told |= told.pop("kwargs", {})
        mask, positions = told.get("attention_mask"), told.get("position_ids")
        current.held = current.starts = None
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise InputError("attention_mask of a converted model must be (batch, tokens), one where tokens are real")
        if mask is not None and not bool(mask.all()):
            check_padding(mask.bool())
            current.held = mask.bool()
        if mask is None and positions is not None and told.get("past_key_values") is None and positions.shape[-1] > 1:
            begins = torch.ones_like(positions, dtype=torch.bool)
            begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
            current.starts = begins if bool(begins[:, 1:].any()) else None

    return announce


def _check_model(anatomy: Anatomy, chosen: tuple[int, ...]) -> None:
    """Refuse attention that is more than a softmax of rotated queries and keys."""
    if not anatomy.causal or anatomy.position != "rotary":
        raise UnsupportedModelError(
            f"{anatomy.architecture} cannot be converted: its attention is not causal with rotary positions"
        )
    if getattr(anatomy.config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{anatomy.architecture} cannot be converted: its attention scores are capped")
    for index in chosen:
        attention = anatomy.layers[index].attention
        parts = [getattr(attention, name, None) for name in PROJECTIONS]
        if not all(isinstance(part, nn.Linear) for part in parts):
            raise UnsupportedModelError(
                f"{anatomy.architecture} cannot be converted: its attention does not keep {', '.join(PROJECTIONS)} "
                f"as linear maps of their own"
            )


def _place(anatomy: Anatomy, index: int) -> Place:
    return Place(
        hidden_size=anatomy.hidden_size,
        heads=anatomy.num_heads,
        kv_heads=anatomy.num_kv_heads,
        head_dim=anatomy.head_dim,
        index=index,
        layers=anatomy.num_layers,
        context=anatomy.max_positions,
        eps=getattr(anatomy.config, "rms_norm_eps", 1e-6),
    )


def _on_projections(mixer: Any) -> AttentionMixer:
    """A mixer that works on queries, keys and values.

    Raises:
        SpecError: there is none of that name, or it has other projections; those that work are named.
    """
    found = mixer if isinstance(mixer, Mixer) else Mixer.from_spec(mixer)
    if not isinstance(found, AttentionMixer):
        allowed = ", ".join(names_of(AttentionMixer))
        raise SpecError(
            f"{found.name} has projections of its own and cannot take over from attention; allowed: {allowed}"
        )
    return found


def _on_heads_of(mixer: AttentionMixer, anatomy: Anatomy) -> AttentionMixer:
    """The mixer with the model's heads.

    Raises:
        SpecError: it names others.
    """
    sizes = {"heads": anatomy.num_heads, "kv_heads": anatomy.num_kv_heads, "head_dim": anatomy.head_dim}
    for name, size in sizes.items():
        if getattr(mixer, name) not in (None, size):
            raise SpecError(f"{mixer.name}: {name} = {getattr(mixer, name)}; the model's attention has {size}")
    return mixer.replace(**sizes)


def _taken_over(mixer: AttentionMixer, place: Place, part: Layer) -> AttentionLayer:
    """A layer that begins with copies of an attention's weights."""
    attention = part.attention
    layer = mixer.build(place)
    if not isinstance(layer, AttentionLayer):
        raise SpecError(f"{mixer.name} does not work on queries, keys and values")
    weight = attention.q_proj.weight
    layer.to(device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]
    for name in (*PROJECTIONS, *NORMS):
        if isinstance(getattr(attention, name, None), nn.Module):
            setattr(layer, name, copy.deepcopy(getattr(attention, name)))
    layer.scaling = float(attention.scaling)  # type: ignore[arg-type]
    return layer

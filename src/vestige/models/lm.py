"""One language model for every way to read the past: its blocks are named in its config.

>>> from vestige.models import VestigeConfig, VestigeLM
>>> model = VestigeLM(VestigeConfig(blocks="gated-delta-net*3 softmax", hidden_size=256))

Importing this module registers the model with ``AutoConfig`` and ``AutoModelForCausalLM``.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from vestige.errors import InputError, SpecError
from vestige.layers.initialise import initialise_one
from vestige.layers.layout import Layout, check_boundaries, check_padding, positions_of, starts_of
from vestige.layers.norms import build_norm
from vestige.models.blocks import BlockSpec
from vestige.models.config import VestigeConfig
from vestige.models.replay import Replay
from vestige.models.state import VestigeState

__all__ = ["VestigeBlock", "VestigeLM", "VestigeModel"]

_FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class VestigeBlock(GradientCheckpointingLayer):
    """A mixer and a channel mixer, joined to the residual stream by one of :data:`vestige.models.blocks.RESIDUALS`."""

    def __init__(self, config: VestigeConfig, spec: BlockSpec, index: int) -> None:
        super().__init__()
        place = config.place(index)
        self.index, self.residual = index, spec.residual
        self.mixer = spec.mixer.build(place)
        self.mixer_norm = build_norm(spec.norm, config.hidden_size, config.norm_eps)
        self.channel = None if spec.channel is None else spec.channel.build(place)
        if self.channel is not None and spec.residual != "parallel":
            self.channel_norm = build_norm(spec.norm, config.hidden_size, config.norm_eps)
        if spec.residual == "sandwich":
            self.mixer_out_norm = build_norm(spec.norm, config.hidden_size, config.norm_eps)
            if self.channel is not None:
                self.channel_out_norm = build_norm(spec.norm, config.hidden_size, config.norm_eps)

    def forward(
        self, x: Float[Tensor, "batch length hidden"], layout: Layout, past_key_values: VestigeState | None = None
    ) -> Float[Tensor, "batch length hidden"]:
        state = None if past_key_values is None else past_key_values.layers[self.index]
        if self.residual == "post":
            x = self.mixer_norm(x + self.mixer(x, layout, state))
            return x if self.channel is None else self.channel_norm(x + self.channel(x))
        normed = self.mixer_norm(x)
        mixed = self.mixer(normed, layout, state)
        if self.residual == "parallel":
            return x + mixed if self.channel is None else x + mixed + self.channel(normed)
        x = x + (self.mixer_out_norm(mixed) if self.residual == "sandwich" else mixed)
        if self.channel is None:
            return x
        changed = self.channel(self.channel_norm(x))
        return x + (self.channel_out_norm(changed) if self.residual == "sandwich" else changed)


class VestigePreTrainedModel(PreTrainedModel):
    """What transformers has to know of the model."""

    config_class = VestigeConfig
    config: VestigeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VestigeBlock"]  # noqa: RUF012 (transformers reads plain lists)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # what a state has taken in cannot be taken back: no assisted decoding

    def _init_weights(self, module: nn.Module) -> None:
        initialise_one(module, self.config.initializer_range)


class VestigeModel(VestigePreTrainedModel):
    """Embedding, blocks and a last norm."""

    def __init__(self, config: VestigeConfig) -> None:
        super().__init__(config)
        plan = config.plan()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(VestigeBlock(config, spec, index) for index, spec in enumerate(plan))
        self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.attends = any(spec.mixer.attends for spec in plan)
        self.signature = config.signature
        self.gradient_checkpointing = False
        self.post_init()

    def new_state(self) -> VestigeState:
        """An empty state."""
        return VestigeState(self.config, self.signature)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Int[Tensor, "batch all"] | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        past_key_values: VestigeState | None = None,
        inputs_embeds: Float[Tensor, "batch length hidden"] | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens.

        Args:
            input_ids: or ``inputs_embeds``.
            attention_mask: zero at padding, for the tokens of earlier passes too. Padding stands on the left (or on
                the right, where no pass follows), never between tokens.
            position_ids: place of each token in its text; worked out from the mask and the state if not given.
            past_key_values: what was held before; brought up to date.
            use_cache: whether to return a state; default: the config's, and neither while training nor from a replica
                of ``nn.DataParallel``.
            cu_seqlens: where sequences that are packed into one row begin and end: 0, ends. Or ``cu_seq_lens_q``, as
                transformers' collators name it, or, for any number of rows, ``position_ids`` that begin anew.
            output_hidden_states: whether to return the stream before every block and at the end.

        Raises:
            InputError: no tokens or both forms of them; a mask, boundaries or a state that do not fit; attention
                weights are asked for, which are not kept.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds")
        if input_ids is not None and input_ids.dim() != 2:
            raise InputError(f"input_ids is {tuple(input_ids.shape)}; (rows, tokens) is due")
        if kwargs.get("output_attentions"):
            raise InputError("output_attentions: a VestigeLM keeps no attention weights; most mixers have none")
        if past_key_values is not None:
            if not isinstance(past_key_values, VestigeState):
                kind = type(past_key_values).__name__
                raise InputError(f"past_key_values is a {kind}; a VestigeLM holds a VestigeState (model.new_state())")
            past_key_values.check(self.signature, len(self.layers))
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.shape[1] == 0:
            read = past_key_values.seen if past_key_values is not None else 0
            hint = f" behind the {read} that the state has read (generate is given those again)" if read else ""
            raise InputError(f"there are no tokens to read; give at least one per row{hint}")
        checkpointing = self.gradient_checkpointing and self.training
        if checkpointing and past_key_values is not None:
            raise InputError("gradient checkpointing runs blocks twice, so they cannot write a state; turn one off")
        cu_seqlens = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
        layout = self._layout(x, attention_mask, position_ids, past_key_values, cu_seqlens, kwargs)
        if use_cache is None:  # nn.DataParallel cannot join the states of its replicas
            use_cache = self.config.use_cache and not self.training and not hasattr(self, "_is_replica")
        if use_cache and past_key_values is None and layout.starts is None and not checkpointing:
            past_key_values = self.new_state()
        if self.config.scale_embeddings:
            x = x * self.config.hidden_size**0.5
        seen: tuple[Tensor, ...] = (x,)
        for block in self.layers:
            x = block(x, layout=layout, past_key_values=past_key_values)
            seen += (x,)
        x = self.norm(x)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*seen[:-1], x) if wanted else None,
        )

    def _layout(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: VestigeState | None,
        cu_seqlens: Tensor | None,
        options: dict[str, Any],
    ) -> Layout:
        """Where the tokens stand, for all blocks."""
        batch, length, _ = x.shape
        past = 0 if state is None else state.seen
        if state is not None and state.batch_size not in (-1, batch):
            raise InputError(f"the state holds {state.batch_size} rows; the tokens are {batch} rows")
        if position_ids is not None and position_ids.shape not in ((batch, length), (1, length)):
            raise InputError(f"position_ids is {tuple(position_ids.shape)}; {(batch, length)} is due")
        held = _padding(attention_mask, batch, past + length)
        starts = None
        if cu_seqlens is not None:
            check_boundaries(cu_seqlens, batch, length, past)
            if held is not None or state is not None:
                raise InputError("packed sequences have no padding and leave no state; give cu_seqlens alone")
            starts = starts_of(cu_seqlens.to(x.device), length)
            position_ids = positions_of(starts)
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device).expand(batch, length)
            if held is not None:
                position_ids = (held.cumsum(1) - 1).clamp_min(0)[:, -length:]
        elif held is None and state is None and length > 1:
            starts = _restarts(position_ids)
        position_ids = position_ids.expand(batch, length)
        mask = None
        if self.attends:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=None if held is None else held.long(),
                past_key_values=state,
                position_ids=position_ids,
            )
        flash = {name: options[name] for name in _FLASH if options.get(name) is not None}
        if self.attends and starts is not None and not flash and "flash" in self.config._attn_implementation:
            flash = _told_flash(starts)
        return Layout(
            position_ids,
            past=past,
            held=held,
            starts=starts,
            cu_seqlens=cu_seqlens,
            mask=mask,
            implementation=self.config._attn_implementation,
            options=flash,
        )


def _padding(attention_mask: Tensor | None, batch: int, held: int) -> Bool[Tensor, "batch held"] | None:
    """Where tokens are real; ``None`` where all are (while compiling nobody looks)."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, held):
        raise InputError(
            f"attention_mask is {tuple(attention_mask.shape)}; {(batch, held)} is due: rows, and tokens of this pass "
            f"and of earlier ones"
        )
    real = attention_mask.bool()
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    check_padding(real)
    return real


def _restarts(position_ids: Tensor) -> Bool[Tensor, "batch length"] | None:
    """Where packed sequences begin, from positions that begin anew; ``None`` where every row is one sequence."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return None if not torch.compiler.is_compiling() and int(starts.sum()) == len(starts) else starts


def _told_flash(starts: Bool[Tensor, "batch length"]) -> dict[str, Any]:
    """Boundaries for attention implementations that are given no mask and read all rows as one."""
    begins = starts.flatten().nonzero().flatten()
    ends = nn.functional.pad(begins, (0, 1), value=starts.numel()).int()
    longest = int(ends.diff().max())
    return dict(zip(_FLASH, (ends, ends, longest, longest), strict=True))


class VestigeLM(VestigePreTrainedModel, GenerationMixin):
    """The model with a head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: VestigeConfig) -> None:
        super().__init__(config)
        self.model = VestigeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self._replay: Replay | None = None
        self.post_init()

    def new_state(self) -> VestigeState:
        """An empty state, to be passed as ``past_key_values``."""
        return self.model.new_state()

    def replay_steps(self, on: bool = True) -> Self:
        """Decode single tokens by a captured CUDA graph from now on, ``generate`` included.

        It serves models whose every block holds what it holds in tensors of one size, once windows are full; others,
        as those with a ``softmax`` block, and anything but a plain step on CUDA run as before. The tensors of a state
        that is decoded so are written over by the next token: :meth:`VestigeState.fork` makes a copy. Call it again
        after modules of the model were exchanged; weights that change are seen.
        """
        self._replay = Replay() if on else None
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Int[Tensor, "batch all"] | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        past_key_values: VestigeState | None = None,
        inputs_embeds: Float[Tensor, "batch length hidden"] | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token of each; arguments as :meth:`VestigeModel.forward`.

        Args:
            labels: the tokens themselves (they are shifted here); -100 is left out of the loss.
            logits_to_keep: of how many of the last tokens logits are worked out, 0 for all; or which.

        Raises:
            InputError: as :meth:`VestigeModel.forward`; labels with logits of some tokens only.
        """
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise InputError("a loss needs the logits of all tokens; give labels without logits_to_keep")
        replay, state = self._replay, past_key_values
        stream = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        plain = labels is None and use_cache is not False and not stream and input_ids is not None
        if replay is not None and plain and isinstance(state, VestigeState):
            state.check(self.model.signature, len(self.model.layers))
            replayed = replay.step(self, input_ids, state, attention_mask, position_ids)
            if replayed is not None:
                return CausalLMOutputWithPast(logits=replayed, past_key_values=state)
        read = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(read.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            cu_seqlens = kwargs.get("cu_seqlens", kwargs.get("cu_seq_lens_q"))
            if cu_seqlens is not None:  # no sequence predicts the first token of the next
                labels = labels.masked_fill(starts_of(cu_seqlens, labels.shape[1]).to(labels.device), -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=read.past_key_values, hidden_states=read.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Generation begins with an empty state, unless it is given one."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise SpecError(
                f"cache_implementation is {generation_config.cache_implementation!r}; a VestigeLM has one kind of "
                f"state, so leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_state()


AutoConfig.register(VestigeConfig.model_type, VestigeConfig)
AutoModel.register(VestigeConfig, VestigeModel)
AutoModelForCausalLM.register(VestigeConfig, VestigeLM)
# With label smoothing the Trainer shifts the labels of models named here alone; others learn to repeat their input.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[VestigeConfig.model_type] = VestigeLM.__name__

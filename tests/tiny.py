"""Tiny randomly initialised models of every supported architecture, built from their configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}


DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
UNGROUPED = without(DECODER, "num_key_value_heads", "head_dim")
ENCODER = without(UNGROUPED, "bos_token_id", "eos_token_id")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 16},
    "qwen2": without(DECODER, "head_dim"),
    "qwen3": {**DECODER, "head_dim": 16},
    "gemma": {**DECODER, "head_dim": 16},
    "gemma2": {**DECODER, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {**DECODER, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi3": without(DECODER, "head_dim"),
    "gpt2": without(UNGROUPED, "intermediate_size"),
    "opt": {**without(UNGROUPED, "intermediate_size"), "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": UNGROUPED,
    "bert": ENCODER,
    "vit": {
        **without(ENCODER, "vocab_size", "max_position_embeddings"),
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 1,
    },
}
DECODERS = [family for family in FAMILIES if family not in ("bert", "vit")]


def build(family: str, kind: str = "ForCausalLM", seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model; ``kind`` is the end of the name of the transformers ``Auto…`` class (``""`` for a bare one)."""
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    torch.manual_seed(seed)
    return getattr(transformers, f"AutoModel{kind}").from_config(config).eval()


def token_ids(model: nn.Module, batch: int = 1, length: int = 20, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length), none of them padding."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(2, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))

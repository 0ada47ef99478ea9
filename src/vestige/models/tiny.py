"""Small, randomly initialised Hugging Face models: for tests, certificates and trying things out.

They have the parts that matter (grouped-query heads, rotary, learned or no positions, sliding windows, fused
projections) and a few thousand parameters. Weights are drawn larger than transformers draws them, so that attention
is as uneven as in a trained model: with near-uniform attention a wrong score would go unnoticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vestige.core.method import did_you_mean
from vestige.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["ARCHITECTURES", "tiny_model", "tiny_tokenizer"]

VOCABULARY, POSITIONS = 97, 256

_DECODER = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_DECODER, num_attention_heads=9, num_key_value_heads=3, head_dim=4, tie_word_embeddings=True)
    return LlamaForCausalLM(config)


def _llama_deep() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = _DECODER | {"num_hidden_layers": 6}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=6))


def _mistral() -> PreTrainedModel:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**_DECODER, num_attention_heads=6, num_key_value_heads=2, head_dim=6, sliding_window=20)
    return MistralForCausalLM(config)


def _qwen2() -> PreTrainedModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    window = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**_DECODER, num_attention_heads=6, num_key_value_heads=2, **window))


def _gpt2() -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, **tokens)
    return GPT2LMHeadModel(config)


def _opt() -> PreTrainedModel:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {key: value for key, value in _DECODER.items() if key != "intermediate_size"} | {"pad_token_id": 0}
    config = OPTConfig(**sizes, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=36)
    return OPTForCausalLM(config)


def _gpt_neox() -> PreTrainedModel:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = _DECODER | {"hidden_size": 32}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4))


def _bert() -> PreTrainedModel:
    from transformers import BertConfig, BertForMaskedLM

    sizes = _DECODER | {"hidden_size": 32}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4))


def _vit() -> PreTrainedModel:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=5, **sizes))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama-deep": _llama_deep,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt-neox": _gpt_neox,
    "bert": _bert,
    "vit": _vit,
}


@functools.lru_cache(maxsize=32)
def tiny_model(
    architecture: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A small model in evaluation mode; the same object for the same arguments.

    The weights depend on the seed alone: a float64 model is the float32 one, to float32's precision.

    Args:
        architecture: ``llama`` (9 query heads, 3 kv heads), ``llama-deep`` (6 layers, where the others have 2; 6 query
            heads, 2 kv heads), ``mistral`` and ``qwen2`` (6 and 2, sliding window of 20 tokens, in ``qwen2`` in the
            second layer only), ``gpt2``, ``opt``, ``gpt-neox``, ``bert``, ``vit``.

    Raises:
        SpecError: unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise SpecError(f"unknown architecture {architecture!r}; {did_you_mean(architecture, ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture]()
        for name, weight in model.named_parameters():
            _draw(name, weight)
    return model.to(device=device, dtype=dtype).eval()


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, for the small models: printable ASCII but for ``~`` and the backtick, and newlines."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *(chr(code) for code in range(32, 126) if chr(code) != "`")]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def _draw(name: str, weight: torch.Tensor) -> None:
    """Draw a weight so that activations and attention logits are of the order of one, or a little above."""
    if weight.dim() >= 2:
        fan_in = weight[0].numel()
        embedding = "emb" in name or "wte" in name or "wpe" in name
        weight.normal_(std=1.0 if embedding else 1.5 * fan_in**-0.5)
    elif name.endswith("bias"):
        weight.normal_(std=0.1)
    else:  # the gain of a norm
        weight.normal_(mean=1.0, std=0.1)

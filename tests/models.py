"""Tiny models with random weights, of several architectures, with a tokenizer: real files for exactness tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 384
CONTEXT = 1024

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}

TINY = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **_COMMON)),
    "llama3-rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            **_COMMON,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=3, **_COMMON)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_hidden_layers=6,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            sliding_window=64,
            query_pre_attn_scalar=32,
            **_COMMON,
        )
    ),
}
"""Llama, also with Llama 3.1's scaled RoPE; Qwen3 with QK-norm; Gemma 3 with QK-norm, windows and two RoPEs."""


def make_tiny(name: str, folder: Path) -> Path:
    """Write the tiny model `name` into `folder`."""
    torch.manual_seed(len(name))
    model = TINY[name]()
    model.to(torch.float32).save_pretrained(folder)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{token}" for token in range(len(special), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder

"""The random-weight model of the benchmarks."""

from __future__ import annotations

from typing import Any

import torch


def random_llama() -> Any:
    """A random-weight Llama: 6 blocks, width 288, 6 heads, vocabulary 32,000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def prompt_ids(length: int) -> list[int]:
    """`length` random token ids for it, the same in every run."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(32000, (length,), generator=generator).tolist()

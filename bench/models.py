"""The random-weight model of the benchmarks."""

from __future__ import annotations

from typing import Any

import torch

# Blocks, width, inner width, heads, vocabulary.
SHAPES = {
    "llama": (6, 288, 768, 6, 32000),
    "small": (2, 96, 192, 3, 512),
    "narrow": (2, 32, 64, 2, 512),
    "deep": (16, 256, 512, 4, 512),
}


def random_llama(shape: str = "llama") -> Any:
    """A random-weight Llama of one of the `SHAPES`, seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    blocks, width, inner, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval()


def prompt_ids(length: int, shape: str = "llama") -> list[int]:
    """`length` random token ids for it, the same in every run."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(SHAPES[shape][-1], (length,), generator=generator).tolist()


def story_ids(model: Any, tokenizer: Any, length: int) -> list[int]:
    """A story of `length` tokens that a story model tells, the same in every run."""
    torch.manual_seed(3)
    start = tokenizer("Once upon a time there was a little girl", return_tensors="pt")
    told = model.generate(
        **start, max_new_tokens=length, do_sample=True, temperature=0.8, eos_token_id=None
    )
    ids: list[int] = told[0][:length].tolist()
    return ids

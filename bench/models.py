"""The random-weight models of the benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Shape(NamedTuple):
    """The sizes of a Llama; `shared`: query heads to a key-value head; `tied`: one embedding."""

    blocks: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    shared: int = 1
    tied: bool = False


SHAPES = {
    "llama": Shape(6, 288, 768, 6, 32000),
    "small": Shape(2, 96, 192, 3, 512),
    "narrow": Shape(2, 32, 64, 2, 512),
    "deep": Shape(16, 256, 512, 4, 512),
    "half": Shape(24, 896, 4864, 14, 151936, shared=7, tied=True),  # Qwen2.5-0.5B's sizes
    "billion": Shape(16, 2048, 8192, 32, 128256, shared=4, tied=True),  # Llama-3.2-1B
    "tiny": Shape(2, 64, 96, 4, 500, shared=4, tied=True),  # the same, for any machine
}


def random_llama(
    shape: str = "llama",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """A random-weight Llama of one of the `SHAPES`, seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads // sizes.shared,
        max_position_embeddings=8192,
        tie_word_embeddings=sizes.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def prompt_ids(length: int, shape: str = "llama") -> list[int]:
    """`length` random token ids for it, the same in every run."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(SHAPES[shape].vocabulary, (length,), generator=generator).tolist()


def story_ids(model: Any, tokenizer: Any, length: int) -> list[int]:
    """A story of `length` tokens that a story model tells, the same in every run."""
    torch.manual_seed(3)
    start = tokenizer("Once upon a time there was a little girl", return_tensors="pt")
    told = model.generate(
        **start, max_new_tokens=length, do_sample=True, temperature=0.8, eos_token_id=None
    )
    ids: list[int] = told[0][:length].tolist()
    return ids

"""Examples in tokens: what a model reads, and where evidence lies in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heat_fast.datasets.example import Example, tokens_in
from heat_fast.errors import InputError
from heat_fast.prompt import EncodedPrompt, encode_prompt, encode_target


@dataclass(frozen=True)
class EncodedExample:
    """An example as one model reads it.

    prompt: its tokens, with their ids and characters.
    target_ids: the target as it continues the prompt.
    evidence, distractor, support: indices of the tokens that hold a character of these parts.
    """

    prompt: EncodedPrompt
    target_ids: tuple[int, ...]
    evidence: tuple[int, ...]
    distractor: tuple[int, ...]
    support: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of the prompt."""
        return self.prompt.token_ids

    @property
    def target_id(self) -> int:
        """The first token of the target: the one that the HEAT paper explains."""
        return self.target_ids[0]


def encode(example: Example, tokenizer: Any) -> EncodedExample:
    """An example in the tokens of a tokenizer, the same as those that are attributed.

    A token belongs to every part that it shares a character with.

    Raises InputError for a tokenizer that does not tell where its tokens lie (one written in
    Python), and for a prompt or target that it makes no tokens of.

    >>> import heat_fast
    >>> from heat_fast.datasets import synthetic
    >>> tokenizer = heat_fast.load_demo_model().tokenizer
    >>> [example] = synthetic(1)
    >>> encoded = encode(example, tokenizer)
    >>> tokenizer.decode([encoded.target_id]) == example.target
    True
    """
    size = len(tokenizer)
    prompt = encode_prompt(example.prompt, tokenizer, size)
    target = encode_target(example.target, tokenizer, size)
    if prompt.offsets is None or target is None:
        raise InputError(
            f"{type(tokenizer).__name__} does not tell where its tokens lie: expected a fast "
            "tokenizer. Load it with use_fast=True."
        )
    parts = (
        tuple(tokens_in(prompt.offsets, spans))
        for spans in (example.evidence, example.distractor, example.support)
    )
    return EncodedExample(prompt, target, *parts)

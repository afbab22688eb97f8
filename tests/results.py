"""Results made up for tests of what shows them: exact numbers, any text, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from heat_fast.config import HeatConfig
from heat_fast.result import Attribution

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    '"><img src=x onerror="window.hacked = 3">',
    "'; window.hacked = 4; '",
    "<!--",
    "-->",
    "]]>",
    "&lt;b&gt;&amp;",
    "{{ 7 * 7 }}{% raw %}",
    "</style></title></textarea>",
    "javascript:window.hacked=5",
    "\u2028\u2029",
    "\u202eevil\u202c",
    "\x00\x1b[31m",
    "\ud800",
    '`${window.hacked = 6}`"',
)


def made_up(
    pieces: Sequence[str],
    targets: Sequence[str] = (" answer",),
    *,
    seed: int = 0,
    text: str | None = None,
    offsets: Any = None,
    special: Sequence[int] = (),
    config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    **changes: Any,
) -> Attribution:
    """A result over a prompt of these pieces, its numbers random; drops have both signs.

    `special` pieces are not in the text, as those that a tokenizer adds.
    """
    if text is None:
        text, offsets, done = "".join(p for i, p in enumerate(pieces) if i not in special), [], 0
        for index, piece in enumerate(pieces):
            end = done if index in special else done + len(piece)
            offsets.append((done, end))
            done = end
    generator = torch.Generator().manual_seed(seed)

    def rows() -> torch.Tensor:
        # Skewed, as scores are: few large ones.
        return torch.rand(len(targets), len(pieces), generator=generator) ** 4

    fields: dict[str, Any] = {
        "gate": rows(),
        "curvature": rows() * 30,
        "information": rows() * 8,
        "log_prob_drop": rows() * 8 - rows() * 8,
        "gradient_norm": rows(),
        "envelope": rows(),
        "target_scores": rows(),
        "curvature_stderr": rows(),
        "token_ids": tuple(range(len(pieces))),
        "tokens": tuple(pieces),
        "offsets": offsets,
        "prompt_text": text,
        "special": tuple(index in special for index in range(len(pieces))),
        "target_ids": tuple(range(len(targets))),
        "target_tokens": tuple(targets),
        "target_log_probs": -torch.arange(1.0, len(targets) + 1) / 4,
        "metadata": {
            "config": {**HeatConfig().to_dict(), **(config or {})},
            "seed": 0,
            "model": "LlamaForCausalLM",
            "name": "/home/somebody/models/tiny",
            "device": "cpu",
            "dtype": "float32",
            "versions": {"heat_fast": "0.1.0"},
            "seconds": {"total": 1.25},
            "counts": {"hvp": 640, "branch_tokens": 12345},
            **(metadata or {}),
        },
    }
    return Attribution(**(fields | changes))


def story(n_tokens: int) -> list[str]:
    """So many pieces of plain English, with line breaks, as a tokenizer would cut them."""
    words = "The harbour of Mirmora has been closed for many years , and nobody knows why .".split()
    pieces = [f" {words[number % len(words)]}" for number in range(n_tokens)]
    pieces[0] = pieces[0].strip()
    for number in range(50, n_tokens, 97):
        pieces[number] = "\n"
    return pieces

"""The embedded model: a tiny Llama that answers questions about generated passages.

It ships with the package, so that everything can be tried without a download. See the README in
this folder for its data, accuracy and limits, and :mod:`heat_fast.demo.corpus` for the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heat_fast.checks import is_whole
from heat_fast.demo.corpus import Example, make_example, make_restatement, tokens_in_spans
from heat_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "WEIGHTS",
    "Demo",
    "Example",
    "load_demo_model",
    "load_files",
    "make_example",
    "make_restatement",
    "tokens_in_spans",
]

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the trained files, in the layout of ``transformers``."""


@dataclass(frozen=True)
class Demo:
    """The embedded model with prompts it was not trained on.

    Attributes:
        model: the model, float32, in eval mode, on the CPU.
        tokenizer: its tokenizer; ``tokenizer(text)`` puts ``<s>`` in front.
        examples: held-out examples, seeds 0, 1, 2, ...
    """

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    examples: tuple[Example, ...]


def load_files(directory: str | Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The trained model and tokenizer of a folder, read from local files only.

    Raises:
        FileNotFoundError: ``directory`` does not hold the trained files.
    """
    folder = Path(directory)
    missing = [
        name
        for name in ("config.json", "model.safetensors", "tokenizer.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}; expected the files written by "
            "`python -m heat_fast.demo.train --output DIR`. Reinstall the package or train them."
        )
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    # A progress bar for a few megabytes would only litter the terminal.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()
    model.eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def load_demo_model(count: int = 8) -> Demo:
    """The embedded model, its tokenizer and ``count`` held-out examples (seeds 0 to count - 1).

    Nothing is downloaded. The model is float32, on the CPU and in eval mode.

    Raises:
        InputError: ``count`` is negative or not a whole number.

    Example:
        >>> from heat_fast.demo import load_demo_model
        >>> demo = load_demo_model()
        >>> demo.examples[0].prompt.endswith("Answer:")
        True
    """
    if not is_whole(count) or count < 0:
        raise InputError(
            f"count is {count!r}: expected how many examples to make, a whole number of at least "
            "0. There is one embedded model, so it needs no name; leave count out for 8 examples."
        )
    model, tokenizer = load_files(WEIGHTS)
    return Demo(model, tokenizer, tuple(make_example(seed) for seed in range(int(count))))

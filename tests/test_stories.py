"""The engine on a real model: the 3M-parameter story model, where it is on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import heat_fast
from assertions import assert_close
from heat_fast.reference import attribute
from oracles import probe_signs

PROMPT = "Lily gave the red ball to Tom. Later, Tom threw the red"
SINGLE = 1e-4


@pytest.mark.slow
def test_a_story_prompt_agrees_with_the_reference(local_model: Callable[[str], Path]) -> None:
    path = local_model("stories3M")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    result = heat_fast.attribute(model, tokenizer, PROMPT, probes=1)
    assert result.target_tokens == (" ball",)
    assert result.prompt_text == PROMPT
    count = len(result.tokens)
    assert result.metadata["counts"]["hvp"] == count

    signs = probe_signs(model, 1, count)
    expected = attribute(model, result.token_ids, result.target_ids, signs)
    for name in heat_fast.result.COMPONENTS:
        assert_close(name, getattr(expected, name), getattr(result, name), rtol=SINGLE)
    assert_close("scores", expected.scores, result.scores, rtol=SINGLE)
    # The target is nearly certain; its log-probability is good to a rounding of the logits.
    log_probs = expected.target_log_probs
    assert_close("log P", log_probs, result.target_log_probs, rtol=0.0, atol=4e-6)

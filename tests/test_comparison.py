"""Two attributions of one prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import families
import heat_fast
from heat_fast import baselines
from heat_fast.errors import InputError
from results import made_up


def test_why_one_target_rather_than_another() -> None:
    """Masked by hand."""
    model, ids = families.build("gpt2"), families.prompt_ids("gpt2", 9)
    one, other = [4, 7], [6]
    left, right = (
        heat_fast.attribute(model, None, ids, each, variant="gs") for each in (one, other)
    )
    found = heat_fast.compare_results(left, right).log_odds_drop()

    def odds(masked: int | None) -> float:
        total = 0.0
        for sign, target in ((1, one), (-1, other)):
            embeddings = model.get_input_embeddings()(torch.tensor([*ids, *target]))
            if masked is not None:
                embeddings = embeddings.index_fill(0, torch.tensor(masked), 0.0)
            rows = model(inputs_embeds=embeddings[None]).logits[0].log_softmax(-1)
            picked = [rows[len(ids) - 1 + place, token] for place, token in enumerate(target)]
            total += sign * float(sum(picked))
        return total

    with torch.no_grad():
        expected = torch.tensor([odds(None) - odds(token) for token in range(len(ids))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for settings, words in (
        ({"masking": "mean"}, "masking='zero' and 'mean'"),
        ({"coverage": 0.9}, "result 1 leaves information out"),
        ({"branch_tolerance": 0.02}, "result 1 has branch_tolerance=0.02"),
    ):
        wrong = heat_fast.attribute(model, None, ids, other, variant="gs", **settings)
        with pytest.raises(InputError, match=words):
            heat_fast.compare_results(left, wrong).log_odds_drop()
    late = heat_fast.attribute(model, None, ids, [5, 6], variant="gs", target_span=(1, 2))
    assert late.lead_ids == (5,) and left.lead_ids == ()
    with pytest.raises(InputError, match="follow different responses, of 0 and 1 tokens"):
        heat_fast.compare_results(left, late).log_odds_drop()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    changed = heat_fast.attribute(model, None, ids, other, variant="gs")
    with pytest.raises(InputError, match="results 0 and 1 are of models with different weights"):
        heat_fast.compare_results(left, changed).log_odds_drop()
    random = baselines.get("random")(model, None, ids, other)
    with pytest.raises(InputError, match="result 1 has no measured drops"):
        heat_fast.compare_results(left, random).log_odds_drop()
    one_out = baselines.get("leave_one_out")(model, None, ids, other)
    exact = heat_fast.attribute(model, None, ids, other, variant="gs")
    torch.testing.assert_close(
        heat_fast.compare_results(exact, one_out).log_odds_drop(),
        torch.zeros(len(ids)),
        rtol=0,
        atol=1e-4,
    )


def test_other_things_than_attributions_cannot_be_compared() -> None:
    result = made_up(["Lily", " ran"])
    pairs: dict[str, tuple[Any, Any]] = {
        "right is NoneType": (result, None),
        "left is dict": (result.to_dict(), result),
    }
    for found, pair in pairs.items():
        with pytest.raises(InputError, match=rf"{found}: expected an Attribution\. Pass"):
            heat_fast.compare_results(*pair)


def test_the_first_difference_of_two_prompts_is_told() -> None:
    left, right = made_up(["Lily", " ran"]), made_up(["Lily", " sat"])
    right = dataclasses.replace(right, token_ids=(0, 9))
    with pytest.raises(InputError, match="first that differ being ' ran' and ' sat'"):
        heat_fast.compare_results(left, right)

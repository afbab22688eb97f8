"""How much of the score lands on the evidence, on prompts whose evidence is known.

The share is reported, not demanded: neither the model nor the method is tuned to it. What is
checked is only that the measurement means something: every score counts once, and the evidence
draws more than an equal spread over the tokens would give it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from heat_fast import Attributor, HeatConfig
from heat_fast.demo import make_example, tokens_in_spans

if TYPE_CHECKING:
    from conftest import Figures
    from heat_fast.demo import Demo

PROMPTS = 40


@pytest.mark.slow
def test_evidence_share_of_the_score(demo: Demo, figures: Figures) -> None:
    attributor = Attributor(demo.model, demo.tokenizer, HeatConfig.preset("full", probes=1))
    shares: dict[str, list[float]] = {"score": [], "gate": [], "curvature": [], "information": []}
    uniform, answered = [], 0
    for seed in range(PROMPTS):
        example = make_example(seed)
        result = attributor.attribute(example.prompt)
        assert result.offsets is not None
        evidence = torch.tensor(tokens_in_spans(result.offsets, example.evidence))
        answered += result.target_tokens[0] == example.answer
        uniform.append(len(evidence) / len(result))
        for name, values in shares.items():
            row = result.scores if name == "score" else result.aggregated(name)
            values.append(float(row[evidence].sum() / row.sum()))

    means = {name: sum(values) / PROMPTS for name, values in shares.items()}
    spread = torch.tensor(shares["score"]).std().item() / PROMPTS**0.5
    expected = sum(uniform) / PROMPTS
    figures.add(
        f"evidence tokens' share over {PROMPTS} held-out prompts, full, 1 probe "
        f"({answered} answered right): score {means['score']:.3f} +- {spread:.3f}, "
        f"gate {means['gate']:.3f}, curvature {means['curvature']:.3f}, "
        f"information {means['information']:.3f}; an equal spread {expected:.3f}"
    )
    assert means["score"] > expected

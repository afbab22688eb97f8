"""Theorem 4, measured: the terms against the error they bound and against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import families
import heat_fast
from assertions import assert_close
from heat_fast import Attribution, InputError, bounds

TARGETS = [4, 6]
WINDOW: dict[str, Any] = {"window": 10, "sink": 1, "tail": 3, "window_weights": "uniform"}
APPROXIMATE: dict[str, dict[str, Any]] = {
    "win": {"variant": "win", **WINDOW},
    "lr": {"variant": "lr", "rank": 5},
    "lr+win": {"variant": "lr+win", "rank": 5, **WINDOW},
    "ls": {"variant": "ls", "layers": 1},
    "coded": {"estimator": "coded", "codes": 4},
    "alpha": {"variant": "lr", "rank": 5, "alpha": 0.7},
}


def run(model: Any, **settings: Any) -> Attribution:
    ids = families.prompt_ids("llama", 18)
    return heat_fast.attribute(model, None, ids, TARGETS, **({"probes": 2} | settings))


@pytest.mark.parametrize("settings", APPROXIMATE.values(), ids=APPROXIMATE)
def test_the_terms_bound_the_error(settings: dict[str, Any]) -> None:
    model = families.build("llama")
    exact = run(model, alpha=settings.get("alpha", 0.0))
    approximate = run(model, **settings)
    found = bounds(model, approximate, exact, sample=3)
    total = found.window + found.curvature + found.information
    assert bool((found.error <= total + 1e-6 * total.max()).all())
    assert float(found.error.max()) > 0
    assert found.sampled == (0, 8, 17)
    assert found.distribution_shift.shape == (2, 3)
    if settings.get("alpha"):
        assert found.theorem is None and found.report()["theorem"] is None
    else:
        assert found.theorem is not None
        # It knows windows and low rank, not the noise of codes or layers that are left out.
        held = (found.error[:, list(found.sampled)] <= found.theorem + 1e-6).all()
        assert bool(held) or not {"window", "rank"} & set(settings)
    windowed = "window" in settings
    assert bool((found.window > 0).any()) == (windowed or "layers" in settings)
    assert bool((found.distribution_shift > 0).all()) == windowed
    assert (found.tail is None) == ("rank" not in settings)


def test_the_tail_bounds_what_low_rank_loses() -> None:
    """`E |(H - H_k)_ii r|_1 <= sqrt(d) tau_k`, and tau_k falls to 0 with the whole rank."""
    model = families.build("llama")
    exact = run(model, probes=64)
    some = bounds(model, run(model, variant="lr", rank=5, probes=64), exact)
    assert some.tail is not None
    lost = (exact.curvature - run(model, variant="lr", rank=5, probes=64).curvature).abs()
    assert bool((lost <= math.sqrt(some.width) * some.tail[:, None]).all())
    order = 18 * some.width
    whole = bounds(model, run(model, variant="lr", rank=order, probes=64), exact)
    assert whole.tail is not None
    assert float((whole.tail / some.tail).max()) < 1e-3


def test_the_norm_is_that_of_the_hessian() -> None:
    model = families.build("llama", dtype=torch.float64)
    ids = families.prompt_ids("llama", 6)
    result = heat_fast.attribute(model, None, ids, 4, "lr", rank=400, probes=1)
    embeddings = model.get_input_embeddings()(torch.tensor(ids)).detach()

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(model(inputs_embeds=x[None]).logits[0, -1], -1)[4]

    hessian = torch.autograd.functional.hessian(log_prob, embeddings)
    # Four probes: the estimate of |H|_F^2 spreads by about 1 / sqrt(2) of it at the very worst.
    assert_close("|H|_F", hessian.norm(), result.metadata["low_rank"]["norm"][0], rtol=0.5)


def test_distributions_against_plain_forwards() -> None:
    model = families.build("llama")
    exact, approximate = run(model), run(model, variant="win", **WINDOW)
    found = bounds(model, approximate, exact, sample=1)
    ids = [*exact.token_ids, *exact.target_ids[:-1]]
    embeddings = model.get_input_embeddings()(torch.tensor(ids)).detach()

    def probabilities(rows: list[int], masked: int | None = None) -> torch.Tensor:
        context = embeddings[rows].clone()
        if masked is not None:
            context[rows.index(masked)] = 0
        return model(inputs_embeds=context[None]).logits[0, -2:].detach().softmax(-1)

    whole = list(range(len(ids)))
    shifts, smallest = [], []
    for start, stop in [(1, 7), (4, 10), (7, 13), (9, 15)]:
        rows = [0, *range(start, stop), *range(15, 19)]
        plain, masked = probabilities(rows), probabilities(rows, 0)
        apart = (probabilities(whole) - plain).abs() + (probabilities(whole, 0) - masked).abs()
        shifts.append(apart.sum(-1))
        smallest.append(torch.minimum(plain, masked).amin(-1))
    assert found.sampled == (0,)
    shift = torch.stack(shifts).mean(0)
    assert_close("shift", shift[:, None], found.distribution_shift, rtol=1e-4)
    assert_close("mu", torch.stack(smallest).amin(0), found.mu, rtol=1e-3)
    report = found.report()
    assert report["sampled"] == [0] and len(report["theorem"]) == 2


def test_an_attribution_against_itself_has_no_error() -> None:
    model = families.build("llama")
    exact = run(model)
    found = bounds(model, exact, exact)
    assert float(found.error.max()) == float(found.gate_shift.max()) == 0.0
    assert found.theorem is not None and float(found.theorem.max()) == 0.0


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"masking": "mean"}, "differ in masking"),
        ({"normalize": "sum"}, "normalize='sum'"),
        ({"coverage": 0.9}, "coverage=0.9"),
        ({"variant": "win", **WINDOW, "window_weights": "probability"}, "expected 'uniform'"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(settings: dict[str, Any], text: str) -> None:
    model = families.build("llama")
    with pytest.raises(InputError, match=text):
        bounds(model, run(model, **settings), run(model))


def test_other_wrong_arguments_are_refused() -> None:
    model = families.build("llama")
    exact, windowed = run(model), run(model, variant="win", **WINDOW)
    with pytest.raises(InputError, match="expected one context"):
        bounds(model, exact, windowed)
    with pytest.raises(InputError, match="sample=0"):
        bounds(model, windowed, exact, sample=0)
    for pair, name in (((windowed, 5), "exact"), ((None, exact), "approximate")):
        with pytest.raises(InputError, match=f"{name} is .*: expected an Attribution"):
            bounds(model, *pair)
    other = heat_fast.attribute(model, None, [5, 6, 7], TARGETS, probes=2)
    with pytest.raises(InputError, match="different prompts"):
        bounds(model, other, exact)


def test_other_responses_and_models_are_refused() -> None:
    model, ids = families.build("llama"), families.prompt_ids("llama", 9)

    def of(target: list[int], **settings: Any) -> Attribution:
        return heat_fast.attribute(model, None, ids, target, probes=2, **settings)

    last, exact = {"target_span": (2, 3)}, of([4, 6, 8], target_span=(2, 3))
    for other in (of([5, 7, 8], **last), of([8])):
        with pytest.raises(InputError, match="different prompts, responses or targets"):
            bounds(model, other, exact)
    stranger = families.build("llama", seed=5)
    with pytest.raises(InputError, match="the two attributions are of models with different weigh"):
        bounds(model, of([8]), heat_fast.attribute(stranger, None, ids, [8], probes=2))
    with pytest.raises(InputError, match="the attributions and the model are of models with diff"):
        bounds(stranger, exact, exact)

"""Weights of curvature and information by what masking costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import families
import heat_fast
from heat_fast import InputError, baselines, calibrate
from heat_fast.calibration import _fit
from results import made_up, story


def weighed(beta: float, gamma: float, alpha: float = 0.0) -> Any:
    """A result whose drops are exactly the scores with these weights."""
    result = made_up(story(9), (" one", " two"), config={"alpha": alpha})
    features = beta * result.curvature + gamma * result.information + alpha * result.gradient_norm
    return dataclasses.replace(result, log_prob_drop=result.gate * features)


@pytest.mark.parametrize(("beta", "gamma", "alpha"), [(2.0, 0.5, 0.0), (0.0, 3.0, 0.0), (1, 2, 3)])
def test_weights_that_explain_everything_are_found(beta: float, gamma: float, alpha: float) -> None:
    found = calibrate([weighed(beta, gamma, alpha) for _ in range(3)])
    assert found.beta == pytest.approx(beta, abs=1e-4)
    assert found.gamma == pytest.approx(gamma, abs=1e-4)
    assert found.explained == pytest.approx(1, abs=1e-6)
    assert found.drops == 3 * 2 * 9


def test_weights_are_never_negative_and_the_best_of_those() -> None:
    """Held to SciPy's solver of the general problem."""
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed")
    from heat_fast.calibration import _fit

    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        features = torch.rand(2, 30, generator=generator, dtype=torch.float64)
        drops = torch.randn(30, generator=generator, dtype=torch.float64)
        found = _fit(features, drops)
        expected, _ = optimize.nnls(features.T.numpy(), drops.numpy())
        assert [found.beta, found.gamma] == pytest.approx(expected.tolist(), abs=1e-9)
    nothing = _fit(torch.zeros(2, 5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    assert (nothing.beta, nothing.gamma, nothing.explained) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("span", [None, (1, 3)])
def test_stretches_are_masked_together(span: tuple[int, int] | None) -> None:
    """Their drops by hand, also of targets with a response before them."""
    from heat_fast.calibration import _config, _masked_spans

    model, ids, response = families.build("llama"), families.prompt_ids("llama", 9), [4, 6, 5]
    result = heat_fast.attribute(
        model, None, ids, response, variant="gs", target_span=span, masking="sentinel",
        sentinel_token=3,
    )  # fmt: skip
    first, stop = span or (0, 3)
    generator = torch.Generator().manual_seed(1)
    seen = 0
    for stretch, lost in _masked_spans(model, result, _config([result]), 6, generator):
        assert 2 <= stretch.stop - stretch.start <= len(ids) // 2
        masked = list(ids)
        masked[stretch] = [3] * (stretch.stop - stretch.start)
        both = torch.tensor([[*ids, *response], [*masked, *response]])
        with torch.no_grad():
            rows = model(both).logits.log_softmax(-1)[:, len(ids) - 1 + first : len(ids) - 1 + stop]
        index = torch.tensor(response[first:stop])[None, :, None].expand(2, -1, -1)
        whole, without = rows.gather(-1, index)[..., 0]
        torch.testing.assert_close(lost, (whole - without).float(), rtol=1e-4, atol=1e-5)
        seen += 1
    assert seen == 6
    found = calibrate(result, model, spans=6)
    assert found.drops == (len(ids) + 6) * (stop - first)


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_weights_follow_the_scale_of_a_part(scale: float) -> None:
    features = torch.rand(2, 40, dtype=torch.float64)
    drops = features[0] + 0.3 * features[1] + 0.1 * torch.rand(40, dtype=torch.float64)
    plain = _fit(features, drops)
    scaled = _fit(features * torch.tensor([[scale], [1.0]], dtype=torch.float64), drops)
    assert scaled.beta * scale == pytest.approx(plain.beta)
    assert scaled.gamma == pytest.approx(plain.gamma)
    assert scaled.explained == pytest.approx(plain.explained)


def test_what_cannot_be_calibrated_is_refused() -> None:
    model, ids = families.build("llama"), families.prompt_ids("llama", 12)
    result = heat_fast.attribute(model, None, ids, 4, variant="gs")
    windowed = heat_fast.attribute(model, None, ids, 4, variant="win", probes=1, window=8, tail=2)
    screened = heat_fast.attribute(model, None, ids, 4, variant="gs", coverage=0.9)
    one_out = baselines.get("leave_one_out")(model, None, ids, 4)
    other = heat_fast.attribute(model, None, ids, 4, variant="gs", rollout="input_path")
    for wrong, words in (
        ([], "no attributions"),
        ([3], "result 0 is int"),
        (5, "results is int"),
        (windowed, "result 0 is of several windows"),
        (screened, "leaves information out"),
        (one_out, "is of the method 'leave_one_out'"),
        ([dataclasses.replace(result, metadata={})], "has no measured drops"),
        ([result, other], "differ in rollout"),
    ):
        with pytest.raises(InputError, match=words):
            calibrate(wrong)
    with pytest.raises(InputError, match="spans=2 with model=NoneType"):
        calibrate(result, spans=2)
    with pytest.raises(InputError, match="seed"):
        calibrate(result, model, spans=2, seed=None)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    with pytest.raises(InputError, match="attributions and the model are of models with different"):
        calibrate(result, model, spans=2)

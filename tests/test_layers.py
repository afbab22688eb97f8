"""Gate and curvature through the last blocks only, against the reference, which differentiates the
model's own forward with respect to the residual stream; bounds as in `test_parity`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import families
import heat_fast
from assertions import assert_close
from heat_fast import HeatConfig
from heat_fast.cost import flops
from heat_fast.curvature import code_length
from heat_fast.decoder import view
from heat_fast.reference import Reference, attribute
from oracles import measure, probe_signs

LENGTH = 7
PROBES = 2
TARGETS = [5, 3]
TOLERANCES = {
    "gate": 1e-9,
    "information": 1e-9,
    "log_prob_drop": 1e-9,
    "gradient_norm": 1e-9,
    "curvature": 1e-7,
    "target_scores": 1e-7,
}
EXACT = (*TOLERANCES, "envelope")

every_family = pytest.mark.parametrize("name", families.FAMILIES)


@cache
def model_of(name: str) -> Any:
    return families.build(name, dtype=torch.float64)


def ids_of(name: str) -> list[int]:
    return families.prompt_ids(name, LENGTH)


def blocks_of(name: str) -> int:
    return int(model_of(name).config.get_text_config().num_hidden_layers)


@pytest.mark.parametrize("missing", [1, 2])
@every_family
def test_attribution(name: str, missing: int) -> None:
    layers = blocks_of(name) - missing
    if layers < 1:
        pytest.skip(f"{name} has {blocks_of(name)} blocks")
    model, ids = model_of(name), ids_of(name)
    probes = probe_signs(model, PROBES, LENGTH)
    rollout = ("value_path", "input_path")[missing - 1]
    expected = attribute(model, ids, TARGETS, probes, layers=layers, rollout=rollout)
    settings: dict[str, Any] = {"rollout": rollout, "probes": PROBES, "token_budget": 23}
    actual = measure(model, ids, TARGETS, layers=layers, **settings)
    for part, rtol in TOLERANCES.items():
        assert_close(f"{name} {part}", getattr(expected, part), actual[part], rtol=rtol)
    metadata = actual.result.metadata
    assert metadata["layers"] == {"used": layers, "of": blocks_of(name)}
    whole = measure(model, ids, TARGETS, **settings)
    assert torch.equal(whole["information"], actual["information"])
    for part in ("gate", "curvature", "gradient_norm"):
        assert not torch.allclose(whole[part], actual[part], rtol=1e-3), part


@every_family
def test_all_blocks_are_the_whole_model(name: str) -> None:
    """Learned positions are a constant beside X, and Gemma's scale lies inside it."""
    model, ids = model_of(name), ids_of(name)
    whole = measure(model, ids, TARGETS, probes=PROBES)
    for layers in (blocks_of(name), blocks_of(name) + 3):
        actual = measure(model, ids, TARGETS, layers=layers, probes=PROBES)
        for part in EXACT:
            assert torch.equal(whole[part], actual[part]), part


def test_the_preset_takes_a_small_model_whole() -> None:
    actual = measure(model_of("llama"), ids_of("llama"), TARGETS, variant="ls", probes=PROBES)
    whole = measure(model_of("llama"), ids_of("llama"), TARGETS, probes=PROBES)
    assert torch.equal(whole["target_scores"], actual["target_scores"])
    assert HeatConfig.preset("ls").layers == 6
    assert actual.result.metadata["layers"] == {"used": 3, "of": 3}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_other_curvatures(name: str) -> None:
    model, ids = model_of(name), ids_of(name)
    reference = Reference(model, 2)
    signs = probe_signs(reference.model, PROBES, LENGTH + len(TARGETS))
    settings: dict[str, dict[str, Any]] = {
        "row": {"estimator": "row"},
        "grad_squared": {"curvature": "grad_squared"},
        "block": {"estimator": "coded", "codes": code_length(LENGTH)},
    }
    for label, setting in settings.items():
        actual = measure(model, ids, TARGETS, layers=2, probes=PROBES, **setting)
        for row, target in enumerate(TARGETS):
            embeddings = reference.embed([*ids, *TARGETS[:row]])
            kind = "grad_squared" if label == "grad_squared" else "hessian"
            estimator = "row" if label == "row" else "block"
            expected = reference.curvature(
                embeddings, target, LENGTH, signs, kind=kind, estimator=estimator
            )
            assert_close(f"{name} {label}", expected, actual["curvature"][row], rtol=1e-7)


def test_gauss_newton_converges() -> None:
    """One draw for all tokens, whose error falls as 1 / sqrt(probes): 6 % at 256, held to twice."""
    model, ids, probes = model_of("llama"), ids_of("llama"), 256
    reference = Reference(model, 2)
    signs = probe_signs(reference.model, probes, LENGTH)
    expected = reference.curvature(
        reference.embed(ids), TARGETS[0], LENGTH, signs, kind="gauss_newton"
    )
    settings: dict[str, Any] = {"curvature": "gauss_newton", "layers": 2, "probes": probes}
    actual = measure(model, ids, TARGETS[0], **settings)["curvature"][0]
    assert_close("gauss_newton", expected, actual, rtol=0.125, elementwise=True)


def test_fewer_blocks_cost_less_and_information_the_same() -> None:
    model = families.build("llama")
    decoder = view(model, 20)
    costs = [flops(decoder, 20, 1, HeatConfig(layers=layers)) for layers in (None, 3, 2, 1)]
    assert costs[0] == costs[1]
    assert costs[1]["curvature"] > costs[2]["curvature"] > costs[3]["curvature"]
    assert costs[1]["gate"] > costs[2]["gate"] > costs[3]["gate"]
    for part in ("trunk", "information"):
        assert len({cost[part] for cost in costs}) == 1
    peaks = [
        heat_fast.estimate(model, 20, config=HeatConfig(layers=n), calibrate=False).peak_bytes
        for n in (3, 2, 1)
    ]
    assert peaks == sorted(set(peaks), reverse=True)


def test_half_precision_directions_follow_the_stream() -> None:
    """bfloat16 has 8 bits: the ranking of S survives only if nothing under- or overflows."""
    name, model = "llama", families.build("llama", dtype=torch.bfloat16)
    expected = measure(model_of(name), ids_of(name), TARGETS[0], layers=1, probes=PROBES)
    actual = measure(model, ids_of(name), TARGETS[0], layers=1, probes=PROBES)
    assert_close("curvature", expected["curvature"], actual["curvature"], rtol=0.1)

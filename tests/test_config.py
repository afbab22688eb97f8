"""Settings: defaults, presets, checks and messages."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

import heat_fast
from heat_fast import config as config_module
from heat_fast.config import PRESETS, HeatConfig, Settings
from heat_fast.errors import ConfigError, HeatError


def test_defaults_are_the_papers() -> None:
    config = HeatConfig()
    assert (config.variant, config.beta, config.gamma, config.alpha) == ("full", 0.5, 0.5, 0.0)
    assert (config.rollout, config.curvature, config.estimator) == (
        "value_path",
        "hessian",
        "block",
    )
    assert (config.probes, config.masking, config.normalize) == (10, "zero", None)
    assert (config.aggregate, config.seed, config.token_budget) == ("mean", 0, None)
    assert (config.layers, config.coverage, config.branch_tolerance) == (None, None, None)
    assert (config.window, config.overlap, config.sink, config.tail) == (None, 0.5, 1, 64)
    assert config.window_weights == "probability"


def test_is_frozen_and_hashable() -> None:
    config = HeatConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 1.0  # type: ignore[misc]
    assert {config: 1}[HeatConfig()] == 1


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_equals_naming_the_variant(name: str) -> None:
    config = HeatConfig.preset(name)
    assert config == HeatConfig(variant=name)
    for field, value in PRESETS[name].items():
        assert getattr(config, field) == value


def test_gs_preset_changes_the_curvature_and_can_be_overridden() -> None:
    assert HeatConfig.preset("gs").curvature == "grad_squared"
    assert HeatConfig.preset("gs", curvature="hessian").curvature == "hessian"
    assert HeatConfig.preset("gs", probes=3).probes == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, value) for name in ("beta", "gamma", "alpha") for value in (-0.1, math.nan)],
        ("beta", math.inf),
        ("beta", 10**400),
        ("beta", True),
        ("beta", "0.5"),
        ("beta", None),
        ("beta", 1 + 0j),
        ("probes", 0),
        ("probes", 2.0),
        ("probes", True),
        ("codes", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("token_budget", 0),
        ("sentinel_token", -1),
        *[("layers", value) for value in (0, -1, 2.0, True, "all")],
        *[("window", value) for value in (0, 9.0, "auto", True)],
        *[("overlap", value) for value in (-0.1, 1, 1.5, math.nan, "0.5", None)],
        *[("window_weights", value) for value in ("mean", None, 1)],
        *[("window_tolerance", value) for value in (0, 1, 1.5, math.nan, "0.1", True)],
        *[(name, value) for name in ("sink", "tail") for value in (-1, 0.5, None)],
        *[("coverage", value) for value in (0, 1.0, -0.1, math.nan, "0.9", True)],
        *[("branch_tolerance", value) for value in (0, -0.1, math.inf, "0.02", False)],
        ("rollout", "paths"),
        ("rollout", ["value_path"]),
        ("curvature", None),
        ("estimator", "blocks"),
        ("masking", "Zero"),
        ("normalize", "mean"),
        ("aggregate", "median"),
    ],
)
def test_bad_value_names_the_field_and_what_was_expected(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="expected") as caught:
        HeatConfig(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{field}=")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, HeatError)


@pytest.mark.parametrize("variant", ["ful", "lr+wim", "", None, 3, ["full"]])
def test_unknown_variant_lists_what_exists(variant: object) -> None:
    with pytest.raises(ConfigError, match="unknown variant") as caught:
        HeatConfig.preset(variant)  # type: ignore[arg-type]
    for name in PRESETS:
        assert name in str(caught.value)


def test_unknown_name_suggests_the_close_one() -> None:
    for make in (HeatConfig().replace, lambda **o: HeatConfig.preset("full", **o)):
        with pytest.raises(ConfigError, match=r"'probs'.*Did you mean 'probes'"):
            make(probs=3)
    with pytest.raises(ConfigError, match=r"Known names: .*variant"):
        HeatConfig.from_dict({"zzzzzz": 1})


def test_a_configuration_is_no_setting(demo: Any) -> None:
    config = HeatConfig(variant="gs", seed=3)
    given: Any = {"config": config}
    with pytest.raises(ConfigError, match=r"^config is no setting: expected .* Pass a HeatConfig"):
        heat_fast.attribute(demo.model, demo.tokenizer, "Maria slept.", **given)
    told: Any = config.to_dict()  # as the message says
    result = heat_fast.attribute(demo.model, demo.tokenizer, "Maria slept.", **told)
    assert result.metadata["config"] == told


def test_useless_combinations_are_rejected() -> None:
    with pytest.raises(ConfigError, match="all 0"):
        HeatConfig(beta=0, gamma=0)
    with pytest.raises(ConfigError, match="nothing to score"):
        HeatConfig(curvature="none", gamma=0)
    with pytest.raises(ConfigError, match="sentinel_token"):
        HeatConfig(masking="sentinel")
    with pytest.raises(ConfigError, match="at least 2 codes"):
        HeatConfig(estimator="coded", codes=1)
    with pytest.raises(ConfigError, match="more test vectors than the rank"):
        HeatConfig(variant="lr", sketch=1)
    assert HeatConfig(variant="lr", sketch=1, passes=2).passes == 2
    with pytest.raises(ConfigError, match="one name"):
        HeatConfig.preset("full", variant="gs")
    assert HeatConfig(beta=0, gamma=0, alpha=1).alpha == 1.0
    assert HeatConfig(masking="sentinel", sentinel_token=0).sentinel_token == 0


def test_choices_without_effect_are_rejected() -> None:
    for curvature in ("grad_squared", "none", "gauss_newton"):
        for estimator in ("coded", "row"):
            with pytest.raises(ConfigError, match=f"{estimator}.* has no effect .*{curvature}"):
                HeatConfig(curvature=curvature, estimator=estimator)  # type: ignore[arg-type]
        assert HeatConfig(curvature=curvature).estimator == "block"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no effect"):
        HeatConfig(estimator="row").replace(variant="gs")
    for masking in ("zero", "mean"):
        with pytest.raises(ConfigError, match=f"sentinel_token=5 has no effect .*{masking}"):
            HeatConfig(masking=masking, sentinel_token=5)  # type: ignore[arg-type]
    for name, value in (("rank_scope", "token"), ("passes", 2)):
        for estimator in ("block", "coded", "row"):
            with pytest.raises(
                ConfigError, match=f"{name}=.*{value}.* has no effect .*{estimator}"
            ):
                HeatConfig(estimator=estimator, **{name: value})
        assert getattr(HeatConfig(variant="lr", **{name: value}), name) == value
    with pytest.raises(ConfigError, match=r"low_rank.* has no effect .*gauss_newton"):
        HeatConfig(variant="lr", curvature="gauss_newton")
    assert HeatConfig(rank=5, sketch=1).sketch == 1.0
    # Amounts of sampling may be set once for every variant.
    assert HeatConfig(variant="gs", probes=3, codes=4, seed=5).codes == 4


def test_what_is_expected_names_none_and_auto() -> None:
    for field in ("normalize", "sentinel_token", "token_budget"):
        with pytest.raises(ConfigError, match="or None"):
            HeatConfig(**{field: "mean"})
    for field in ("probes", "codes"):
        with pytest.raises(ConfigError, match="or 'auto'"):
            HeatConfig(**{field: "many"})
        assert getattr(HeatConfig(**{field: "auto"}), field) == "auto"


def test_numbers_become_plain_python_numbers() -> None:
    config = HeatConfig(beta=1, gamma=np.float32(0.25), probes=np.int64(3))  # type: ignore[arg-type]
    assert (type(config.beta), type(config.gamma), type(config.probes)) == (float, float, int)
    json.dumps(config.to_dict(), allow_nan=False)


def test_replace_keeps_choices_and_follows_a_new_variant() -> None:
    config = HeatConfig(probes=3)
    assert config.replace(beta=1.0) == HeatConfig(probes=3, beta=1.0)
    assert config.replace(variant="gs") == HeatConfig(variant="gs", probes=3)
    assert config.replace(variant="gs").replace(variant="full") == config
    assert HeatConfig(curvature="none").replace(variant="gs").curvature == "none"
    with pytest.raises(ConfigError):
        config.replace(beta=-1)


def test_dict_round_trip_is_exact() -> None:
    config = HeatConfig.preset(
        "gs", seed=2**63 - 1, beta=0.1, masking="sentinel", sentinel_token=4, probes="auto"
    )
    assert HeatConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert HeatConfig.from_dict({}) == HeatConfig()
    with pytest.raises(ConfigError, match="mapping"):
        HeatConfig.from_dict([("beta", 1)])  # type: ignore[arg-type]


def test_every_field_has_a_check_and_every_preset_names_fields() -> None:
    fields = {field.name: field for field in dataclasses.fields(HeatConfig)}
    for name, field in fields.items():
        assert name == "variant" or callable(field.metadata["check"])
    for preset in config_module.PRESETS.values():
        assert set(preset) <= set(fields)


def test_editors_know_every_setting() -> None:
    """`Settings` says of every field but the variant what `HeatConfig` does."""
    fields = {spec.name: spec.type for spec in dataclasses.fields(HeatConfig)}
    told = {name: hint.__forward_arg__ for name, hint in Settings.__annotations__.items()}
    assert {"variant": "str", **told} == fields

"""Windows: the plan, means over windows against the reference and against runs of single windows,
and what a result says of them.
"""

from __future__ import annotations

import doctest
import io
import json
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

import families
import heat_fast
import heat_fast.windows as windows_module
from assertions import assert_close
from heat_fast import ConfigError, HeatConfig, InputError
from heat_fast.combine import Components
from heat_fast.cost import flops
from heat_fast.decoder import view
from heat_fast.finding import Finding
from heat_fast.forward import log_probs
from heat_fast.reference import attribute_in_windows
from heat_fast.screening import Screening
from heat_fast.terminal import render
from heat_fast.windows import LEAST_WEIGHT, accumulate, leakage, plan_windows, weights
from oracles import COMPONENTS, measure, probe_signs

PROBABILITY, UNIFORM = HeatConfig(), HeatConfig(window_weights="uniform")
LENGTH = 13
PROBES = 2
TARGETS = [5, 3]
SHAPE: dict[str, Any] = {"window": 6, "sink": 1, "tail": 2}
# float64: gate and divergences to 1e-9 of the largest entry, curvature to 1e-7 (see test_parity).
TOLERANCES = dict(zip(COMPONENTS, (1e-9, 1e-7, 1e-9, 1e-9, 1e-9), strict=True))
# The same windows run by themselves: sums of a few numbers in another order.
SAME = 1e-13
# Weighted with the windows' probabilities, which results hold in float32.
WEIGHTED = 1e-6


@cache
def model_of(name: str) -> Any:
    return families.build(name, dtype=torch.float64)


def ids_of(name: str, length: int = LENGTH) -> list[int]:
    return families.prompt_ids(name, length)


# --- the plan -----------------------------------------------------------------------------------


@given(
    tokens=st.integers(1, 200),
    body=st.integers(1, 60),
    sink=st.integers(0, 5),
    tail=st.integers(0, 9),
    overlap=st.floats(0, 0.99),
)
def test_every_token_is_in_a_window_and_all_are_equally_long(
    tokens: int, body: int, sink: int, tail: int, overlap: float
) -> None:
    window = sink + body + tail
    plan = plan_windows(tokens, HeatConfig(window=window, overlap=overlap, sink=sink, tail=tail))
    found = [plan.indices(number) for number in range(len(plan))]
    assert {token for indices in found for token in indices} == set(range(tokens))
    assert len(found) == len({tuple(indices) for indices in found})
    for indices in found:
        assert indices == sorted(set(indices))
        assert len(indices) == plan.length == min(tokens, window)
    if tokens > window:
        ends = {*range(sink), *range(tokens - tail, tokens)}
        assert all(ends <= set(indices) for indices in found)
        starts = [stretch.start for stretch in plan.stretches]
        steps = [after - before for before, after in pairwise(starts)]
        stride = max(1, round((1 - overlap) * body))
        assert set(steps[:-1]) <= {stride} and 0 < steps[-1] <= stride
    else:
        assert len(plan) == 1


def test_the_papers_plain_reading() -> None:
    config = HeatConfig.preset("win", sink=0, tail=0)
    plan = plan_windows(1300, config)
    assert [(each.start, each.stop) for each in plan.stretches] == [
        (0, 512),
        (256, 768),
        (512, 1024),
        (768, 1280),
        (788, 1300),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 65},
        {"variant": "win", "tail": 511},
        {"window": 4, "sink": 2, "tail": 2},
    ],
)
def test_a_window_without_room_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"window=\d+ has no room .* expected at least \d+"):
        HeatConfig(**settings)


def test_docstring_examples_run() -> None:
    outcome = doctest.testmod(windows_module)
    assert outcome.attempted > 0 and outcome.failed == 0


def test_presets() -> None:
    assert (HeatConfig.preset("win").window, HeatConfig.preset("win").layers) == (512, None)
    assert (HeatConfig.preset("ls+win").window, HeatConfig.preset("ls+win").layers) == (512, 6)


# --- the numbers --------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "kept_ends": {},
    "plain": {"sink": 0, "tail": 0},
    "no_overlap": {"overlap": 0.0, "sink": 2, "tail": 1},
    "last_layers": {"layers": 1, "overlap": 0.7},
    "uniform": {"window_weights": "uniform"},
    "tolerance": {"window_tolerance": 0.8},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_against_the_reference(name: str, case: dict[str, Any]) -> None:
    model, ids, settings = model_of(name), ids_of(name), SHAPE | case
    probes = probe_signs(model, PROBES, LENGTH)
    expected = attribute_in_windows(model, ids, TARGETS, probes, **settings)
    actual = measure(model, ids, TARGETS, probes=PROBES, token_budget=23, **settings)
    for part, rtol in TOLERANCES.items():
        assert_close(f"{name} {part}", expected[part], actual[part], rtol=rtol)
    bracket = 0.5 * (expected["curvature"] + expected["information"])
    assert_close("scores", expected["gate"] * bracket, actual["target_scores"], rtol=1e-7)


def test_windows_that_hardly_predict_the_target_are_not_swept() -> None:
    """The same as giving them no weight afterwards."""
    model, ids, target = model_of("llama"), ids_of("llama"), [5]
    settings = {"probes": PROBES, **SHAPE}
    everything = measure(model, ids, target, **settings).result
    rows = torch.tensor(everything.metadata["windows"]["log_probs"])[:, 0]
    tolerance = float((rows - rows.max()).exp().sort().values[-2]) + 1e-4
    expected = [number for number, row in enumerate(rows) if row < rows.max()]
    assert len(expected) == len(rows) - 1
    told: dict[str, list[tuple[int, int]]] = {}
    result = heat_fast.attribute(
        model,
        None,
        ids,
        target,
        window_tolerance=tolerance,
        progress=lambda name, done, total: told.setdefault(name, []).append((done, total)),
        **settings,
    )
    assert list(result.metadata["windows"]["not_swept"]) == expected
    assert result.metadata["windows"]["log_probs"] == everything.metadata["windows"]["log_probs"]
    share = (len(rows) - len(expected)) / len(rows)
    for name, count in everything.metadata["counts"].items():
        assert result.metadata["counts"][name] == share * count
    for name in ("information", "curvature"):
        assert told[name][-1][0] == told[name][-1][1]
        assert {total for _, total in told[name]} == {told[name][-1][1]}
    parts = attribute_in_windows(
        model,
        ids,
        target,
        probe_signs(model, PROBES, LENGTH),
        window_tolerance=tolerance,
        **SHAPE,
    )
    for part in COMPONENTS:
        assert_close(part, parts[part], getattr(result, part), rtol=1e-6)
    assert list(result.metadata["seconds"]) == list(everything.metadata["seconds"])
    assert result.curvature_stderr is not None
    assert result.metadata["windows"]["leakage"] is None  # no pair of windows to compare
    assert f"{len(expected)} of them left out, where the target is at most" in shown(result)
    for name in ("gate", "curvature"):
        assert getattr(result, name).isfinite().all()


def test_a_tolerance_keeps_what_any_target_asks_for() -> None:
    model, ids = model_of("llama"), ids_of("llama")
    found = [
        heat_fast.attribute(model, None, ids, target, window_tolerance=0.9, probes=1, **SHAPE)
        for target in ([5], [4], None)
    ]
    left_out = [set(each.metadata["windows"]["not_swept"]) for each in found]
    assert left_out[0] and left_out[1] and left_out[0] != left_out[1]
    both = heat_fast.attribute(model, None, ids, [5, 4], curvature="none", **SHAPE)
    rows = torch.tensor(both.metadata["windows"]["log_probs"])
    worth = windows_module.worth_sweeping(rows, 0.9)
    result = heat_fast.attribute(
        model, None, ids, [5, 4], curvature="none", window_tolerance=0.9, **SHAPE
    )
    expected = [number for number, each in enumerate(worth) if not each]
    assert list(result.metadata["windows"]["not_swept"]) == expected


@pytest.mark.parametrize("target", [12, 19])
def test_in_half_precision_a_window_that_counts_was_swept(target: int) -> None:
    """The model's own forward chooses, and differs from the view's weights by percents."""
    model, ids = families.build("llama", dtype=torch.bfloat16), families.prompt_ids("llama", 16)
    settings = {"window": 9, "sink": 1, "tail": 2, "curvature": "none", "window_tolerance": 0.99}
    result = heat_fast.attribute(model, None, ids, target, **settings)
    assert result.metadata["windows"]["not_swept"]
    assert float(result.scores.sum()) > 1e-3


def test_what_was_not_swept_has_no_weight() -> None:
    findings = [finding([1.0]), finding([1.0])]
    findings = [
        replace(findings[0], log_probs=torch.tensor([-1.0]), swept=False),
        replace(findings[1], log_probs=torch.tensor([-1.1])),
    ]
    assert weights(findings, HeatConfig(window_tolerance=0.99)).tolist() == [[LEAST_WEIGHT], [1.0]]


def test_one_window_is_always_worth_sweeping() -> None:
    log_probs = torch.tensor([[-3.0, -90.0], [-2.0, -1.0], [-2.0, -math.inf]])
    assert windows_module.worth_sweeping(log_probs, 0.5) == [False, True, True]
    assert windows_module.worth_sweeping(log_probs, 0.3) == [True, True, True]
    assert windows_module.worth_sweeping(log_probs[:, 1:], 1e-30) == [False, True, False]
    assert windows_module.worth_sweeping(torch.full((2, 1), -math.inf), 0.5) == [True, True]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"window_weights": "uniform"}, "no effect with window_weights='uniform'"),
        ({"coverage": 0.9}, "with coverage=0.9: expected one of them"),
        ({"branch_tolerance": 0.1}, "with branch_tolerance=0.1: expected one of them"),
        ({"response_chunk": 2}, "response_chunk=2 with window_tolerance=0.1"),
    ],
)
def test_a_tolerance_beside_what_it_does_not_go_with(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HeatConfig(window=9, tail=2, window_tolerance=0.1, **more)


@pytest.mark.parametrize("more", [{}, {"coverage": 0.2, "branch_tolerance": 0.1}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_window_is_the_whole_prompt(name: str, more: dict[str, Any]) -> None:
    model, ids = model_of(name), ids_of(name)
    whole = measure(model, ids, TARGETS, probes=PROBES, **more)
    for window in (LENGTH, LENGTH + 1):
        shape = {"window": window, "sink": 1, "tail": 2}
        actual = measure(model, ids, TARGETS, probes=PROBES, **shape, **more)
        for part, values in whole.parts.items():
            assert torch.equal(values, actual[part]), part
        assert actual.result.metadata.get("screening") == whole.result.metadata.get("screening")
        assert actual.result.metadata["windows"]["leakage"] is None
        assert torch.equal(whole.result.target_log_probs, actual.result.target_log_probs)


EVERY: dict[str, dict[str, Any]] = {
    "block": {},
    "automatic": {"probes": "auto", "probes_max": 12, "top_k": 3},
    "coded": {"estimator": "coded", "codes": "auto"},
    "row": {"estimator": "row"},
    "gauss_newton": {"curvature": "gauss_newton"},
    "grad_squared": {"variant": "gs"},
    "none": {"curvature": "none"},
    "layers": {"layers": 2, "alpha": 0.5},
    "tolerance": {"branch_tolerance": 0.1},
    "normalize": {"normalize": "sum", "aggregate": "max"},
}


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "probability"])
@pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)
def test_means_of_windows_run_by_themselves(settings: dict[str, Any], uniform: bool) -> None:
    model, ids, settings = model_of("mistral"), ids_of("mistral"), {"probes": PROBES} | settings
    weights = "uniform" if uniform else "probability"
    together = measure(model, ids, TARGETS, window_weights=weights, **SHAPE, **settings)
    plan = plan_windows(LENGTH, HeatConfig(**SHAPE))
    sums = {part: torch.zeros(2, LENGTH, dtype=torch.float64) for part in COMPONENTS}
    errors, visits = torch.zeros(2, LENGTH), torch.zeros(LENGTH, dtype=torch.float64)
    weighed = torch.zeros(2, LENGTH, dtype=torch.float64)
    runs = [
        measure(model, [ids[i] for i in plan.indices(number)], TARGETS, **settings)
        for number in range(len(plan))
    ]
    probabilities = torch.stack([run.result.target_log_probs for run in runs]).double().exp()
    for number, alone in enumerate(runs):
        indices = plan.indices(number)
        share = (probabilities[number] / probabilities.amax(0))[:, None]
        share = torch.ones_like(share) if uniform else share
        for part in COMPONENTS:
            sums[part][:, indices] += share * alone[part]
        if alone.result.curvature_stderr is not None:
            errors[:, indices] += share * alone.result.curvature_stderr
        visits[indices] += 1
        weighed[:, indices] += share
    for part in COMPONENTS:
        mean = sums[part] / (weighed if part == "gate" else visits)
        assert_close(part, mean, together[part], rtol=SAME if uniform else WEIGHTED)
    stderr = together.result.curvature_stderr
    if stderr is not None:
        assert_close("stderr", errors / visits, stderr, rtol=1e-6)
    assert (stderr is None) == (settings.get("curvature") == "gauss_newton")


def test_a_prompt_beyond_the_models_positions() -> None:
    model, limit = model_of("gpt2"), int(model_of("gpt2").config.n_positions)
    ids = [index % 29 for index in range(limit + 17)]
    settings: dict[str, Any] = {"curvature": "grad_squared", "sink": 1, "tail": 4}
    with pytest.raises(InputError, match="Shorten the input"):
        measure(model, ids, TARGETS, **settings)
    with pytest.raises(InputError, match=rf"a window has {limit} tokens .* smaller window"):
        measure(model, ids, TARGETS, window=limit, **settings)
    found = measure(model, ids, TARGETS, window=limit - 1, **settings)  # and a target token read
    assert float(found["target_scores"].min()) >= 0
    assert found.result.metadata["windows"]["tokens"] == limit - 1
    told = heat_fast.estimate(
        model, len(ids), 2, HeatConfig(window=limit - 1, **settings), calibrate=False
    )
    assert told.branches == found.result.metadata["counts"]["branches"]
    config = HeatConfig(window=40, tail=4, curvature="none")
    assert (heat_fast.estimate(model, 300, 2, config).seconds or 0) > 0


def test_the_target_is_that_of_the_whole_prompt() -> None:
    model, ids = model_of("llama"), ids_of("llama")
    own = measure(model, ids, **SHAPE, probes=PROBES)
    alone = measure(model, ids, curvature="none").result
    assert own.result.target_ids == alone.target_ids
    assert own.result.metadata["windows"]["target_of"] == "prompt"
    assert_close("log P", alone.target_log_probs, own.result.target_log_probs, rtol=1e-6)
    given_it = measure(model, ids, list(alone.target_ids), **SHAPE, probes=PROBES)
    assert torch.equal(own["target_scores"], given_it["target_scores"])
    several = measure(model, ids, TARGETS, response_chunk=1, **SHAPE, curvature="none").result
    whole = measure(model, ids, TARGETS, curvature="none").result
    assert_close("log P", whole.target_log_probs, several.target_log_probs, rtol=1e-6)


@pytest.mark.parametrize("memory", [True, False])
def test_the_target_is_the_last_windows_where_the_whole_is_too_much(
    memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, limit = model_of("gpt2"), int(model_of("gpt2").config.n_positions)
    length = 30 if memory else limit + 5

    def exhausted(model: Any, embeddings: Tensor, count: int) -> Tensor:
        if len(embeddings) == length:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return log_probs(model, embeddings, count)

    monkeypatch.setattr("heat_fast.attributor.log_probs", exhausted)
    ids = [index % 29 for index in range(length)]
    shape: dict[str, Any] = {"window": 20, "sink": 1, "tail": 4, "curvature": "none"}
    own = measure(model, ids, **shape)
    plan = plan_windows(length, HeatConfig(**shape))
    last = [ids[i] for i in plan.indices(len(plan) - 1)]
    alone = measure(model, last, curvature="none").result
    assert own.result.target_ids == alone.target_ids
    assert torch.equal(own.result.target_log_probs, alone.target_log_probs)
    assert own.result.metadata["windows"]["target_of"] == "last window"


# --- screening ----------------------------------------------------------------------------------


def test_coverage_in_windows() -> None:
    """A token counts where it was measured, and is skipped only where no window measured it."""
    length = 61
    shape: dict[str, Any] = {"window": 40, "sink": 1, "tail": 3, "window_weights": "uniform"}
    model, ids = model_of("llama"), ids_of("llama", 48) + ids_of("llama", 13)
    settings: dict[str, Any] = {"curvature": "none", "coverage": 0.2}
    together = measure(model, ids, TARGETS, **shape, **settings)
    plan = plan_windows(length, HeatConfig(**shape))
    total = torch.zeros(2, length, dtype=torch.float64)
    visits = torch.zeros(length, dtype=torch.float64)
    rounds = 0
    for number in range(len(plan)):
        indices = plan.indices(number)
        alone = measure(model, [ids[i] for i in indices], TARGETS, **settings)
        skipped = torch.tensor(alone.result.information_skipped)
        total[:, indices] += alone["information"]
        visits[indices] += (~skipped).double()
        rounds += alone.result.metadata["screening"]["coverage"]["rounds"]
    assert int((visits == 0).sum()) > 0 and int((visits == 1).sum()) > 0
    assert together.result.information_skipped == tuple((visits == 0).tolist())
    assert_close("I", total / visits.clamp_min(1), together["information"], rtol=SAME)
    facts = together.result.metadata["screening"]["coverage"]
    assert (facts["tokens"], facts["rounds"]) == (length, rounds)
    assert facts["skipped"] == int((visits == 0).sum())
    assert 0 < facts["audit"]["score_share_lost"] < 1
    assert facts["audit"]["tokens"] == 8 * len(plan)
    assert "information skipped for" in shown(together.result)


# --- leakage ------------------------------------------------------------------------------------


def finding(score: list[float]) -> Finding:
    """A window whose scores with gamma=1 and beta=0 are the given ones."""
    row = torch.tensor([score], dtype=torch.float64)
    zero = torch.zeros_like(row)
    parts = Components(torch.ones_like(row), zero, row, zero, zero)
    return Finding(parts, None, None, (4,), torch.zeros(1))


def test_leakage_and_means_by_hand() -> None:
    config = HeatConfig(window=3, sink=1, tail=0, overlap=0.5, beta=0.0, gamma=1.0)
    plan = plan_windows(4, config)  # 0 1 2 and 0 2 3
    findings = [finding([1.0, 7.0, 2.0]), finding([3.0, 4.0, 9.0])]
    expected: Tensor = torch.tensor([[2.0, 7.0, 3.0, 9.0]], dtype=torch.float64)
    for weighting in (UNIFORM, PROBABILITY):  # both windows give the target log P = 0
        together = accumulate(plan, findings, weighting)
        assert torch.equal(together.parts.information, expected)
        assert torch.equal(together.parts.gate, torch.ones_like(expected))
    # Shared: tokens 0 and 2, scores (1, 2) and (3, 4).
    assert leakage(plan, findings, config) == pytest.approx((2 + 2) / (4 + 6))
    assert leakage(plan, [findings[0], finding([1.0, 2.0, 0.0])], config) == 0
    assert leakage(plan, [finding([0, 5, 2]), finding([3, 0, 5])], config) == 1
    assert leakage(plan, [finding([0, 5, 0]), finding([0, 0, 5])], config) == 0


# --- weights ------------------------------------------------------------------------------------


def test_a_window_counts_as_much_as_it_predicts_the_target() -> None:
    config = HeatConfig(window=3, sink=1, tail=0, overlap=0.5)
    plan = plan_windows(4, config)  # 0 1 2 and 0 2 3
    found = [finding([1.0, 7.0, 2.0]), finding([3.0, 4.0, 9.0])]
    gates = [torch.tensor([[0.2, 0.5, 0.3]]).double(), torch.tensor([[0.6, 0.3, 0.1]]).double()]
    logs = [torch.tensor([-3.0]), torch.tensor([-3.0 - math.log(4)])]
    found = [
        replace(each, parts=replace(each.parts, gate=gate), log_probs=log)
        for each, gate, log in zip(found, gates, logs, strict=True)
    ]
    parts = accumulate(plan, found, PROBABILITY).parts
    expected = torch.tensor([[(1 + 3 / 4) / 2, 7.0, (2 + 4 / 4) / 2, 9 / 4]]).double()
    assert_close("I", expected, parts.information, rtol=1e-6)
    gate = torch.tensor([[(0.2 + 0.6 / 4) / 1.25, 0.5, (0.3 + 0.3 / 4) / 1.25, 0.1]]).double()
    assert_close("gate", gate, parts.gate, rtol=1e-6)
    assert torch.equal(
        accumulate(plan, found, UNIFORM).parts.information,
        torch.tensor([[2.0, 7.0, 3.0, 9.0]]).double(),
    )


def test_what_a_window_skipped_is_taken_to_be_as_measured_elsewhere() -> None:
    """1 nat in the likely window, 0 in the other: the token that this one skipped has no more."""
    plan = plan_windows(4, HeatConfig(window=3, sink=1, tail=0, overlap=0.5))  # 0 1 2 and 0 2 3
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    facts = {
        "rounds": 1,
        "audit": {"tokens": 1, "mean_information": 0.0, "largest_information": 0.0},
    }

    def window(score: list[float], skipped: tuple[bool, ...], log: float) -> Finding:
        screening = Screening(skipped, (nothing,) * 3, {"coverage": facts})
        found = replace(finding(score), screening=screening)
        return replace(found, log_probs=torch.tensor([log]))

    rare = math.log(0.1)
    whole = [window([1, 1, 1], (False,) * 3, 0), window([0, 0, 5], (False,) * 3, rare)]
    part = [
        window([1, 0, 1], (False, True, False), 0),
        window([0, 0, 5], (True, True, False), rare),
    ]
    expected = accumulate(plan, whole, PROBABILITY).parts.information
    found = accumulate(plan, part, PROBABILITY)
    assert_close("measured in both", [[0.5, 1.0, 0.5, 0.5]], expected, rtol=1e-7)
    # Token 0: 1 nat at the mean weight of its windows. Token 1: skipped by its only one.
    assert_close("skipped", [[0.55, 0.0, 0.55, 0.5]], found.parts.information, rtol=1e-7)
    assert found.screening is not None and found.screening.skipped == (False, True, False, False)


def test_weights_of_targets_that_are_out_of_reach() -> None:
    improbable = [
        replace(finding([1.0]), log_probs=torch.tensor(row))
        for row in ([0.0, -math.inf], [-500.0, -math.inf])
    ]
    told = weights(improbable, PROBABILITY)
    assert told.tolist() == [[1.0, 1.0], [LEAST_WEIGHT, 1.0]]


# --- what is told -------------------------------------------------------------------------------


def shown(result: heat_fast.Attribution) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=140)
    console.print(render(result, console))
    return stream.getvalue()


def test_the_result_says_what_was_done(tmp_path: Path) -> None:
    model, ids = model_of("llama"), ids_of("llama")
    result = measure(model, ids, TARGETS, **SHAPE, layers=2, probes=PROBES).result
    windows = result.metadata["windows"]
    plan = plan_windows(LENGTH, HeatConfig(**SHAPE))
    assert windows["stretches"] == tuple((s.start, s.stop) for s in plan.stretches)
    assert (windows["tokens"], windows["sink"], windows["tail"]) == (6, 1, 2)
    assert 0 < windows["leakage"] < 1
    assert windows["target_of"] == "prompt"
    assert len(windows["log_probs"]) == len(plan)
    assert all(len(row) == len(TARGETS) for row in windows["log_probs"])
    text = shown(result)
    assert f"{len(plan)} windows of 6 tokens, weighted by the probability of the target" in text
    assert f"in each (leakage {windows['leakage']:.1%}" in text
    assert "gate and curvature through the last 2 of 3 blocks" in text
    result.save(tmp_path / "result.safetensors")
    loaded = heat_fast.load(tmp_path / "result.safetensors")
    assert loaded.metadata == result.metadata
    assert torch.equal(loaded.target_scores, result.target_scores)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("name", ["block", "automatic", "coded", "gauss_newton", "layers"])
def test_progress_and_estimate_count_all_windows(name: str, targets: int) -> None:
    calls: dict[str, list[tuple[int, int]]] = {}
    settings = {"probes": PROBES} | SHAPE | EVERY[name]
    model = families.build("llama")
    result = heat_fast.attribute(
        model,
        None,
        ids_of("llama"),
        TARGETS[:targets],
        progress=lambda part, done, total: calls.setdefault(part, []).append((done, total)),
        **settings,
    )
    config = HeatConfig(**settings)
    plan = plan_windows(LENGTH, config)
    told = heat_fast.estimate(model, LENGTH, targets, config, calibrate=False)
    cost = flops(view(model, plan.length + targets - 1), LENGTH, targets, config)
    assert calls["total"] == [(number, len(plan)) for number in range(len(plan) + 1)]
    for component, seen in calls.items():
        done, totals = zip(*seen, strict=True)
        sampled = component == "curvature" and "auto" in (config.probes, config.codes)
        assert list(done) == sorted(done) and list(totals) == sorted(totals, reverse=True)
        assert done[0] == 0 and done[-1] == totals[-1]
        assert all(reached < totals[-1] for reached in done[:-1]) or sampled
        if component not in ("total", "trunk"):
            assert totals[0] == cost[component]
            assert sampled or set(totals) == {cost[component]}
    counts = result.metadata["counts"]
    assert (told.branches, told.hvp >= counts["hvp"]) == (counts["branches"], True)
    if "auto" not in (config.probes, config.codes):
        assert told.hvp == counts["hvp"]


def test_low_rank_in_windows_at_full_rank_is_block_in_windows() -> None:
    model = families.build("llama", torch.float64)
    ids = families.prompt_ids("llama", 14)
    settings: dict[str, Any] = {"window": 8, "sink": 1, "tail": 2, "probes": 2}
    whole_rank = 8 * model.config.hidden_size
    exact = heat_fast.Attributor(model, None, HeatConfig(**settings)).attribute(ids, 5)
    config = HeatConfig(estimator="low_rank", rank=whole_rank, **settings)
    full_rank = heat_fast.Attributor(model, None, config).attribute(ids, 5)
    # At full rank a window's low-rank curvature is its block curvature.
    torch.testing.assert_close(full_rank.curvature, exact.curvature, rtol=1e-4, atol=0)
    few = heat_fast.Attributor(model, None, config.replace(rank=3)).attribute(ids, 5)
    (worst,) = few.metadata["low_rank"]["residual"]
    assert worst > 0.1
    assert full_rank.metadata["low_rank"]["residual"][0] < 1e-3

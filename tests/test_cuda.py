"""The engine on a CUDA device: the CPU's numbers, determinism, memory, the state left behind."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

import families
import heat_fast
from assertions import assert_close
from heat_fast import HeatConfig
from oracles import measure
from test_engine import ESTIMATORS, ROUNDING, check_untouched, ids_of, lived_in, same, snapshot

if TYPE_CHECKING:
    from heat_fast.demo import Demo

pytestmark = pytest.mark.gpu

PROBES = 2
# Another device sums in another order, and its exponentials are rounded otherwise.
ACROSS = 1e-4

VARIANTS: dict[str, dict[str, Any]] = {
    **ESTIMATORS,
    "ls": {"variant": "ls", "layers": 2},
    "win": {"variant": "win", "window": 8, "overlap": 0.4, "sink": 1, "tail": 2},
    "lr+win": {"variant": "lr+win", "window": 8, "tail": 2, "rank": 6},
    "ls+win": {"variant": "ls+win", "window": 8, "tail": 2, "layers": 2},
    "gs": {"variant": "gs"},
    "input_path": {"rollout": "input_path"},
    "coverage": {"coverage": 0.9},
    "branch_tolerance": {"branch_tolerance": 0.02},
    "mean": {"masking": "mean"},
}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, whatever a test before left behind."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(model: Any) -> Any:
    return copy.deepcopy(model).to("cuda")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_gives_the_cpu_numbers(name: str) -> None:
    model, ids = families.build(name), families.prompt_ids(name, 12)
    expected = measure(model, ids, [4, 6], probes=PROBES)
    actual = measure(on_gpu(model), ids, [4, 6], probes=PROBES)
    same(name, expected, actual, ACROSS)
    assert actual.result.scores.device.type == "cpu"


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_variant_gives_the_cpu_numbers(name: str, settings: dict[str, Any]) -> None:
    model, ids = families.build(name), families.prompt_ids(name, 14)
    settings = {"probes": PROBES} | settings
    expected = measure(model, ids, [4, 6], **settings)
    actual = measure(on_gpu(model), ids, [4, 6], **settings)
    same(name, expected, actual, ACROSS)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_float64(name: str) -> None:
    """To the rounding of the model's rotary angles, which it forms in float32."""
    model, ids = families.build(name, dtype=torch.float64), ids_of(name)
    expected = measure(model, ids, [4, 6], probes=PROBES)
    same(name, expected, measure(on_gpu(model), ids, [4, 6], probes=PROBES), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gptj"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Against the same rounded weights in float32; the bound is derived in `test_engine`."""
    ids = ids_of(name)
    short = families.build(name, dtype=dtype)
    expected = measure(short.float(), ids, [4, 6], probes=4)
    actual = measure(on_gpu(families.build(name, dtype=dtype)), ids, [4, 6], probes=4)
    same(f"{name} {dtype}", expected, actual, 8 * 30**0.5 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("settings", ESTIMATORS.values(), ids=ESTIMATORS)
def test_batch_size_changes_nothing_and_runs_repeat(settings: dict[str, Any]) -> None:
    model, ids = on_gpu(families.build("llama")), ids_of()
    settings = {"probes": PROBES} | settings
    expected = measure(model, ids, [4, 6], token_budget=4096, **settings)
    for budget in (1, 7, 64):
        same(
            str(budget),
            expected,
            measure(model, ids, [4, 6], token_budget=budget, **settings),
            ROUNDING,
        )
    torch.manual_seed(99)
    again = measure(model, ids, [4, 6], token_budget=4096, **settings)
    for part, values in expected.parts.items():
        assert torch.equal(values, again[part]), part


def test_an_exhausted_device_halves_the_batch(demo: Demo) -> None:
    """The allocator's own failure, from a limit on the process' share of the device."""
    model = on_gpu(demo.model)
    length = 96
    ids = [5 + index % 200 for index in range(length)]
    settings: dict[str, Any] = {"probes": 4, "token_budget": 1 << 20}
    torch.cuda.reset_peak_memory_stats()
    expected = measure(model, ids, [9], **settings)
    peak, resting = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((resting + (peak - resting) / 3) / total)
        actual = measure(model, ids, [9], **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert actual.result.metadata["out_of_memory_retries"] > 0
    same("exhausted", expected, actual, ROUNDING)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_model_and_random_state_are_left_as_they_were(attn: str) -> None:
    model = lived_in("llama", attn).to("cuda")
    before, random = snapshot(model), torch.cuda.get_rng_state()
    heat_fast.attribute(model, None, ids_of(), [4, 6], probes=PROBES)
    check_untouched(before, snapshot(model))
    assert torch.equal(random, torch.cuda.get_rng_state())


def test_estimate_counts_what_a_run_uses(demo: Demo) -> None:
    model = on_gpu(demo.model)
    ids = [5 + index % 200 for index in range(64)]
    plan = heat_fast.estimate(model, len(ids), 1, HeatConfig(probes=4))
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = heat_fast.attribute(model, None, ids, [9], probes=4)
    used = torch.cuda.max_memory_allocated() - resting
    print(f"estimated {plan.peak_bytes} bytes, used {used}")
    assert run.metadata["counts"]["hvp"] == plan.hvp
    assert 0.3 * plan.peak_bytes < used < 1.5 * plan.peak_bytes


def test_command_line() -> None:
    command = [sys.executable, "-m", "heat_fast", "attribute", "--device", "cuda"]
    run = subprocess.run([*command, "--json", "-"], check=True, timeout=120, capture_output=True)
    assert json.loads(run.stdout)["metadata"]["device"].startswith("cuda")


def test_a_trained_model_gives_the_cpu_numbers(demo: Demo) -> None:
    ids = [5 + index % 200 for index in range(48)]
    expected = measure(demo.model, ids, [9, 12], probes=4)
    actual = measure(on_gpu(demo.model), ids, [9, 12], probes=4)
    same("demo", expected, actual, 1e-3)
    assert_close("scores", expected.result.scores, actual.result.scores, rtol=1e-3)

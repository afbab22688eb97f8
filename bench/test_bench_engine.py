"""The exact engine against the authors' algorithm and against its own floor.

Every ratio is taken within this run, from the medians; the numbers compared are checked to be the
same. Both sides use the same probes. The authors' curvature at N = 256 is timed on a sample of its
tokens and multiplied: every one of its products costs the same, since each runs the whole context.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from baselines import authors
from models import story_ids
from sizes import size

from heat_fast import Attribution, Attributor, HeatConfig
from heat_fast.combine import Components, combine
from heat_fast.cost import flops
from heat_fast.decoder import view
from heat_fast.decoder.product import passed_over_by_mkl
from heat_fast.kernels.rademacher import rademacher
from heat_fast.planner import cpu_rows, slices
from heat_fast.ranks import spearman
from heat_fast.sweeps import hessian_rows, tangent_sweep
from heat_fast.trunk import run_adjoint, run_trunk

if TYPE_CHECKING:
    from conftest import Summary

HERE = Path(__file__).resolve().parent
TARGET = 7
SAMPLED_TOKENS = 4
SHORT, LENGTH, LONG = size(64), size(256), size(1024)
STORY = size(64)
# The spread of one probe is about 0.15 of S, so these leave 0.3 % in the value compared with.
CONVERGED_PROBES = size(4096)

Prompt = Callable[[int], list[int]]
Rate = Callable[[], float]


def run(model: Any, ids: list[int], target: Any = TARGET, **settings: Any) -> Attribution:
    return Attributor(model, None, HeatConfig(**settings)).attribute(ids, target)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    value = function()
    return time.perf_counter() - begin, value


def embeddings_of(model: Any, ids: list[int]) -> torch.Tensor:
    embeddings: torch.Tensor = model.get_input_embeddings()(torch.tensor(ids)).detach()
    return embeddings


def authors_curvature_seconds(
    model: Any, ids: list[int], probes: int, sampled: int | None = None
) -> tuple[float, torch.Tensor]:
    """Seconds of the authors' curvature for the whole prompt, and the values that were computed."""
    embeddings = embeddings_of(model, ids)
    signs = rademacher(0, torch.arange(probes)[:, None], torch.arange(len(ids)), 288)
    tokens = range(len(ids)) if sampled is None else range(sampled)
    seconds, values = timed(
        lambda: authors.curvature(model, embeddings, TARGET, signs, tokens=tokens)
    )
    return seconds * len(ids) / len(tokens), values


def median_run(benchmark: Any, function: Callable[[], Attribution], rounds: int) -> Attribution:
    result: Attribution = benchmark.pedantic(function, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["seconds"] = dict(result.metadata["seconds"])
    benchmark.extra_info["counts"] = dict(result.metadata["counts"])
    return result


@pytest.fixture(scope="session")
def story(stories: tuple[Any, Any]) -> tuple[Any, list[int], Attribution, torch.Tensor]:
    """A story: model, ids, its run with one block probe, and the converged S."""
    model, tokenizer = stories
    ids = story_ids(model, tokenizer, STORY)
    exact = run(model, ids, None, probes=1)
    curvature = converged_curvature(model, ids, exact.target_ids[0])
    # The blocks are the engine's: with its own probe they give its own values.
    torch.testing.assert_close(curvature(1), exact.curvature[0], rtol=1e-3, atol=0)
    return model, ids, exact, curvature(CONVERGED_PROBES)


def test_information(
    benchmark: Any, random_llama: Any, prompt_ids: Prompt, matmul_rate: Rate, summary: Summary
) -> None:
    """N = 256: one full forward with all logits per token, against suffixes on the trunk."""
    ids = prompt_ids(LENGTH)
    config = HeatConfig(curvature="none")
    result = median_run(benchmark, lambda: run(random_llama, ids, curvature="none"), 5)
    mine = benchmark.stats.stats.median
    theirs, values = timed(
        lambda: authors.information(random_llama, embeddings_of(random_llama, ids))
    )
    error = float((values - result.information[0]).abs().max() / values.max())
    floor = flops(view(random_llama, LENGTH), LENGTH, 1, config)["information"] / matmul_rate()
    benchmark.extra_info.update(ratio=theirs / mine, share_of_floor=floor / mine, error=error)
    summary.add(f"information, N={LENGTH}: ratio to the authors'", f"{theirs / mine:.1f}")
    summary.add(f"information, N={LENGTH}: share of the FLOP floor", f"{floor / mine:.0%}")
    assert error < 1e-3


@pytest.mark.parametrize(("length", "sampled"), [(SHORT, None), (LENGTH, SAMPLED_TOKENS)])
def test_full_block(
    benchmark: Any,
    random_llama: Any,
    prompt_ids: Prompt,
    matmul_rate: Rate,
    summary: Summary,
    length: int,
    sampled: int | None,
) -> None:
    """`full`, block estimator, the same 4 (N = 256: 2) probes on both sides."""
    ids, probes = prompt_ids(length), 4 if length == SHORT else 2
    result = median_run(benchmark, lambda: run(random_llama, ids, probes=probes), 3)
    mine = benchmark.stats.stats.median
    curved, values = authors_curvature_seconds(random_llama, ids, probes, sampled)
    embeddings = embeddings_of(random_llama, ids)
    lost, _ = timed(lambda: authors.information(random_llama, embeddings))
    gated, _ = timed(lambda: authors.gate(random_llama, embeddings))
    theirs = curved + lost + gated
    compared = result.curvature[0][: len(values)]
    error = float((values - compared).abs().max() / values.max())
    cost = flops(view(random_llama, length), length, 1, HeatConfig(probes=probes))
    floor = cost["curvature"] / matmul_rate()
    share = floor / result.metadata["seconds"]["curvature"]
    benchmark.extra_info.update(
        ratio=theirs / mine, share_of_floor=share, error=error, sampled_tokens=sampled
    )
    summary.add(
        f"full block, N={length}, m={probes}: ratio to the authors'", f"{theirs / mine:.1f}"
    )
    summary.add(f"block curvature, N={length}: share of the FLOP floor", f"{share:.0%}")
    assert error < 1e-3


def test_coded(benchmark: Any, random_llama: Any, prompt_ids: Prompt, summary: Summary) -> None:
    """`coded` with 64 products at N = 256, against the authors' curvature with 10 probes."""
    ids = prompt_ids(LENGTH)
    settings: dict[str, Any] = {"estimator": "coded", "codes": 8, "probes": 8}
    result = median_run(benchmark, lambda: run(random_llama, ids, **settings), 5)
    mine = result.metadata["seconds"]["curvature"]
    theirs, _ = authors_curvature_seconds(random_llama, ids, 1, SAMPLED_TOKENS)
    ratio = 10 * theirs / mine
    benchmark.extra_info.update(ratio=ratio)
    what = f"coded, 64 products, N={LENGTH}: ratio to the authors' curvature, m=10"
    summary.add(what, f"{ratio:.0f}")


def converged_curvature(model: Any, ids: list[int], target: int) -> Callable[[int], torch.Tensor]:
    """`S(m) [N]` with m block probes, from the blocks `H_ii` themselves.

    A block's d columns, d = 192 products for a token, serve any number of probes, while 256 probes
    would take 256 products each.
    """
    embeddings = embeddings_of(model, ids)
    length, width = embeddings.shape
    with torch.no_grad():
        trunk = run_trunk(view(model, length), embeddings, (target,)).with_derivatives()
        adjoint = run_adjoint(trunk, 0, length * width, lambda work: None)
        unit = torch.eye(width)
        blocks = []
        for token in range(length):
            columns = []
            for part in slices(width, max(1, cpu_rows(width) // (length - token))):
                directions = torch.zeros(part.stop - part.start, length - token, width)
                directions[:, 0] = unit[part]
                products = hessian_rows(trunk, tangent_sweep(trunk, directions, token), adjoint)
                columns.append(products[:, 0] / adjoint.head.scale)
            blocks.append(torch.cat(columns))

    def curvature(probes: int) -> torch.Tensor:
        samples = torch.arange(probes)
        signs = [rademacher(0, samples, torch.tensor(token), width) for token in range(length)]
        norms = [(r @ block).abs().sum(-1).mean() for r, block in zip(signs, blocks, strict=True)]
        return torch.stack(norms)

    return curvature


@pytest.mark.parametrize("probes", [4, 8])
def test_coded_fidelity(
    benchmark: Any,
    story: tuple[Any, list[int], Attribution, torch.Tensor],
    probes: int,
    summary: Summary,
) -> None:
    """Rank order of `coded` against converged block curvature on a real model."""
    model, ids, exact, converged = story
    settings: dict[str, Any] = {"estimator": "coded", "codes": 8, "probes": probes, "seed": 1}
    result = median_run(benchmark, lambda: run(model, ids, None, **settings), 3)
    parts = Components(
        exact.gate, converged[None], exact.information, exact.log_prob_drop, exact.gradient_norm
    )
    scores = combine(parts, HeatConfig())[0][0]
    curvature = spearman(result.curvature[0], converged)
    score = spearman(result.scores, scores)
    level = float((result.curvature[0] / converged).median())
    benchmark.extra_info.update(spearman=curvature, spearman_score=score, level=level)
    what = f"coded, {8 * probes} products, stories3M, N={STORY}"
    summary.add(f"{what}: Spearman of S", f"{curvature:.3f}")
    summary.add(f"{what}: Spearman of the score", f"{score:.3f}")
    summary.add(f"{what}: level of S", f"{level:.2f}")


def test_response(benchmark: Any, random_llama: Any, prompt_ids: Prompt, summary: Summary) -> None:
    """A 16-token response over a 128-token prompt, against 16 single runs of the authors'."""
    response_length = size(16)
    ids = prompt_ids(size(128) + response_length)
    prompt, response = ids[:-response_length], ids[-response_length:]
    settings: dict[str, Any] = {"estimator": "coded", "codes": 8, "probes": 8}
    median_run(benchmark, lambda: run(random_llama, prompt, response, **settings), 1)
    mine = benchmark.stats.stats.median
    middle = ids[: len(prompt) + response_length // 2]  # a single run's average context
    embeddings = embeddings_of(random_llama, middle)
    curved, _ = authors_curvature_seconds(random_llama, middle, 1, SAMPLED_TOKENS)
    lost, _ = timed(lambda: authors.information(random_llama, embeddings))
    gated, _ = timed(lambda: authors.gate(random_llama, embeddings))
    ratio = response_length * (10 * curved + lost + gated) / mine
    benchmark.extra_info.update(ratio=ratio)
    what = f"{response_length}-token response, coded: ratio to as many single runs of the authors'"
    summary.add(what, f"{ratio:.0f}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(
    benchmark: Any,
    random_llama: Any,
    prompt_ids: Prompt,
    dtype: torch.dtype,
    summary: Summary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`coded` with 64 products at N = 64, against the same weights in float32 and torch's products.

    Where the CPU has instructions for the dtype both sides of the second ratio are the same.
    """
    ids, settings = prompt_ids(SHORT), {"estimator": "coded", "codes": 8, "probes": 8}
    model = copy.deepcopy(random_llama).to(dtype)
    median_run(benchmark, lambda: run(model, ids, **settings), 5)
    mine = benchmark.stats.stats.median
    wide = statistics.median(timed(lambda: run(random_llama, ids, **settings))[0] for _ in range(5))
    monkeypatch.setattr("heat_fast.decoder.product.has_instructions", lambda _: True)
    plain, _ = timed(lambda: run(model, ids, **settings))
    benchmark.extra_info.update(ratio_to_float32=mine / wide, ratio_to_torch=plain / mine)
    name = str(dtype).removeprefix("torch.")
    what = f"coded, 64 products, {name}, N={SHORT}"
    summary.add(f"{what}: times the seconds of float32", f"{mine / wide:.2f}")
    summary.add(f"{what}: ratio to torch's products", f"{plain / mine:.1f}")


def test_float32_products(
    benchmark: Any,
    random_llama: Any,
    prompt_ids: Prompt,
    summary: Summary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`coded` with 64 products at N = 64 by oneDNN's products, against MKL's, torch's choice."""
    if not passed_over_by_mkl():
        pytest.skip("MKL's products are the better ones on this CPU")
    ids, settings = prompt_ids(SHORT), {"estimator": "coded", "codes": 8, "probes": 8}
    median_run(benchmark, lambda: run(random_llama, ids, **settings), 5)
    mine = benchmark.stats.stats.median
    monkeypatch.setattr("heat_fast.decoder.product.passed_over_by_mkl", lambda: False)
    plain = statistics.median(
        timed(lambda: run(random_llama, ids, **settings))[0] for _ in range(5)
    )
    benchmark.extra_info.update(ratio_to_torch=plain / mine)
    what = f"coded, 64 products, float32, N={SHORT}: ratio to torch's products"
    summary.add(what, f"{plain / mine:.1f}")


def test_peak_memory(benchmark: Any, summary: Summary) -> None:
    """`full` with `coded` at N = 1024: resident memory against the model and one trunk.

    Measured in a process of its own; the time is that of the whole process and says nothing.
    """
    settings = {"estimator": "coded", "codes": 8, "probes": 4}
    command = [sys.executable, str(HERE / "peak_memory.py"), str(LONG), json.dumps(settings)]
    outcome = benchmark.pedantic(
        lambda: subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True), rounds=1
    )
    told = json.loads(outcome.stdout)
    unit = told["model"] + told["trunk"]
    beyond = (told["peak"] - told["model"]) / told["estimated"]
    benchmark.extra_info.update(told, ratio=told["peak"] / unit, of_the_estimate=beyond)
    summary.add(
        f"full coded, N={LONG}: peak memory, MB (model and one trunk)",
        f"{told['peak'] / 1e6:.0f} ({unit / 1e6:.0f}): {told['peak'] / unit:.2f} times",
    )
    summary.add(f"full coded, N={LONG}: peak beyond the model, of the estimate", f"{beyond:.0%}")

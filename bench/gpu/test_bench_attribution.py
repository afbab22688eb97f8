"""Whole attributions on a GPU against the authors' algorithm.

A random-weight Llama of 1.2 billion parameters (the shape of Llama-3.2-1B), one target. The
authors' algorithm is timed on a sample of its tokens and multiplied: each costs the same, since
each runs the whole context. Runs take seconds to minutes: one is timed, after a short prompt that
loads and compiles the kernels, and its peak memory is that of the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from baselines import authors
from models import prompt_ids, random_llama
from sizes import SMALL, size

from heat_fast import Attributor, HeatConfig
from heat_fast.ceilings import Ceilings
from heat_fast.cost import bytes_moved, flops
from heat_fast.decoder import view
from heat_fast.kernels.rademacher import rademacher

SHAPE = "tiny" if SMALL else "billion"
SAMPLE = 4
PROBES = 2
LENGTHS = (256, 1024)
WARM = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RUNS: dict[str, dict[str, Any]] = {
    "no curvature": {"curvature": "none"},
    "coded, 32 products": {"estimator": "coded", "probes": 2, "codes": 16},
    "low rank, 64": {"estimator": "low_rank", "rank": 64, "probes": 2},
    "block, 2 probes": {"probes": PROBES},
}
#: Every run at every length in both dtypes, save one of several minutes: a block probe per token
#: of the longer prompt in float32.
ROWS = [
    row
    for row in product(RUNS, DTYPES, LENGTHS)
    if row != ("block, 2 probes", "float32", max(LENGTHS))
]


@pytest.fixture(scope="module")
def llama() -> Callable[[torch.dtype, torch.device], Any]:
    """`llama(dtype, device)`: the model; one is kept at a time."""
    held: dict[torch.dtype, Any] = {}

    def make(dtype: torch.dtype, device: torch.device) -> Any:
        if dtype not in held:
            held.clear()
            held[dtype] = random_llama(SHAPE, dtype, device)
        return held[dtype]

    return make


def embeddings_of(model: Any, ids: list[int]) -> torch.Tensor:
    weight = model.get_input_embeddings()
    embeddings: torch.Tensor = weight(torch.tensor(ids, device=weight.weight.device)).detach()
    return embeddings


@pytest.mark.parametrize(("run", "dtype", "length"), ROWS)
def test_ours(
    run: str,
    dtype: str,
    length: int,
    llama: Callable[[torch.dtype, torch.device], Any],
    device: torch.device,
    ceilings: Callable[[torch.dtype], Ceilings],
    timed: Callable[..., Any],
    peak: Callable[[Callable[[], Any]], tuple[Any, int | None]],
    row: dict[str, Any],
    benchmark: Any,
) -> None:
    """Seconds, share of the floor, peak memory."""
    model, length = llama(DTYPES[dtype], device), size(length)
    config = HeatConfig(**RUNS[run])
    attributor, ids = Attributor(model, None, config), prompt_ids(length, SHAPE)
    attributor.attribute(ids[:WARM], 7)
    torch.cuda.empty_cache()  # what earlier rows left there must not decide the token budget
    result, peak_bytes = timed(lambda: peak(lambda: attributor.attribute(ids, 7)), 1, 0)
    decoder = view(model, length)
    counted = flops(decoder, length, 1, config)
    moved = bytes_moved(decoder, length, 1, config, result.metadata["token_budget"])
    floor = ceilings(DTYPES[dtype]).floor(counted, moved)
    row.update(
        run=run,
        dtype=dtype,
        tokens=length,
        seconds=benchmark.stats.stats.median,
        components=dict(result.metadata["seconds"]),
        flops=counted,
        bytes_moved=moved,
        floor_seconds=floor,
        share_of_floor=sum(floor.values()) / benchmark.stats.stats.median,
        implementation=result.metadata["implementation"],
        token_budget=result.metadata["token_budget"],
        peak_bytes=peak_bytes,
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["curvature", "information"])
def test_authors(
    part: str,
    dtype: str,
    length: int,
    llama: Callable[[torch.dtype, torch.device], Any],
    device: torch.device,
    timed: Callable[..., Any],
    peak: Callable[[Callable[[], Any]], tuple[Any, int | None]],
    row: dict[str, Any],
    benchmark: Any,
) -> None:
    """A sample of the tokens; `seconds` is of all of them."""
    model, length = llama(DTYPES[dtype], device), size(length)
    embeddings = embeddings_of(model, prompt_ids(length, SHAPE))
    signs = rademacher(
        0,
        torch.arange(PROBES, device=device)[:, None],
        torch.arange(length, device=device),
        embeddings.shape[1],
    ).to(embeddings.dtype)
    sampled = SAMPLE if part == "curvature" else 4 * SAMPLE

    def sample() -> torch.Tensor:
        tokens = range(min(sampled, length))
        if part == "curvature":
            return authors.curvature(model, embeddings, 7, signs, tokens)
        return authors.information(model, embeddings, tokens)

    _, peak_bytes = timed(lambda: peak(sample), 1)
    row.update(
        part=part,
        dtype=dtype,
        tokens=length,
        sampled_tokens=sampled,
        seconds=benchmark.stats.stats.median * length / min(sampled, length),
        peak_bytes=peak_bytes,
    )

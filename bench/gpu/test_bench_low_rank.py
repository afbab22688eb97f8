"""The low-rank step on a GPU against torch.linalg.

A matrix of 500,000 x 128 in float32, as the products of a Hessian come (contiguous columns), once
of normal numbers and once of condition 1e7. Shares refer to the device's own ceilings, measured in
the same process: a copy, and float64 matrix products, which sums are taken in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sizes import SMALL
from torch import Tensor

from heat_fast import build_info
from heat_fast.ceilings import Ceilings
from heat_fast.kernels.low_rank import block_norms, cuda, orthonormalise, single_pass
from heat_fast.kernels.rademacher import rademacher

ROWS, COLUMNS, RANK, WIDTH = (2_048, 16, 8, 64) if SMALL else (500_000, 128, 64, 2048)
PROBES, ROUNDS = 8, 1 if SMALL else 9

Run = Callable[[], Any]


def normal(device: torch.device) -> Tensor:
    """Normal numbers, by columns."""
    torch.manual_seed(0)
    return torch.randn(COLUMNS, ROWS, device=device).mT


def ill(device: torch.device) -> Tensor:
    """Of condition 1e7."""
    plain = normal(device).double()
    turn = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, dtype=torch.float64, device=device)).Q
    spectrum = 10.0 ** torch.linspace(0, -7, COLUMNS, dtype=torch.float64, device=device)
    return ((plain * spectrum) @ turn).float().mT.contiguous().mT


MATRICES = {"normal": normal, "condition 1e7": ill}


def needs_the_extension(name: str) -> None:
    """Skip what the CUDA extension runs where it is not built."""
    if name.endswith("cuda") and not build_info()["cuda"]["built"]:
        pytest.skip("the CUDA extension is not built here")


def factorised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`U`, `S V'` by the extension."""
    frame, triangle = orthonormalise(matrix, impl="cuda")
    turn, values, right = torch.linalg.svd(triangle)
    return cuda.combine(frame, turn), values[:, None] * right


def by_torch(matrix: Tensor, niter: int) -> tuple[Tensor, Tensor]:
    """`U`, `S V'` by torch."""
    vectors, values, right = torch.svd_lowrank(matrix, q=COLUMNS, niter=niter)
    return vectors, values[:, None] * right.mT


#: Ways to `Q, B` with orthonormal Q and `A = Q B`.
WAYS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "Q R, cuda": partial(orthonormalise, impl="cuda"),
    "Q R, reference": partial(orthonormalise, impl="reference"),
    "Q R, torch.linalg.qr": lambda matrix: tuple(torch.linalg.qr(matrix)),
    "U S V, cuda": factorised,
    "U S V, torch.svd_lowrank niter 0": partial(by_torch, niter=0),
    "U S V, torch.svd_lowrank niter 2": partial(by_torch, niter=2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_ways(
    matrix: str,
    way: str,
    device: torch.device,
    timed: Callable[..., Any],
    row: dict[str, Any],
    benchmark: Any,
) -> None:
    """Seconds, `max |Q'Q - I|` and `|A - Q B|_F / |A|_F` in float64."""
    needs_the_extension(way)
    values = MATRICES[matrix](device)
    frame, rest = timed(lambda: WAYS[way](values), rounds=ROUNDS, held=True)
    wide, exact = frame.double(), values.double()
    identity = torch.eye(wide.shape[-1], dtype=torch.float64, device=device)
    row.update(
        matrix=matrix,
        way=way,
        sizes=[ROWS, COLUMNS],
        seconds=benchmark.stats.stats.median,
        orthogonality=float((wide.mT @ wide - identity).abs().max()),
        residual=float((exact - wide @ rest.double()).norm() / exact.norm()),
    )


def primitives(matrix: Tensor) -> dict[str, tuple[Run, float, float]]:
    """By name: the run, its float64 operations, its bytes read and written once."""
    rows, count = matrix.shape
    size, device = rows * count, matrix.device
    small = torch.randn(count, count, dtype=torch.float64, device=device)
    upper = small.triu() + count * torch.eye(count, dtype=torch.float64, device=device)
    numbers, zero = torch.arange(count, device=device), torch.tensor(0, device=device)
    tests = rademacher(1, numbers, zero, rows).mT
    tokens = rows // WIDTH
    vectors = matrix[: tokens * WIDTH, :RANK].contiguous().view(tokens, WIDTH, RANK)
    values = torch.randn(1, RANK, dtype=torch.float64, device=device)
    norms = partial(block_norms, vectors, values, 3, torch.arange(PROBES, device=device))
    passed = partial(single_pass, tests, matrix, RANK)
    read = 4 * vectors.numel()
    return {
        "gram A'A, cuda": (lambda: cuda.gram(matrix, matrix), size * (count + 1), 4 * size),
        "gram A'B, cuda": (lambda: cuda.gram(tests, matrix), 2 * size * count, 8 * size),
        "combine A B, cuda": (lambda: cuda.combine(matrix, small), 2 * size * count, 8 * size),
        "solve A R^-1, cuda": (lambda: cuda.solve(matrix, upper), size * count, 8 * size),
        "block norms, cuda": (partial(norms, impl="cuda"), 0, read),
        "block norms, reference": (partial(norms, impl="reference"), 0, read),
        "single pass, cuda": (partial(passed, impl="cuda"), 0, 0),
        "single pass, reference": (partial(passed, impl="reference"), 0, 0),
    }


@pytest.mark.parametrize(
    "name",
    [
        *(f"{kernel}, cuda" for kernel in ("gram A'A", "gram A'B", "combine A B", "solve A R^-1")),
        *(f"block norms, {by}" for by in ("cuda", "reference")),
        *(f"single pass, {by}" for by in ("cuda", "reference")),
    ],
)
def test_primitives(
    name: str,
    device: torch.device,
    ceilings: Callable[[torch.dtype], Ceilings],
    timed: Callable[..., Any],
    row: dict[str, Any],
    benchmark: Any,
) -> None:
    """Seconds, and the shares of them that a kernel's operations and bytes need at the least."""
    needs_the_extension(name)
    run, operations, traffic = primitives(normal(device))[name]
    timed(run, rounds=ROUNDS, held=True)
    taken, ceiling = benchmark.stats.stats.median, ceilings(torch.float64)
    row.update(
        primitive=name,
        sizes=[ROWS, COLUMNS],
        seconds=taken,
        share_of_float64=operations / ceiling.flop_rate / taken or None,
        share_of_bytes=traffic / ceiling.byte_rate / taken or None,
    )

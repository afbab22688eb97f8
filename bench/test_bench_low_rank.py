"""The compiled low-rank step against torch.linalg.qr and torch.svd_lowrank, 500,000 x 128, float32.

All sides run on one thread, so that other work on the machine costs them alike; they take turns
within a round, and medians over the rounds are compared. Every side's distance from orthogonality
(largest entry of `U' U - I`) and relative residual (Frobenius) are computed in float64 and kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sizes import size
from torch import Tensor

from heat_fast import native
from heat_fast.kernels.low_rank import orthonormalise, single_pass
from heat_fast.kernels.low_rank.reference import gram
from heat_fast.kernels.rademacher import rademacher

if TYPE_CHECKING:
    from conftest import Summary

ROWS, COLUMNS, RANK = size(500_000), 128, 64
ROUNDS = 3
SLICE = 1 << 16

Found = tuple[Tensor, Callable[[], Tensor]]

pytestmark = pytest.mark.skipif(not native.available(), reason=native.missing())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def compare(
    benchmark: Any, sides: dict[str, Callable[[], Found]], exact: Tensor
) -> dict[str, float]:
    """Seconds of every side, the first under pytest-benchmark; facts to `extra_info`.

    A side returns orthonormal U and, outside its time, a small B, for an approximation `U B` of
    `exact`.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    facts: dict[str, dict[str, float]] = {}

    def turn(name: str) -> None:
        begin = time.perf_counter()
        frame, small = sides[name]()
        seconds[name].append(time.perf_counter() - begin)
        if name not in facts:
            facts[name] = accuracy(frame, small(), exact)

    for number in range(ROUNDS):
        for name in names[1:]:
            turn(name)
        if number + 1 < ROUNDS:
            turn(names[0])
    benchmark.pedantic(turn, args=(names[0],), rounds=1)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name in names:
        facts[name] |= {"median_seconds": medians[name], "slowest_seconds": max(seconds[name])}
    benchmark.extra_info.update(facts)
    return medians


def accuracy(frame: Tensor, small: Tensor, exact: Tensor) -> dict[str, float]:
    unit = torch.eye(frame.shape[-1], dtype=torch.float64)
    residual = energy = 0.0
    for low in range(0, ROWS, SLICE):
        part = slice(low, low + SLICE)
        wanted = exact[part].double()
        residual += float((wanted - frame[part].double() @ small.double()).square().sum())
        energy += float(wanted.square().sum())
    return {
        "orthogonality": float((gram(frame, frame) - unit).abs().max()),
        "residual": (residual / energy) ** 0.5,
    }


def report(summary: Summary, benchmark: Any, what: str, medians: dict[str, float]) -> None:
    names = list(medians)
    for name in names:
        facts = benchmark.extra_info[name]
        summary.add(
            f"{what}, {name}: seconds, orthogonality, residual",
            f"{medians[name]:.2f}, {facts['orthogonality']:.1e}, {facts['residual']:.1e}",
        )
    for name in names[1:]:
        summary.add(f"{what}: ratio to {name}", f"{medians[name] / medians[names[0]]:.2f}")


def native_basis(matrix: Tensor) -> Found:
    frame, triangle = orthonormalise(matrix, impl="native")
    return frame, lambda: triangle


def qr(matrix: Tensor) -> Found:
    found = torch.linalg.qr(matrix)
    return found.Q, lambda: found.R


def svd(matrix: Tensor) -> Found:
    left, values, right = torch.svd_lowrank(matrix, q=COLUMNS, niter=0)
    return left, lambda: values[:, None] * right.mT


def test_orthonormal_basis(benchmark: Any, summary: Summary) -> None:
    """Of images whose columns fall over seven orders of magnitude."""
    magnitudes = 10.0 ** -torch.linspace(0, 7, COLUMNS)
    rotation = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS)).Q
    matrix = torch.randn(ROWS, COLUMNS) * magnitudes @ rotation
    sides: dict[str, Callable[[], Found]] = {
        "orthonormalise": lambda: native_basis(matrix),
        "torch.linalg.qr": lambda: qr(matrix),
        "torch.svd_lowrank": lambda: svd(matrix),
    }
    medians = compare(benchmark, sides, matrix)
    report(summary, benchmark, "basis of condition 1e7", medians)


def test_low_rank_step(benchmark: Any, summary: Summary) -> None:
    """Factors of an indefinite operator of rank 64 from its images of 128 test vectors.

    `svd_lowrank` factorises the images themselves, which spares it the test vectors.
    """
    basis, _ = orthonormalise(torch.randn(ROWS, RANK), impl="native")
    values = 10.0 ** -torch.linspace(0, 3, RANK) * torch.where(torch.arange(RANK) % 2 == 0, 1, -1)
    tests = rademacher(0, torch.arange(COLUMNS), torch.tensor(0), ROWS).mT
    images = basis @ (values[:, None] * (basis.mT @ tests))

    def compiled() -> Found:
        found = single_pass(tests, images, RANK, impl="native")
        return found.vectors, lambda: found.values[:, None] * gram(found.vectors, tests)

    def householder() -> Found:
        """The same scheme on torch.linalg.qr and eigh, in float32."""
        frame, triangle = torch.linalg.qr(tests)
        whitened = torch.linalg.solve_triangular(triangle, images, upper=True, left=False)
        core = frame.mT @ whitened
        core_values, core_vectors = torch.linalg.eigh((core + core.mT) / 2)
        kept = core_values.abs().argsort(descending=True)[:RANK]
        found = core_values[kept]
        frame, triangle = torch.linalg.qr(whitened @ (core_vectors[:, kept] / found))
        found, turn = torch.linalg.eigh(triangle * found @ triangle.mT)
        vectors = frame @ turn
        return vectors, lambda: found[:, None] * (vectors.mT @ tests)

    sides: dict[str, Callable[[], Found]] = {
        "single_pass": compiled,
        "the scheme on torch.linalg.qr": householder,
        "torch.svd_lowrank": lambda: svd(images),
    }
    medians = compare(benchmark, sides, images)
    report(summary, benchmark, "low-rank step", medians)

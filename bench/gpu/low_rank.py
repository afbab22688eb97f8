"""The low-rank step on a GPU against torch.linalg: `python bench/gpu/low_rank.py [--rows 500000]`.

A matrix of 500,000 x 128 in float32, as the products of a Hessian come (contiguous columns), once
of normal numbers and once of condition 1e7. Times are medians of CUDA events, in one process with
the device's own ceilings: copy bandwidth and the rate of float64 matrix products. Writes
`bench/results/<gpu>/low-rank.json` and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import folder, seconds
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from heat_fast import build_info  # noqa: E402
from heat_fast.kernels.low_rank import block_norms, cuda, orthonormalise, single_pass  # noqa: E402
from heat_fast.kernels.rademacher import rademacher  # noqa: E402

RANK, COLUMNS, WIDTH, PROBES = 64, 128, 2048, 8


def ceilings() -> dict[str, float]:
    """Bytes per second of a copy, read and written, and FLOP/s of float64 matrix products."""
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), 9)
    left = torch.randn(4096, 4096, dtype=torch.float64, device="cuda")
    product = seconds(lambda: left @ left, 9)
    return {"copy_bytes_per_s": copied, "float64_flops_per_s": 2 * 4096**3 / product}


def matrices(rows: int) -> dict[str, Tensor]:
    """The two matrices, by columns."""
    torch.manual_seed(0)
    plain = torch.randn(COLUMNS, rows, device="cuda").mT
    turn = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, dtype=torch.float64, device="cuda")).Q
    spectrum = 10.0 ** torch.linspace(0, -7, COLUMNS, dtype=torch.float64, device="cuda")
    ill = ((plain.double() * spectrum) @ turn).float().mT.contiguous().mT
    return {"normal": plain, "condition 1e7": ill}


def ways(matrix: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Ways to `Q, B` with orthonormal Q and `A = Q B`."""

    def qr() -> tuple[Tensor, Tensor]:
        frame, triangle = torch.linalg.qr(matrix)
        return frame, triangle

    def factorised() -> tuple[Tensor, Tensor]:
        frame, triangle = orthonormalise(matrix, impl="cuda")
        turn, values, right = torch.linalg.svd(triangle)
        return cuda.combine(frame, turn), values[:, None] * right

    def lowrank(niter: int) -> tuple[Tensor, Tensor]:
        vectors, values, right = torch.svd_lowrank(matrix, q=COLUMNS, niter=niter)
        return vectors, values[:, None] * right.mT

    return {
        "Q R: cuda": partial(orthonormalise, matrix, impl="cuda"),
        "Q R: reference": partial(orthonormalise, matrix, impl="reference"),
        "Q R: torch.linalg.qr": qr,
        "U S V: cuda": factorised,
        "U S V: torch.svd_lowrank, niter=0": partial(lowrank, 0),
        "U S V: torch.svd_lowrank, niter=2": partial(lowrank, 2),
    }


def errors(matrix: Tensor, frame: Tensor, rest: Tensor) -> dict[str, float]:
    """`max |Q'Q - I|` and `|A - Q B|_F / |A|_F`, in float64."""
    wide = frame.double()
    identity = torch.eye(frame.shape[-1], dtype=torch.float64, device="cuda")
    residual = (matrix.double() - wide @ rest.double()).norm() / matrix.double().norm()
    orthogonality = (wide.mT @ wide - identity).abs().max()
    return {"orthogonality": float(orthogonality), "residual": float(residual)}


def compared(matrix: Tensor, times: int) -> dict[str, dict[str, float]]:
    """Every way with its time and its errors."""
    found = {}
    for name, run in ways(matrix).items():
        found[name] = {**errors(matrix, *run()), "ms": 1e3 * seconds(run, times)}
    return found


def primitives(matrix: Tensor, times: int, limits: dict[str, float]) -> dict[str, dict[str, float]]:
    """Time of each kernel, and the share of it that its operations and bytes need at the least."""
    rows, count = matrix.shape
    size = rows * count
    small = torch.randn(count, count, dtype=torch.float64, device="cuda")
    upper = small.triu() + count * torch.eye(count, dtype=torch.float64, device="cuda")
    numbers, zero = torch.arange(count, device="cuda"), torch.tensor(0, device="cuda")
    tests = rademacher(1, numbers, zero, rows).mT
    tokens = rows // WIDTH
    vectors = matrix[: tokens * WIDTH, :RANK].contiguous().view(tokens, WIDTH, RANK)
    values = torch.randn(1, RANK, dtype=torch.float64, device="cuda")
    norms = partial(block_norms, vectors, values, 3, torch.arange(PROBES))
    passed = partial(single_pass, tests, matrix, RANK)
    # Name: the run, its float64 operations, its bytes read and written once.
    counted: dict[str, tuple[Callable[[], object], float, float]] = {
        "gram A'A": (lambda: cuda.gram(matrix, matrix), size * (count + 1), 4 * size),
        "gram A'B": (lambda: cuda.gram(tests, matrix), 2 * size * count, 8 * size),
        "combine A B": (lambda: cuda.combine(matrix, small), 2 * size * count, 8 * size),
        "solve A R^-1": (lambda: cuda.solve(matrix, upper), size * count, 8 * size),
        "block norms: cuda": (partial(norms, impl="cuda"), 0, 4 * vectors.numel()),
        "block norms: reference": (partial(norms, impl="reference"), 0, 4 * vectors.numel()),
        "single pass: cuda": (partial(passed, impl="cuda"), 0, 0),
        "single pass: reference": (partial(passed, impl="reference"), 0, 0),
    }
    found = {}
    for name, (run, operations, traffic) in counted.items():
        time = 1e3 * seconds(run, times)
        found[name] = {
            "ms": time,
            "share_of_float64": operations / limits["float64_flops_per_s"] / time * 1e3,
            "share_of_bandwidth": traffic / limits["copy_bytes_per_s"] / time * 1e3,
        }
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder to write to")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name()
    limits = ceilings()
    inputs = matrices(given.rows)
    result: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "build": build_info()["cuda"],
        "rows": given.rows,
        "columns": COLUMNS,
        "rank": RANK,
        "ceilings": limits,
        "primitives": primitives(inputs["normal"], given.times, limits),
        "compared": {which: compared(matrix, given.times) for which, matrix in inputs.items()},
    }
    place = given.out or folder()
    place.mkdir(parents=True, exist_ok=True)
    (place / "low-rank.json").write_text(json.dumps(result, indent=2) + "\n")
    copy, rate = limits["copy_bytes_per_s"] / 1e12, limits["float64_flops_per_s"] / 1e12
    print(f"{name}: copy {copy:.2f} TB/s, float64 {rate:.1f} TFLOP/s\n")
    print("| kernel | ms | of float64 rate | of bandwidth |\n|---|---|---|---|")
    for kernel, row in result["primitives"].items():
        shares = f"{row['share_of_float64']:.0%} | {row['share_of_bandwidth']:.0%}"
        print(f"| {kernel} | {row['ms']:.3f} | {shares} |")
    print("\n| matrix | way | ms | max abs(Q'Q - I) | residual |\n|---|---|---|---|---|")
    for which, rows in result["compared"].items():
        for way, row in rows.items():
            figures = f"{row['ms']:.2f} | {row['orthogonality']:.1e} | {row['residual']:.1e}"
            print(f"| {which} | {way} | {figures} |")


if __name__ == "__main__":
    main()

"""The GPU kernels of probes and of their reductions against the reference.

They run on the GPU where there is one, else in Triton's interpreter. Signs are equal bit by bit;
sums of d float32 terms differ from float64's by their rounding, d units of the last place at most.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast.kernels.rademacher import (
    block_probes,
    coded_moments,
    coded_sums,
    dense_probes,
    rademacher,
    row_norms,
)

ROUNDING = 2.0**-23
SEEDS = [0, 11, 2**63 - 1]
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)


def equal(name: str, expected: Tensor, found: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(expected, found.cpu()), f"{name}: signs differ"


@pytest.fixture(autouse=True)
def poisoned(triton_device: torch.device) -> None:
    """NaN in the memory that the next allocations are likely to get."""
    for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20):
        torch.full((size,), float("nan"), device=triton_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 63, 515])
@pytest.mark.parametrize("seed", SEEDS)
def test_signs(seed: int, width: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    samples, tokens = torch.tensor([[0], [7], [2**20]]), torch.tensor([0, 3, 130, 2**17])
    expected = rademacher(seed, samples, tokens, width, dtype, impl="reference")
    moved = samples.to(triton_device), tokens.to(triton_device)
    equal("rademacher", expected, rademacher(seed, *moved, width, dtype, impl="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "width"), [(1, 1), (63, 63), (130, 130)])
def test_block_probes(
    length: int, width: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    tokens = 5 + torch.tensor([0, length // 2, length - 1])
    samples = torch.tensor([4, 0, 9])
    arguments = (5, 5 + length), width, dtype
    expected = block_probes(3, samples, tokens, *arguments, impl="reference")
    moved = samples.to(triton_device), tokens.to(triton_device)
    equal("probes", expected, block_probes(3, *moved, *arguments, impl="triton"))


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("tokens", "length", "width"), [(1, 1, 1), (60, 63, 63), (64, 66, 130)])
def test_dense_probes(
    tokens: int, length: int, width: int, coded: bool, triton_device: torch.device
) -> None:
    samples = torch.tensor([4]) if coded else torch.tensor([4, 0, 9])
    codes = torch.tensor([0, 45, 63])
    arguments = tokens, length, width, torch.float16
    expected = dense_probes(3, samples, *arguments, codes if coded else None, impl="reference")
    moved = codes.to(triton_device) if coded else None
    found = dense_probes(3, samples.to(triton_device), *arguments, moved, impl="triton")
    equal("probes", expected, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (63, 63), (5, 1030)])
def test_row_norms(rows: int, width: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    values = torch.randn(2, rows + 3, width).to(dtype)[:, :rows]
    expected = row_norms(values.double(), impl="reference")
    found = row_norms(values.to(triton_device), impl="triton")
    assert found.dtype == torch.float32
    assert_close("norms", expected, found, rtol=width * ROUNDING, elementwise=True)
    flat = row_norms(values[0].to(triton_device), impl="triton")
    assert torch.equal(flat, found[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("codes", "tokens", "width"), [(1, 1, 1), (2, 63, 63), (5, 130, 130), (8, 7, 1030)]
)
def test_coded_reduction(
    codes: int, tokens: int, width: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    order = 256
    # Off-diagonal noise of the size of the signal, as it is met.
    rows = (1 + torch.randn(codes, tokens + 2, width)).to(dtype)
    chosen = torch.randperm(order)[:codes]
    sums = coded_sums(rows.double(), chosen, tokens, impl="reference")
    exact = coded_moments(*sums, codes, order, impl="reference")
    on_device = rows.to(triton_device), chosen.to(triton_device)
    found_sums = coded_sums(*on_device, tokens, impl="triton")
    for name, wanted, got in zip(("sum", "squares"), sums, found_sums, strict=True):
        assert_close(name, wanted, got, rtol=codes * ROUNDING)
    found = coded_moments(*found_sums, codes, order, impl="triton")
    terms = width + 4 * codes
    for name, wanted, got in zip(("norm", "noise", "energy"), exact, found, strict=True):
        assert got.dtype == torch.float32
        # With one code there is no spread: what is left is rounding of the energy.
        floor = 4 * ROUNDING * float(exact[2].max())
        assert_close(name, wanted, got, rtol=terms * ROUNDING, atol=floor)

"""The GPU kernels of attention's tangents against the reference in float64.

They run on the GPU where there is one, else in Triton's interpreter. An error is held against that
of the reference in float32, and may be four times as large; half precision is granted its rounding
of the factors of the second products and of the results beside.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast.kernels.branch_attention import Masking, branch_attention
from heat_fast.kernels.second_order_attention import (
    Primal,
    attention_adjoint_tangent,
    attention_tangent,
)

MASKINGS = {
    "full": Masking(0.3),
    "window": Masking(0.3, window=17),
    "softcap": Masking(0.3, softcap=1.2),
    "window_softcap": Masking(0.3, window=70, softcap=1.2),
}
# The interpreter's bfloat16 is wrong in products and sums (its own limitation).
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)

#: heads, probes, group, queries, all keys, keys that do not move, width
SHAPES = [
    (1, 1, 1, 1, 1, 0, 64),
    (1, 3, 2, 63, 130, 67, 40),
    (2, 2, 1, 5, 63, 50, 80),
    (1, 2, 3, 31, 31, 0, 96),
]
NAMES = ("output tangent", "query", "key", "value")


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations are likely to get."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 20):
        torch.full((size,), float("nan"), device=device)


def draw(
    seed: int, shape: tuple[int, ...], masking: Masking, dtype: torch.dtype, adjoint: float = 1.0
) -> tuple[Primal, list[Tensor]]:
    """A primal and tangents rounded to `dtype`, in float64; its log-sum-exp and output are true.

    The adjoints are drawn `adjoint` times as large.
    """
    heads, probes, group, queries, stop, start, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(dtype).double()

    query, key, value = (
        normal(heads, group, queries, width),
        normal(heads, stop, width),
        normal(heads, stop, width),
    )
    first = stop - queries
    output, normaliser = branch_attention(
        query[:, None],
        key[:, None, first:],
        value[:, None, first:],
        key[:, :first],
        value[:, :first],
        masking,
        impl="reference",
    )
    primal = Primal(
        query,
        key,
        value,
        normaliser[:, 0].float().double(),
        output[:, 0].to(dtype).double(),
        start,
        masking,
    )
    tangents = [
        normal(heads, probes, group, queries, width),
        normal(heads, probes, stop - start, width),
        normal(heads, probes, stop - start, width),
    ]
    moved = attention_tangent(primal, *tangents, impl="reference").to(dtype).double()
    bar = normal(heads, group, queries, width, scale=adjoint)
    bar_dot = normal(heads, probes, group, queries, width, scale=adjoint)
    return primal, [*tangents, moved, bar, bar_dot]


def cast(primal: Primal, dtype: torch.dtype, device: torch.device) -> Primal:
    parts = {
        name: getattr(primal, name).to(device, dtype)
        for name in ("query", "key", "value", "output")
    }
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return dataclasses.replace(primal, normaliser=primal.normaliser.to(device, sums), **parts)


def run(
    impl: str, primal: Primal, moved: list[Tensor], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    at = cast(primal, dtype, device)
    tensors = [x.to(device, dtype) for x in moved]
    if impl == "triton":
        poison(device)
    up = attention_tangent(at, *tensors[:3], impl=impl)
    return [up, *attention_adjoint_tangent(at, *tensors, impl=impl)]


def compare(
    seed: int,
    shape: tuple[int, ...],
    masking: Masking,
    dtype: torch.dtype,
    device: torch.device,
    adjoint: float = 1.0,
) -> None:
    primal, moved = draw(seed, shape, masking, dtype, adjoint)
    cpu = torch.device("cpu")
    exact = run("reference", primal, moved, torch.float64, cpu)
    low = run("reference", primal, moved, torch.float32, cpu)
    found = run("triton", primal, moved, dtype, device)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, expected, theirs, ours in zip(NAMES, exact, low, found, strict=True):
        assert ours.dtype == dtype
        scale = float(expected.abs().max())
        floor = float((theirs.double() - expected).abs().max())
        allowed = 4 * floor + (32 * 2.0**-23 + 4 * rounding) * scale
        # Where all weights are 1 everything cancels, and the terms' own size decides.
        allowed += 32 * (2.0**-23 + rounding) * adjoint * (shape[4] == 1)
        assert_close(name, expected, ours.cpu(), rtol=0, atol=allowed)
    again = run("triton", primal, moved, dtype, device)
    for name, first, second in zip(NAMES, found, again, strict=True):
        assert torch.equal(first, second), f"{name}: the same call gave another result"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
def test_second_order_attention(
    masking: Masking, shape: tuple[int, ...], dtype: torch.dtype, triton_device: torch.device
) -> None:
    compare(sum(shape), shape, masking, dtype, triton_device)


@pytest.mark.parametrize(("seed", "width"), [(0, 64), (1, 80), (2, 96), (3, 128), (4, 256)])
def test_every_head_width(seed: int, width: int, triton_device: torch.device) -> None:
    for dtype in DTYPES:
        compare(seed, (1, 2, 2, 9, 17, 5, width), Masking(width**-0.5), dtype, triton_device)


def test_small_adjoints_keep_their_digits_in_float16(triton_device: torch.device) -> None:
    """Products of weights and adjoints of 1e-4 would be subnormal numbers of float16."""
    shape = (1, 2, 1, 40, 40, 0, 64)
    compare(7, shape, MASKINGS["full"], torch.float16, triton_device, adjoint=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_float32_products_keep_full_precision(
    precision: str, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    """Either way the error stays within that of float32 sums; plain tf32 would be far outside."""
    monkeypatch.setattr("heat_fast.kernels.second_order_attention.triton.PRECISION", precision)
    compare(11, (1, 2, 2, 200, 300, 50, 64), Masking(0.125), torch.float32, triton_device)

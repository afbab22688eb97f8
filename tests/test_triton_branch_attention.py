"""The GPU kernels of branch attention against the reference in float64.

They run on the GPU where there is one, else in Triton's interpreter. An error is held against that
of the reference in float32 (for half precision: rounded to it before the second product, as the
matrix units take it), and may be four times as large.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast.errors import ConfigError
from heat_fast.kernels.branch_attention import Masking, branch_attention

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

#: heads, branches, group, queries, own rows, prefix, width
SHAPES = [
    (1, 1, 1, 1, 1, 0, 64),
    (2, 3, 2, 63, 63, 67, 40),
    (1, 5, 1, 1, 63, 130, 80),
    (1, 2, 3, 65, 130, 0, 96),
]


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations are likely to get."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 20):
        torch.full((size,), float("nan"), device=device)


def draw(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    heads, batch, group, queries, own, start, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        (heads, batch, group, queries, width),
        (heads, batch, own, width),
        (heads, batch, own, width),
        (heads, start, width),
        (heads, start, width),
    )
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def check(name: str, exact: Tensor, low: Tensor, found: Tensor, dtype: torch.dtype) -> None:
    """`found` is as near to `exact` as `low` (the same in float32) and its dtype's rounding allow.

    Two roundings to `dtype` are granted beside the float32 sums: of the weights before their
    product with the values, and of the result.
    """
    floor = float((low.double().cpu() - exact).abs().max())
    scale = float(exact.abs().max())
    sums = 4 * floor + 16 * 2.0**-23 * scale
    assert_close(
        name,
        exact,
        found.cpu(),
        rtol=0,
        atol=sums + 2 * rounding(dtype) * scale * (dtype != torch.float32),
    )


def compare(
    seed: int, shape: tuple[int, ...], masking: Masking, dtype: torch.dtype, device: torch.device
) -> None:
    tensors = draw(seed, shape, dtype)
    exact = branch_attention(*(x.double() for x in tensors), masking, impl="reference")
    low = branch_attention(*(x.float() for x in tensors), masking, impl="reference")
    moved = [x.to(device) for x in tensors]
    poison(device)
    output, normaliser = branch_attention(*moved, masking, impl="triton")
    assert output.dtype == dtype and normaliser.dtype == torch.float32
    check("output", exact[0], low[0], output, dtype)
    check("normaliser", exact[1], low[1], normaliser, torch.float32)
    again = branch_attention(*moved, masking, impl="triton")
    assert torch.equal(output, again[0]) and torch.equal(normaliser, again[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
def test_branch_attention(
    masking: Masking, shape: tuple[int, ...], dtype: torch.dtype, triton_device: torch.device
) -> None:
    compare(sum(shape), shape, masking, dtype, triton_device)


@pytest.mark.parametrize(("seed", "width"), [(0, 64), (1, 80), (2, 96), (3, 128), (4, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_width(
    seed: int, width: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    compare(seed, (1, 2, 2, 33, 40, 37, width), Masking(width**-0.5), dtype, triton_device)


def test_strided_views_are_taken_as_they_lie(triton_device: torch.device) -> None:
    wide = torch.randn(2, 3, 2, 9, 80, device=triton_device)
    query, key, value = wide[..., 8:40], wide[:, :, 0, :, :32], wide[:, :, 1, :, 48:]
    below = torch.randn(2, 5, 128, device=triton_device)[..., ::4]  # copied: rows have gaps
    args = (query, key, value, below, below, Masking(0.3))
    found = branch_attention(*args, impl="triton")
    expected = branch_attention(*args, impl="reference")
    assert_close("output", expected[0], found[0], rtol=1e-5)
    assert_close("normaliser", expected[1], found[1], rtol=1e-5)
    # The output projection reads a row's heads side by side.
    assert found[0].permute(1, 3, 0, 2, 4).is_contiguous()


def test_a_broken_key_stays_visible(triton_device: torch.device) -> None:
    key = torch.randn(1, 1, 9, 64, device=triton_device)
    key[0, 0, 4, 2] = torch.nan
    query, value = torch.randn(2, 1, 1, 1, 9, 64, device=triton_device).unbind(0)
    args = (query, value[:, :, 0], value[:, :, 0], key[:, 0, :0], key[:, 0, :0], Masking(1.0))
    output, _ = branch_attention(args[0], key, *args[2:], impl="triton")
    broken = torch.isnan(output[0, 0, 0]).any(-1)
    assert broken.tolist() == [False] * 4 + [True] * 5


def test_large_scores_neither_overflow_nor_vanish(triton_device: torch.device) -> None:
    query = torch.full((1, 1, 1, 9, 8), 30.0, device=triton_device)
    key = torch.randn(1, 1, 9, 8, device=triton_device) * 30
    args = (query, key, key, key[:, 0, :0], key[:, 0, :0], Masking(1.0))
    found = branch_attention(*args, impl="triton")
    expected = branch_attention(*(x.double() for x in args[:-1]), args[-1], impl="reference")
    assert_close("output", expected[0], found[0], rtol=1e-3)
    assert_close("normaliser", expected[1], found[1], rtol=1e-5)


def test_a_head_too_wide_is_an_error(triton_device: torch.device) -> None:
    tensors = draw(0, (1, 1, 1, 2, 2, 0, 300), torch.float32)
    with pytest.raises(ConfigError, match="branch_attention with impl='triton'"):
        branch_attention(*(x.to(triton_device) for x in tensors), Masking(1.0), impl="triton")

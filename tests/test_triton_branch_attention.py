"""The GPU kernels of branch attention against the reference in float64.

They run on the GPU where there is one, else in Triton's interpreter. An error may be four times
that of the formula written out in low precision: sums in float32, what the matrix units multiply
rounded to the inputs' dtype, and the result.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast.errors import ConfigError
from heat_fast.kernels.branch_attention import Masking, branch_attention

pytest.importorskip("triton", reason="the kernels are Triton's")
from heat_fast.kernels.branch_attention.triton import Tile

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


def low_precision(tensors: list[Tensor], masking: Masking) -> tuple[Tensor, Tensor]:
    """The formula with whole matrices in float32, weights and result rounded to the inputs'."""
    dtype = tensors[0].dtype
    query, key, value, prefix_key, prefix_value = (x.float() for x in tensors)
    batch, queries = query.shape[1], query.shape[3]
    keys, values = (
        torch.cat((below[:, None].expand(-1, batch, -1, -1), own), 2)[:, :, None]
        for below, own in ((prefix_key, key), (prefix_value, value))
    )
    stop = keys.shape[3]
    scores = query @ keys.mT * masking.scale
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    places = torch.arange(stop)
    scores = scores.masked_fill(masking.hidden(places[stop - queries :], places), float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    result = weights.to(dtype).float() @ values / weights.sum(-1, keepdim=True)
    return result.to(dtype), scores.logsumexp(-1)


def check(name: str, exact: Tensor, low: Tensor, found: Tensor) -> None:
    """`found` is about as near to `exact` as `low`; beside, a few units of float32's last place."""
    floor = float((low.double() - exact).abs().max())
    allowed = 4 * floor + 16 * 2.0**-23 * float(exact.abs().max())
    assert_close(name, exact, found.cpu(), rtol=0, atol=allowed)


def compare(
    seed: int, shape: tuple[int, ...], masking: Masking, dtype: torch.dtype, device: torch.device
) -> None:
    tensors = draw(seed, shape, dtype)
    exact = branch_attention(*(x.double() for x in tensors), masking, impl="reference")
    low = low_precision(tensors, masking)
    moved = [x.to(device) for x in tensors]
    output, normaliser = branch_attention(*moved, masking, impl="triton")
    assert output.dtype == dtype and normaliser.dtype == torch.float32
    check("output", exact[0], low[0], output)
    check("normaliser", exact[1], low[1], normaliser)
    if device.type == "cuda":  # the interpreter runs one program after the other
        again = branch_attention(*moved, masking, impl="triton")
        assert torch.equal(output, again[0]) and torch.equal(normaliser, again[1])


@pytest.fixture
def large_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes with the number of tiles; the shipped ones have tests below."""
    if triton_device.type == "cpu":
        name = "heat_fast.kernels.branch_attention.triton._TILES"
        sizes = itertools.product((2, 4), (64, 128, 256))
        monkeypatch.setattr(name, {80: dict.fromkeys(sizes, Tile(64, 64, 4, 1))})


@pytest.mark.usefixtures("large_tiles", "poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("masking", "dtype"),
    [
        *((name, torch.float32) for name in MASKINGS),
        *(("window_softcap", dtype) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_branch_attention(
    masking: str, dtype: torch.dtype, shape: tuple[int, ...], triton_device: torch.device
) -> None:
    compare(sum(shape) + len(masking), shape, MASKINGS[masking], dtype, triton_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_seeds(seed: int, triton_device: torch.device) -> None:
    shape = (1, 3, 2, 7, 13, 5, 24)
    compare(seed, shape, MASKINGS["window_softcap"], torch.float32, triton_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("seed", "width"), [(0, 64), (1, 80), (2, 96), (3, 128), (4, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_width(
    seed: int, width: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    """The shipped tiles."""
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


def test_three_passes_of_tf32_lose_little_of_a_product() -> None:
    """The bounds that `kernels/README.md` states; the factors' rounding is emulated."""

    def tf32(x: Tensor) -> Tensor:
        """To the nearest number of 11 bits, ties away from zero."""
        return ((x.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)

    factors = torch.randn(2, 100_000)
    high = tf32(factors)
    low = tf32(factors - high).double()
    exact, plain = factors.double().prod(0), high.double().prod(0)
    passes = plain + high[0] * low[1] + low[0] * high[1]
    assert float(((passes - exact) / exact).abs().max()) <= 3 * 2.0**-22
    assert 2.0**-11 < float(((plain - exact) / exact).abs().max()) <= 1.001 * 2.0**-10

"""The GPU kernels of attention's tangents against the reference in float64.

They run on the GPU where there is one, else in Triton's interpreter. An error may be four times
that of the formulas written out in low precision: sums in float32, what the matrix units multiply
rounded to the inputs' dtype, and the results.
"""

from __future__ import annotations

import dataclasses
import itertools

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

pytest.importorskip("triton", reason="the kernels are Triton's")
from heat_fast.kernels.second_order_attention.tiles import Tile

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
    (1, 2, 2, 63, 130, 67, 40),
    (2, 3, 1, 5, 63, 50, 80),
    (1, 2, 3, 31, 31, 0, 96),
]
NAMES = ("output tangent", "query", "key", "value")


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
    up = attention_tangent(at, *tensors[:3], impl=impl)
    return [up, *attention_adjoint_tangent(at, *tensors, impl=impl)]


def low_precision(
    primal: Primal, moved: list[Tensor], dtype: torch.dtype, adjoint: float
) -> list[Tensor]:
    """The reference's formulas with whole matrices in float32, their factors rounded to `dtype`.

    The adjoints are taken `adjoint` times smaller meanwhile: float16 would lose them.
    """

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    masking, scale, start = primal.masking, primal.masking.scale, primal.start
    parts = (primal.query, primal.key[:, None], primal.value[:, None], primal.output)
    query, key, value, output = (x[:, None].float() for x in parts)
    query_dot, key_dot, value_dot, output_dot, bar, bar_dot = (x.float() for x in moved)
    key_dot, value_dot = (
        torch.nn.functional.pad(x, (0, 0, start, 0))[:, :, None] for x in (key_dot, value_dot)
    )
    bar, bar_dot = bar[:, None] / adjoint, bar_dot / adjoint

    scores, slope, bend = scale * query @ key.mT, torch.ones(()), torch.zeros(())
    if masking.softcap is not None:
        ratio = torch.tanh(scores / masking.softcap)
        scores, slope = masking.softcap * ratio, 1 - ratio.square()
        bend = -2 / masking.softcap * ratio * slope
    weights = (scores - primal.normaliser[:, None, :, :, None].float()).exp()
    places = torch.arange(key.shape[3])
    weights = weights.masked_fill(masking.hidden(places[-query.shape[3] :], places), 0.0)
    raw = scale * (query_dot @ key.mT + query @ key_dot.mT)
    mean = (weights * raw * slope).sum(-1, keepdim=True)
    weights_dot = weights * (raw * slope - mean)
    up = rounded(weights_dot) @ value + rounded(weights) @ value_dot
    centred = bar @ value.mT - (bar * output).sum(-1, keepdim=True)
    shift_dot = (bar_dot * output + bar * output_dot).sum(-1, keepdim=True)
    dotted = bar_dot @ value.mT + bar @ value_dot.mT - shift_dot
    dotted = weights_dot * centred + weights * dotted
    plain = weights * centred
    dotted, plain = rounded(dotted * slope + bend * raw * plain), rounded(plain * slope)
    results = [
        scale * (dotted @ key + plain @ key_dot),
        scale * (dotted.mT @ query + plain.mT @ query_dot).sum(2)[:, :, start:],
        (rounded(weights_dot).mT @ bar + rounded(weights).mT @ bar_dot).sum(2)[:, :, start:],
    ]
    return [up.to(dtype), *((adjoint * x).to(dtype) for x in results)]


def compare(
    seed: int,
    shape: tuple[int, ...],
    masking: Masking,
    dtype: torch.dtype,
    device: torch.device,
    adjoint: float = 1.0,
) -> None:
    primal, moved = draw(seed, shape, masking, dtype, adjoint)
    exact = run("reference", primal, moved, torch.float64, torch.device("cpu"))
    low = low_precision(primal, moved, dtype, adjoint)
    found = run("triton", primal, moved, dtype, device)
    for name, expected, theirs, ours in zip(NAMES, exact, low, found, strict=True):
        assert ours.dtype == dtype
        floor = float((theirs.double() - expected).abs().max())
        allowed = 4 * floor + 32 * 2.0**-23 * float(expected.abs().max())
        # Where all weights are 1 everything cancels, and the terms' own size decides.
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        allowed += 32 * (2.0**-23 + rounding) * adjoint * (shape[4] == 1)
        assert_close(name, expected, ours.cpu(), rtol=0, atol=allowed)
    if device.type == "cuda":  # the interpreter runs one program after the other
        again = run("triton", primal, moved, dtype, device)
        for name, first, second in zip(NAMES, found, again, strict=True):
            assert torch.equal(first, second), f"{name}: the same call gave another result"


@pytest.fixture
def large_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes with the number of tiles; the shipped ones have tests below.

    Two probes to a program, which the shipped tables do not have.
    """
    if triton_device.type == "cpu":
        tiles = dict.fromkeys(itertools.product((2, 4), (64, 128, 256)), Tile(64, 64, 2, 4, 1))
        for table in ("TANGENT", "PRIMAL", "ROWS", "KEYS"):
            name = f"heat_fast.kernels.second_order_attention.tiles.{table}"
            monkeypatch.setattr(name, {80: tiles})


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
def test_second_order_attention(
    masking: str, dtype: torch.dtype, shape: tuple[int, ...], triton_device: torch.device
) -> None:
    compare(sum(shape) + len(masking), shape, MASKINGS[masking], dtype, triton_device)


@pytest.mark.usefixtures("large_tiles", "poisoned")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_seeds(seed: int, triton_device: torch.device) -> None:
    shape = (1, 3, 2, 7, 23, 11, 24)
    compare(seed, shape, MASKINGS["window_softcap"], torch.float32, triton_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("seed", "width"), [(0, 64), (1, 80), (2, 96), (3, 128), (4, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_width(
    seed: int, width: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    """The shipped tiles."""
    compare(seed, (1, 2, 2, 9, 17, 5, width), Masking(width**-0.5), dtype, triton_device)


@pytest.mark.usefixtures("poisoned")
def test_small_adjoints_keep_their_digits_in_float16(triton_device: torch.device) -> None:
    """Products of weights and adjoints of 1e-4 would be subnormal numbers of float16."""
    shape = (1, 2, 1, 40, 40, 0, 64)
    compare(7, shape, MASKINGS["full"], torch.float16, triton_device, adjoint=1e-4)


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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_float32_products_keep_full_precision(
    precision: str, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    """Either way the error stays within that of float32 sums; plain tf32 would be far outside."""
    monkeypatch.setattr("heat_fast.kernels.second_order_attention.triton.PRECISION", precision)
    compare(11, (1, 2, 2, 200, 300, 50, 64), Masking(0.125), torch.float32, triton_device)

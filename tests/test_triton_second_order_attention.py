"""Attention's tangents on a GPU, fused and staged, against the reference in float64.

They run on the GPU where there is one, else in Triton's interpreter. An error may be four times
that of the formulas written out in low precision: sums in float32, what the matrix units multiply
rounded to the inputs' dtype, and the results.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast.kernels.branch_attention import Masking, branch_attention, sink
from heat_fast.kernels.second_order_attention import (
    Primal,
    attention_adjoint_tangent,
    attention_tangent,
)

pytest.importorskip("triton", reason="the kernels are Triton's")
from heat_fast.kernels.second_order_attention import fused, staged, triton
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
    seed: int,
    shape: tuple[int, ...],
    masking: Masking,
    dtype: torch.dtype,
    adjoint: float = 1.0,
    *,
    sinks: bool = False,
) -> tuple[Primal, list[Tensor]]:
    """A primal and tangents rounded to `dtype`, in float64; its log-sum-exp and output are true.

    The adjoints are drawn `adjoint` times as large. With `sinks` every head has one.
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
    sunk = None
    if sinks:
        logits = 1 + torch.randn(heads, group, generator=generator, dtype=torch.float64)
        output, normaliser, share = sink(output, normaliser, logits)
        sunk = share[:, 0].float().double()
    primal = Primal(
        query,
        key,
        value,
        normaliser[:, 0].float().double(),
        output[:, 0].to(dtype).double(),
        start,
        masking,
        sunk,
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
    for name in ("normaliser", "sunk"):
        part = getattr(primal, name)
        parts[name] = part if part is None else part.to(device, sums)
    return dataclasses.replace(primal, **parts)


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
    *,
    sinks: bool = False,
) -> None:
    primal, moved = draw(seed, shape, masking, dtype, adjoint, sinks=sinks)
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
        tiles = dict.fromkeys((64, 128), Tile(64, 64, 2, 4, 1))
        for table in ("TANGENT", "PRIMAL", "ROWS", "KEYS"):
            name = f"heat_fast.kernels.second_order_attention.tiles.{table}"
            monkeypatch.setattr(name, {80: tiles})


#: What the fused kernels are tested in. Float32, which they are not shipped for and have no tiles
#: for on a GPU, shows smaller errors.
FUSED_DTYPES = DTYPES[1:] if torch.cuda.is_available() else DTYPES


@pytest.fixture
def only_fused(large_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing staged."""
    monkeypatch.setattr(triton, "way", lambda query: fused)


@pytest.fixture
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything staged, and few elements to a stage, so that there are many."""
    monkeypatch.setattr(triton, "way", lambda query: staged)
    monkeypatch.setattr(staged, "WORKSPACE", 1 << 17)
    monkeypatch.setattr(staged, "LEAST_ROWS", 24)
    monkeypatch.setattr(staged, "FEW", 0)
    monkeypatch.setattr(staged, "BLOCK", 128)


@pytest.mark.usefixtures("only_fused", "poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("masking", "dtype"),
    [
        *((name, FUSED_DTYPES[0]) for name in MASKINGS),
        *(("window_softcap", dtype) for dtype in FUSED_DTYPES[1:]),
    ],
    ids=str,
)
def test_fused(
    masking: str, dtype: torch.dtype, shape: tuple[int, ...], triton_device: torch.device
) -> None:
    compare(sum(shape) + len(masking), shape, MASKINGS[masking], dtype, triton_device)


@pytest.mark.usefixtures("small_stages", "poisoned")
@pytest.mark.parametrize(
    ("masking", "dtype", "shape"),
    [
        ("window_softcap", torch.float32, SHAPES[1]),
        *((name, torch.float32, SHAPES[2]) for name in MASKINGS),
        *(("window", dtype, (1, 2, 2, 20, 70, 41, 40)) for dtype in DTYPES),
        *(("softcap", dtype, (2, 2, 3, 9, 9, 0, 96)) for dtype in DTYPES),
        ("full", torch.float32, SHAPES[0]),
    ],
    ids=str,
)
def test_staged(
    masking: str, dtype: torch.dtype, shape: tuple[int, ...], triton_device: torch.device
) -> None:
    """Odd beginnings of the keys that move, windows that end before them, several heads a tile."""
    compare(sum(shape) + len(masking), shape, MASKINGS[masking], dtype, triton_device)


@pytest.mark.parametrize(
    ("way", "dtype"), [("only_fused", FUSED_DTYPES[0]), ("small_stages", torch.float32)], ids=str
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_seeds(
    seed: int,
    way: str,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
    triton_device: torch.device,
) -> None:
    request.getfixturevalue("poisoned")
    request.getfixturevalue(way)
    shape = (1, 3, 2, 7, 23, 11, 24)
    compare(seed, shape, MASKINGS["window_softcap"], dtype, triton_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("seed", "width"), [(0, 64), (1, 80), (2, 96), (3, 128), (4, 256), (5, 320)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_width(
    seed: int, width: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    """As shipped."""
    compare(seed, (1, 2, 2, 9, 17, 5, width), Masking(width**-0.5), dtype, triton_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("way", "dtype"),
    [*(("only_fused", dtype) for dtype in FUSED_DTYPES), ("small_stages", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("masking", ["full", "window_softcap"])
def test_a_sink_takes_its_share(
    masking: str,
    way: str,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
    triton_device: torch.device,
) -> None:
    """The rows of P sum to less than 1."""
    request.getfixturevalue(way)
    for shape in ((1, 3, 2, 63, 130, 67, 40), (2, 1, 3, 9, 9, 0, 64)):
        compare(sum(shape), shape, MASKINGS[masking], dtype, triton_device, sinks=True)


def test_what_serves_what() -> None:
    def query(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(1, 1, 1, 1, width, dtype=dtype)

    assert triton.way(query(128, torch.bfloat16)) is fused
    assert triton.way(query(256, torch.float16)) is staged
    assert triton.way(query(64, torch.float32)) is staged


def test_stages_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits, every head, probe and query is in one tile, and its matrices fit."""
    primal, _ = draw(0, (3, 2, 2, 40, 50, 10, 8), MASKINGS["full"], torch.float32)
    primal = cast(primal, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(staged, "LEAST_ROWS", 8)
    monkeypatch.setattr(staged, "FEW", 0)
    for kib in (1, 3, 10, 40, 200, 10_000):
        monkeypatch.setattr(staged, "WORKSPACE", kib << 10)
        seen = torch.zeros(3, 5, 40)
        for heads, probes, stretches in staged.tiles(primal, 5):
            for queries in stretches:
                seen[heads, probes, queries] += 1
                sizes = [each.stop - each.start for each in (heads, probes, queries)]
                scores = sizes[0] * (sizes[1] + 1) * sizes[2] * 2 * 50
                assert 16 * scores <= staged.WORKSPACE or sizes == [1, 1, 1]
        assert bool((seen == 1).all())


@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_probes_share_what_they_can(heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`14 B + 3` products for every query and key of a tile, whatever else does not fit."""
    heads, probes, group, queries, width = 2, 3, 2, 64, 8
    shape = (heads, probes, group, queries, queries, 0, width)
    primal, moved = draw(0, shape, MASKINGS["full"], torch.float32)
    at = cast(primal, torch.float32, torch.device("cpu"))
    query, key, value, output, bar, bar_dot = (x.float() for x in moved)
    rows, flops = 16, 0
    room = 16 * heads_at_once * (probes + 1) * rows * group * queries
    monkeypatch.setattr(staged, "WORKSPACE", room)
    monkeypatch.setattr(staged, "LEAST_ROWS", rows * group)
    monkeypatch.setattr(staged, "FEW", 0)

    def count(left: Tensor, right: Tensor, total: Tensor, *, add: bool) -> Tensor:
        nonlocal flops
        flops += 2 * left.numel() * right.shape[-1]
        return multiply(left, right, total, add=add)

    multiply = staged.multiply
    monkeypatch.setattr(staged, "multiply", count)
    monkeypatch.setattr(
        staged, "softmax_tangent_kernel", defaultdict(lambda: lambda *_, **__: None)
    )
    staged.attention_tangent(at, query, key, value)
    staged.attention_adjoint_tangent(at, query, key, value, output, bar, bar_dot, torch.float32)
    pairs = heads * group * sum(rows * end for end in range(rows, queries + 1, rows))
    assert flops == 2 * width * pairs * (14 * probes + 3)


@pytest.mark.usefixtures("poisoned")
def test_small_adjoints_keep_their_digits_in_float16(triton_device: torch.device) -> None:
    """Products of weights and adjoints of 1e-4 would be subnormal numbers of float16."""
    shape = (1, 2, 1, 40, 40, 0, 64)
    compare(7, shape, MASKINGS["full"], torch.float16, triton_device, adjoint=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_context(dtype: torch.dtype, triton_device: torch.device) -> None:
    """Several tiles of the shipped sizes; products of float32 are not rounded to tf32."""
    for width in (64, 256):
        compare(11, (2, 3, 2, 900, 1100, 150, width), Masking(0.1), dtype, triton_device)

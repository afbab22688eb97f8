"""The compiled extension against the reference of every operation, and how it is chosen.

Both sides of a float64 case differ in the order of sums alone. A float32 case is held to the error
that the float32 reference makes itself, times 4 (another order of sums, another exponential), with
a floor of 64 units of roundoff (scores of up to 30, themselves rounded, enter the exponential).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import heat_fast
from assertions import assert_close
from heat_fast import ConfigError, HeatConfig, cuda, native
from heat_fast.kernels import branch_attention, gated, norm, rotary, second_order_attention
from heat_fast.kernels.branch_attention import Masking
from heat_fast.kernels.dispatch import using
from heat_fast.kernels.norm.reference import Affine
from heat_fast.kernels.second_order_attention import Primal

built = pytest.mark.skipif(
    not native.available(), reason=f"the compiled extension is missing: {native.missing()}"
)
SETS = native.build_info().get("instruction_sets", ["missing"])
CPU = torch.device("cpu")
EXACT = 1e-12
ROUNDOFF = 2.0**-24

MASKINGS = {
    "full": Masking(0.3),
    "window": Masking(0.3, window=7),
    "window_of_one": Masking(0.3, window=1),
    "wide_window_softcap": Masking(0.3, window=64, softcap=1.5),
    "softcap": Masking(0.3, softcap=1.5),
}
each_masking = pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
# heads, batch, group, queries, keys in all, first own key, head size
SHAPES = [
    (1, 1, 1, 1, 1, 0, 1),
    (2, 3, 2, 63, 63, 0, 16),
    (1, 2, 3, 5, 130, 61, 80),
    (3, 2, 1, 41, 58, 17, 6),
    (1, 1, 4, 33, 64, 31, 48),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor runs."""
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(SETS[0])


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Several numbers of threads, more than there are cores among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def both(run: Callable[..., Any], label: str, *tensors: Tensor) -> None:
    """`run(impl, *tensors)` natively and by the reference, in float64 and in float32."""

    def results(impl: str, dtype: torch.dtype) -> list[Tensor]:
        found = run(impl, *(tensor.to(dtype) for tensor in tensors))
        return [found] if isinstance(found, Tensor) else list(found)

    exact = results("reference", torch.float64)
    pairs = zip(exact, results("native", torch.float64), strict=True)
    for index, (expected, actual) in enumerate(pairs):
        assert actual.dtype == torch.float64
        assert_close(f"{label} {index}", expected, actual, rtol=EXACT, atol=1e-15)
    single = results("reference", torch.float32), results("native", torch.float32)
    for index, (expected, theirs, ours) in enumerate(zip(exact, *single, strict=True)):
        assert ours.dtype == torch.float32
        scale = float(expected.abs().max())
        error = float((theirs.double() - expected).abs().max())
        allowed = 4 * error + 64 * ROUNDOFF * scale + 1e-30
        assert_close(f"{label} {index} float32", expected, ours, rtol=0, atol=allowed)


# --- attention ------------------------------------------------------------------------------------


@built
@each_shape
@each_masking
def test_branch_attention(
    instruction_set: str, masking: Masking, shape: tuple[int, ...], threads: int
) -> None:
    heads, batch, group, queries, stop, start, size = shape
    own = stop - start

    def run(impl: str, *tensors: Tensor) -> Any:
        return branch_attention.branch_attention(*tensors, masking, impl=impl)

    both(
        run,
        f"{instruction_set} {shape}",
        draw(heads, batch, group, queries, size),
        draw(heads, batch, own, size),
        draw(heads, batch, own, size),
        draw(heads, start, size),
        draw(heads, start, size),
    )


def second_order(shape: tuple[int, ...], masking: Masking) -> tuple[Primal, list[Tensor]]:
    """A primal whose normaliser and output are true, tangents and adjoints."""
    heads, batch, group, queries, stop, start, size = shape
    query, key, value = (
        draw(heads, group, stop, size),
        draw(heads, stop, size),
        draw(heads, stop, size),
    )
    output, normaliser = branch_attention.branch_attention(
        query[:, None],
        key[:, None],
        value[:, None],
        key[:, :0],
        value[:, :0],
        masking,
        impl="reference",
    )
    rows = slice(stop - queries, stop)
    primal = Primal(
        query[:, :, rows],
        key,
        value,
        normaliser[:, 0, :, rows],
        output[:, 0, :, rows],
        start,
        masking,
    )
    own = stop - start
    tangents = [
        draw(heads, batch, group, queries, size),
        draw(heads, batch, own, size),
        draw(heads, batch, own, size),
        draw(heads, batch, group, queries, size),
        draw(heads, group, queries, size),
        draw(heads, batch, group, queries, size),
    ]
    return primal, tangents


def cast(primal: Primal, dtype: torch.dtype) -> Primal:
    parts = {
        field.name: getattr(primal, field.name).to(dtype)
        for field in dataclasses.fields(primal)
        if isinstance(getattr(primal, field.name), Tensor)
    }
    return dataclasses.replace(primal, **parts)


@built
@each_shape
@each_masking
def test_second_order_attention(
    instruction_set: str, masking: Masking, shape: tuple[int, ...], threads: int
) -> None:
    primal, tensors = second_order(shape, masking)

    def run(impl: str, *moved: Tensor) -> Any:
        at = cast(primal, moved[0].dtype)
        up = second_order_attention.attention_tangent(at, *moved[:3], impl=impl)
        return up, *second_order_attention.attention_adjoint_tangent(at, *moved, impl=impl)

    both(run, f"{instruction_set} {shape}", *tensors)


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_cast_for_the_attention(dtype: torch.dtype) -> None:
    masking = MASKINGS["full"]
    primal, tensors = second_order(SHAPES[1], masking)
    primal = dataclasses.replace(cast(primal, dtype), normaliser=primal.normaliser.float())
    moved = [tensor.to(dtype) for tensor in tensors]
    for name, count in (("attention_tangent", 3), ("attention_adjoint_tangent", 6)):
        run = getattr(second_order_attention, name)
        ours, theirs = (run(primal, *moved[:count], impl=impl) for impl in ("native", "reference"))
        pairs = [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
        for mine, expected in pairs:
            assert mine.dtype == dtype
            # Both round the same float32 value, up to its last place.
            assert_close(name, expected.double(), mine.double(), rtol=torch.finfo(dtype).eps)


@built
def test_strided_heads_are_taken_as_they_lie() -> None:
    wide = torch.randn(2, 3, 2, 9, 40)
    query, key, value = wide[..., 8:24], wide[:, :, 0, :, :16], wide[:, :, 1, :, 24:]
    below = torch.randn(2, 5, 64)[..., ::4]  # strided in the last dimension: copied
    args = (query, key, value, below, below, MASKINGS["full"])
    ours = branch_attention.branch_attention(*args, impl="native")
    theirs = branch_attention.branch_attention(*args, impl="reference")
    for name, expected, actual in zip(("output", "normaliser"), theirs, ours, strict=True):
        assert_close(name, expected, actual, rtol=1e-5)


@built
def test_large_scores_neither_overflow_nor_vanish() -> None:
    query = torch.full((1, 1, 1, 9, 8), 30.0)
    key = torch.randn(1, 1, 9, 8) * 30
    args = (query, key, key, key[:, 0, :0], key[:, 0, :0], Masking(1.0))
    ours = branch_attention.branch_attention(*args, impl="native")
    theirs = branch_attention.branch_attention(*args, impl="reference")
    assert_close("output", theirs[0], ours[0], rtol=1e-5)
    assert_close("normaliser", theirs[1], ours[1], rtol=1e-6)


@built
def test_a_broken_value_stays_visible() -> None:
    key = torch.randn(1, 1, 9, 8)
    key[0, 0, 4, 2] = torch.nan
    query, value, none = torch.randn(1, 1, 1, 9, 8), torch.randn(1, 1, 9, 8), key[:, 0, :0]
    args = (query, key, value, none, none, Masking(1.0))
    output, _ = branch_attention.branch_attention(*args, impl="native")
    broken = torch.isnan(output[0, 0, 0]).any(-1)
    assert broken.tolist() == [False] * 4 + [True] * 5


# --- row-wise operations --------------------------------------------------------------------------


@built
@pytest.mark.parametrize("width", [1, 7, 48, 130])
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("weighted", [False, True], ids=["bare", "affine"])
def test_norm(instruction_set: str, width: int, centered: bool, weighted: bool) -> None:
    weight = draw(width) if weighted else None
    bias = draw(width) if weighted and centered else None
    offset = 1.0 if weighted and not centered else 0.0

    def affine(dtype: torch.dtype) -> norm.Affine:
        parts = (None if part is None else part.to(dtype) for part in (weight, bias))
        return norm.Affine(*parts, 1e-5, centered, offset, late_cast=True)

    x, x_dot, y_bar_dot = draw(5, width), draw(3, 5, width), draw(3, 5, width)
    _, normalised, inverse = norm.norm_forward(affine(torch.float64), x[None], impl="reference")
    pulled, along = draw(5, width), draw(5, 1)

    def run(impl: str, *tensors: Tensor) -> Any:
        rows, moved, bar, *state = tensors
        at = affine(rows.dtype)
        return (
            *norm.norm_forward(at, rows[None], impl=impl),
            norm.norm_forward(at, moved, keep=False, impl=impl)[0],
            norm.norm_tangent(at, state[0], state[1], moved, impl=impl),
            norm.norm_adjoint_tangent(at, *state, moved, bar, impl=impl),
        )

    # A single number: its normalised value is +-1 (rms) or 0 / 0 up to eps; tangents cancel.
    state = (normalised[0], inverse[0], pulled, along)
    if width > 1:
        both(run, f"{instruction_set} {width}", x, x_dot, y_bar_dot, *state)
    else:
        ours, theirs = (run(impl, x, x_dot, y_bar_dot, *state) for impl in ("native", "reference"))
        for expected, actual in zip(theirs, ours, strict=True):
            assert_close("one number", expected, actual, rtol=1e-9, atol=1e-9)


@built
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("turned", [0, 6, 32, 48])
@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_and_layout(
    instruction_set: str, interleaved: bool, turned: int, sign: int
) -> None:
    def run(impl: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        table = rotary.Table(cos, sin, interleaved) if turned else None
        result = torch.full((3, 2, 5, 48), torch.nan, dtype=x.dtype)
        rotary.place(x[:, :, ::2], result.permute(1, 2, 0, 3), table, sign, impl=impl)
        return result

    both(run, f"{instruction_set} {turned}", draw(2, 5, 6, 48), draw(5, turned), draw(5, turned))


@built
@pytest.mark.parametrize("width", [1, 40, 131])
def test_gated(instruction_set: str, width: int) -> None:
    def run(impl: str, *tensors: Tensor) -> Any:
        value, slope, _, _, gate, up, _ = tensors
        return (
            gated.gate_tangent(value, slope, gate, up, impl=impl),
            *gated.gate_adjoint_tangent(*tensors, impl=impl),
        )

    shared = [draw(5, width) for _ in range(4)]
    # Halves of a fused projection: rows that do not lie side by side.
    halves = draw(3, 5, 2 * width).chunk(2, dim=-1)
    both(run, f"{instruction_set} {width}", *shared, *halves, draw(3, 5, width))


# --- choice, record and errors --------------------------------------------------------------------


def test_the_extension_is_there_where_a_compiler_is() -> None:
    info = heat_fast.build_info()
    if not info["native"]:
        assert info["reason"]
        assert shutil.which("g++") is None and shutil.which("c++") is None, info["reason"]
    else:
        assert info["instruction_set"] in info["instruction_sets"]
        # torch's CPU builds bring GNU's runtime; another pool would compete with it.
        assert info["threads"] == "OpenMP of the process"


@built
def test_scores_do_not_depend_on_the_kernels(demo: Any) -> None:
    prompt = demo.examples[0].prompt
    results = {
        kernels: heat_fast.attribute(
            demo.model, demo.tokenizer, prompt, variant="full", probes=1, kernels=kernels
        )
        for kernels in ("native", "reference")
    }
    ran = {name: result.metadata["implementation"]["kernels"] for name, result in results.items()}
    assert set(ran["native"]) == set(ran["reference"])
    assert tuple(ran["native"]["branch_attention"]) == ("native",)
    assert all(tuple(names) == ("reference",) for names in ran["reference"].values())
    for part in ("gate", "curvature", "information", "scores"):
        expected, actual = (getattr(results[name], part) for name in ("reference", "native"))
        # The prediction is nearly certain (p = 0.9996), so its Hessian is a small difference.
        assert_close(part, expected, actual, rtol=1e-3)


@built
def test_native_by_name_is_never_something_else() -> None:
    x = torch.randn(1, 1, 1, 3, 8)
    with pytest.raises(ConfigError, match=r"branch_attention with impl='native' cannot take cpu"):
        grown = x.clone().requires_grad_()
        branch_attention.branch_attention(
            grown,
            x[:, :, 0],
            x[:, :, 0],
            x[0, :, 0, :0],
            x[0, :, 0, :0],
            Masking(1.0),
            impl="native",
        )
    with (
        pytest.raises(ConfigError, match="the model is on cuda"),
        using("native", torch.device("cuda")),
    ):
        pass


@built
def test_native_by_name_refuses_a_layout_that_it_has_no_kernel_for() -> None:
    """Operations that leave some layouts to torch: asked by name, they say so."""
    x = torch.randn(2, 3, 8)
    mixed = x.double()
    rms = Affine(torch.ones(8), None, 1e-6, centered=False)
    refused = partial(pytest.raises, ConfigError)
    with refused(match=r"gated with impl='native' cannot take .* a layout and mix of dtypes"):
        gated.gate_tangent(mixed[0], x[0], x, x, impl="native")
    with refused(match="norm with impl='native' cannot take"):
        norm.norm_tangent(rms, x, x[..., :1], x, impl="native")
    with refused(match="rotary with impl='native' cannot take"):
        rotary.place(x[None], torch.empty(1, 2, 3, 8, dtype=torch.float64), None, impl="native")
    with using("auto", CPU) as ran:
        norm.norm_tangent(rms, x, x[..., :1], x)
    assert ran == {"norm": {"reference"}}


def test_an_unknown_implementation_is_told_with_the_known_ones() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ConfigError, match=r"impl='nativ': expected one of .* mean 'native'"):
        gated.gate_tangent(x, x, x[None], x[None], impl="nativ")


def test_a_missing_extension_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_missing", "no module named heat_fast._native")
    assert heat_fast.build_info() == {
        "native": False,
        "reason": "no module named heat_fast._native",
        "cuda": cuda.build_info(),
    }
    with using("auto", CPU) as ran:
        branch_attention.branch_attention(
            torch.zeros(1, 1, 1, 3, 8),
            *(torch.zeros(1, 1, 3, 8),) * 2,
            *(torch.zeros(1, 0, 8),) * 2,
            Masking(1.0),
        )
    assert ran == {"branch_attention": {"reference"}}
    with (
        pytest.raises(ConfigError, match=r"kernels='native' cannot run \(no module"),
        using("native", CPU),
    ):
        pass


def test_kernels_is_a_checked_setting() -> None:
    assert HeatConfig().kernels == "auto"
    with pytest.raises(ConfigError, match="kernels='nativ'"):
        HeatConfig(kernels="nativ")  # type: ignore[arg-type]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"key": (2, 1, 4, 16)}, r"value has shape|key has shape"),
    "depth": ({"query": (1, 1, 1, 3, 5)}, "head dimension 5"),
    "dims": ({"query": (1, 1, 3, 16)}, "dimensions: expected 5"),
    "empty": ({"query": (0, 1, 1, 3, 16)}, "query is empty"),
    "queries": ({"query": (1, 1, 1, 4, 16)}, "more queries than keys"),
    "prefix": ({"prefix_value": None}, "prefix_value is None"),
    "output": ({"output": (1, 1, 1, 3, 8)}, "output has shape"),
}


@built
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_sizes_that_do_not_fit_are_value_errors(change: dict[str, Any], message: str) -> None:
    shapes: dict[str, tuple[int, ...] | None] = {
        "query": (1, 1, 1, 3, 16),
        "key": (1, 1, 3, 16),
        "value": (1, 1, 3, 16),
        "prefix_key": (1, 2, 16),
        "prefix_value": (1, 2, 16),
        "output": (1, 1, 1, 3, 16),
        "normaliser": (1, 1, 1, 3),
    }
    tensors = [
        None if size is None else torch.zeros(size) for size in {**shapes, **change}.values()
    ]
    arrays = [native.array(tensor) for tensor in tensors]
    rest = (1.0, 0, 0.0, native.workspace(torch.float32), 1)
    with pytest.raises(ValueError, match=message):
        native.module(torch.float32).branch_attention(*arrays, *rest)


@built
@given(
    sizes=st.tuples(*[st.integers(0, 5)] * 6),
    wrong=st.integers(0, 6),
    kind=st.sampled_from(["none", "transposed", "text", "short", "huge"]),
)
def test_no_argument_crashes(sizes: tuple[int, ...], wrong: int, kind: str) -> None:
    heads, batch, group, queries, own, start = sizes
    tensors = [
        torch.zeros(heads, batch, group, queries, 16),
        torch.zeros(heads, batch, own, 16),
        torch.zeros(heads, batch, own, 16),
        torch.zeros(heads, start, 16),
        torch.zeros(heads, start, 16),
        torch.zeros(heads, batch, group, queries, 16),
        torch.zeros(heads, batch, group, queries),
    ]
    arrays: list[Any] = [native.array(tensor) for tensor in tensors]
    address, shape, strides = arrays[wrong]
    arrays[wrong] = {
        "none": None,
        "transposed": (address, shape, strides[::-1]),
        "text": "query",
        "short": (address, shape[:-1], strides[:-1]),
        "huge": (address, (1 << 40, *shape[1:]), strides),
    }[kind]
    rest = (1.0, 0, 0.0, native.workspace(torch.float32), 2)
    # Either the sizes fit by chance (an array that may be left out), or the reason is given.
    try:
        native.module(torch.float32).branch_attention(*arrays, *rest)
    except (ValueError, TypeError, RuntimeError) as error:
        assert str(error)

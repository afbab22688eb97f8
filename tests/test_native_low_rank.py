"""The compiled low-rank step: against float64 torch, and whatever a fuzz test thinks of.

What the sketches and the factors mean is tested in `test_low_rank.py`, which runs natively too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assertions import assert_close
from heat_fast import ConfigError, HeatError, InputError, NumericalError, native
from heat_fast.kernels.dispatch import using
from heat_fast.kernels.low_rank import (
    Factors,
    block_norms,
    orthonormalise,
    product,
    quality,
    single_pass,
    two_pass,
)
from heat_fast.kernels.low_rank import native as compiled
from heat_fast.kernels.window_mean import window_mean

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"the compiled extension is missing: {native.missing()}"
)
SETS = native.build_info().get("instruction_sets", ["missing"])
DOUBLE = torch.finfo(torch.float64).eps
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(params=SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor runs."""
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(SETS[0])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Layouts of a tall matrix: rows, columns, every other number of a wider one, reversed dimensions.
def by_columns(tall: Tensor) -> Tensor:
    return tall.mT.contiguous().mT


def spread(tall: Tensor) -> Tensor:
    wide = tall.new_full((*tall.shape[:-1], 3 * tall.shape[-1]), float("nan"))
    wide[..., ::3] = tall
    return wide[..., ::3]


def turned(tall: Tensor) -> Tensor:
    order = list(reversed(range(tall.dim())))
    return tall.permute(order).contiguous().permute(order)


LAYOUTS = {"rows": torch.clone, "columns": by_columns, "spread": spread, "turned": turned}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

# --- the small eigenproblem ---------------------------------------------------------------------


def spectrum(kind: str, order: int) -> Tensor:
    spectra = {
        "indefinite": torch.randn(order),
        "graded": 10.0 ** -torch.linspace(0, 14, order) * (-1) ** torch.arange(order),
        "clustered": torch.where(torch.arange(order) % 3 == 0, 1.0, -1.0),
        "clusters": 1 + 1e-13 * torch.randn(order),
        "deficient": torch.where(torch.arange(order) % 4 == 0, torch.randn(order), 0.0),
        "zero": torch.zeros(order),
    }
    return spectra[kind].double()


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize(
    "kind", ["indefinite", "graded", "clustered", "clusters", "deficient", "zero"]
)
@pytest.mark.parametrize("order", [1, 2, 3, 17, 64, 129])
def test_eigenproblem(order: int, kind: str, scale: float) -> None:
    true = spectrum(kind, order)
    basis = torch.linalg.qr(draw(order, order)).Q
    matrix = basis * true @ basis.mT
    values, vectors = compiled.symmetric_eigen(scale * matrix)
    size = max(float(true.abs().max()), 1e-30)
    # A reflection per column and some rotations, each of a few roundings.
    allowed = 8 * order * DOUBLE
    expected = torch.linalg.eigvalsh(matrix)
    found = values.sort().values / scale
    assert_close("values", expected, found, rtol=0, atol=allowed * size)
    unit = torch.eye(order, dtype=torch.float64)
    assert_close("vectors", unit, vectors.mT @ vectors, rtol=0, atol=allowed)
    residual = matrix @ vectors - vectors * (values / scale)
    assert_close("residual", torch.zeros_like(residual), residual, rtol=0, atol=allowed * size)


@pytest.mark.parametrize("order", [257, 512])
def test_eigenproblems_of_a_large_order(order: int) -> None:
    matrix = draw(order, order)
    matrix = matrix + matrix.mT
    values, vectors = compiled.symmetric_eigen(matrix)
    size = float(values.abs().max())
    rebuilt = vectors * values @ vectors.mT
    assert_close("A", matrix, rebuilt, rtol=0, atol=8 * order * DOUBLE * size)


# --- tall matrices ------------------------------------------------------------------------------

SHAPES = [(1, 1), (5, 5), (63, 7), (64, 8), (200, 131), (3001, 33)]


@both_dtypes
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_tall_matrices(
    shape: tuple[int, int], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    rows, columns = shape
    left, right = (layout(draw(2, rows, count).to(dtype)) for count in (columns, columns // 2 + 1))
    # Products are exact in float64 for float32: what is rounded are the sums.
    exact = left.double().mT @ right.double()
    size = left.double().abs().mT @ right.double().abs()
    error = (compiled.gram(left, right) - exact).abs() / size
    assert float(error.max()) < rows * DOUBLE
    small = draw(2, columns, 5)
    allowed = columns * DOUBLE + torch.finfo(dtype).eps
    error = compiled.combine(left, small).double() - left.double() @ small
    assert bool((error.abs() <= allowed * (left.double().abs() @ small.abs())).all())


def check_basis(matrix: Tensor) -> None:
    """Orthonormal and triangular, every column recovered relative to its own size."""
    frame, triangle = orthonormalise(matrix, impl="native")
    rows, count = matrix.shape[-2:]
    eps = torch.finfo(matrix.dtype).eps
    squares = frame.double().mT @ frame.double()
    unit = torch.eye(count, dtype=torch.float64).expand_as(squares)
    # The algorithm's own criterion, with as much again for the order of this sum.
    allowed = 8 * count**0.5 * eps + 4 * rows**0.5 * DOUBLE
    assert_close("Q'Q", unit, squares, rtol=0, atol=allowed)
    assert not triangle.tril(-1).any()
    size = matrix.double().abs().amax(-2, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    scaled = matrix.double() / size
    rebuilt = frame.double() @ (triangle / size)
    # A rounding of every entry of Q per pass, against columns of at most sqrt(rows), and as much
    # again for the sums of this product.
    assert_close("QR", scaled, rebuilt, rtol=0, atol=16 * eps * rows**0.5)


@both_dtypes
@each_layout
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e7, 1e15])
def test_orthonormal_bases(
    condition: float, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    rows, columns = 411, 43
    magnitudes = condition ** -torch.linspace(0, 1, columns, dtype=torch.float64)
    left, right = (torch.linalg.qr(draw(size, columns)).Q for size in (rows, columns))
    check_basis(layout((left * magnitudes @ right.mT).to(dtype)))


@both_dtypes
def test_bases_of_columns_of_any_scale(dtype: torch.dtype) -> None:
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    plain = draw(300, 4).clamp(-4, 4).to(dtype)
    nothing = torch.zeros(300, 2, dtype=dtype)
    parts = [plain, most / 1e3 * plain, nothing, plain, least * plain, least / 1e3 * plain]
    check_basis(torch.cat(parts, 1))
    check_basis(torch.zeros(30, 30, dtype=dtype))
    check_basis(torch.ones(30, 30, dtype=dtype))
    check_basis(torch.ones(6, 2, dtype=dtype))
    frames = [
        orthonormalise(torch.zeros(70, 5, dtype=dtype), impl=each)[0]
        for each in ("native", "reference")
    ]
    assert_close("what stands for nothing", *frames, rtol=1e-5)


@both_dtypes
def test_a_batch_is_its_matrices_one_by_one(dtype: torch.dtype) -> None:
    batch = draw(3, 2, 40, 6).to(dtype)
    batch[1, 0, :, 2] = 0
    batch[2, 1, :, 3] = batch[2, 1, :, 1]
    frames, triangles = orthonormalise(batch, impl="native")
    for index in ((0, 1), (1, 0), (2, 1)):
        frame, triangle = orthonormalise(batch[index], impl="native")
        assert torch.equal(frame, frames[index]) and torch.equal(triangle, triangles[index])
        check_basis(batch[index])


@pytest.mark.parametrize("shape", [(5, 60, 8), (1, 40_000, 20)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...]) -> None:
    matrix, tests = torch.randn(shape), torch.randn(shape)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        factors = single_pass(tests, matrix, 4, impl="native")
        results.append([*orthonormalise(matrix, impl="native"), factors.vectors, factors.values])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# --- factors ------------------------------------------------------------------------------------


def dense(factors: Factors) -> Tensor:
    vectors = factors.vectors.double()
    return vectors * factors.values[..., None, :] @ vectors.mT


@both_dtypes
@each_layout
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["indefinite", "deficient", "graded", "zero"])
def test_factors(
    kind: str, passes: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """A batch of indefinite operators of rank 15, 4 or 0, condition up to 1e7, exactly."""
    size, rank = 150, 15
    true = spectrum(kind, rank)
    if kind == "graded":
        true = true.sign() * 10.0 ** -torch.linspace(0, 7, rank, dtype=torch.float64)
    basis = torch.linalg.qr(draw(2, size, rank)).Q
    operators = basis * true @ basis.mT
    tests = draw(size, 2 * rank).to(dtype)
    images = layout((operators @ tests.double()).to(dtype))
    eps = torch.finfo(dtype).eps
    if passes == 1:
        factors = single_pass(layout(tests), images, rank, impl="native")
    else:
        factors = two_pass(
            images, lambda frame: (operators @ frame.double()).to(dtype), rank, impl="native"
        )
    scale = float(true.abs().max())
    # Products of that length, taken through an inverse with as many roundings again.
    assert_close("H", operators, dense(factors), rtol=0, atol=size**0.5 * 8 * eps * scale + 1e-300)
    squares = factors.vectors.double().mT @ factors.vectors.double()
    unit = torch.eye(rank, dtype=torch.float64).expand_as(squares)
    assert_close("U'U", unit, squares, rtol=0, atol=16 * rank**0.5 * eps)
    magnitudes = factors.values.abs()
    assert torch.equal(magnitudes, magnitudes.sort(descending=True).values)
    directions = draw(size, 3).to(dtype)
    expected = dense(factors) @ directions.double()
    found = product(factors, directions, impl="native").double()
    assert_close("H Z", expected, found, rtol=8 * eps, atol=8 * eps * scale + 1e-300)


def test_test_vectors_of_another_precision() -> None:
    operator = draw(60, 60)
    operator = operator + operator.mT
    tests = torch.randn(60, 20)
    exact = single_pass(tests.double(), operator @ tests.double(), 10, impl="reference")
    mixed = single_pass(tests, operator @ tests.double(), 10, impl="native")
    assert mixed.vectors.dtype == torch.float64
    assert_close("H", dense(exact), dense(mixed), rtol=1e-11)
    narrow = single_pass(tests.double(), (operator @ tests.double()).float(), 10, impl="native")
    assert narrow.vectors.dtype == torch.float32


@both_dtypes
def test_test_vectors_of_a_batch_that_broadcast(dtype: torch.dtype) -> None:
    """To leading dimensions beyond their own, from a layout that has to be copied."""
    operators = draw(2, 3, 24, 24)
    operators = operators + operators.mT
    tests = turned(draw(3, 24, 9)).to(dtype)
    images = (operators @ tests.double()).to(dtype)
    exact = single_pass(tests.double(), images.double(), 4, 1e-7, impl="reference")
    found = single_pass(tests, images, 4, 1e-7, impl="native")
    # The core's inverse magnifies roundings, here by less than a thousand.
    eps = 1e3 * torch.finfo(dtype).eps
    assert_close("values", exact.values, found.values, rtol=eps)
    assert_close("H", dense(exact), dense(found), rtol=eps)


@both_dtypes
@each_layout
@pytest.mark.parametrize("probes", [1, 5, 41])
@pytest.mark.parametrize("own", [False, True])
def test_block_norms(
    own: bool, probes: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    vectors = layout(draw(2, 5, 67, 11).to(dtype))
    values = draw(2, 5 if own else 1, 11)
    samples = torch.randint(0, 2**31, (probes,))
    seed = -(2**63) + 5
    exact = block_norms(vectors.double(), values, seed, samples, impl="reference")
    found = block_norms(vectors, values, seed, samples, impl="native")
    assert found.dtype == dtype
    assert_close("S", exact, found, rtol=67 * 11 * torch.finfo(dtype).eps)


@both_dtypes
def test_window_means(dtype: torch.dtype) -> None:
    rows = draw(4, 3, 6).to(dtype)
    index = torch.stack([torch.randperm(11)[:6] for _ in range(4)])
    counted = torch.rand(4, 6) > 0.3
    for mask in (None, counted):
        exact = window_mean(rows.double(), index, 11, mask, impl="reference")
        found = window_mean(rows, index, 11, mask, impl="native")
        assert found.dtype == dtype
        assert_close("mean", exact, found, rtol=4 * torch.finfo(dtype).eps)


# --- choice and refusals ------------------------------------------------------------------------


def test_what_ran_is_on_record() -> None:
    matrix = draw(9, 3)
    with using("auto", torch.device("cpu")) as record:
        orthonormalise(matrix)
        window_mean(draw(1, 1, 2), torch.tensor([[0, 1]]), 2)
    assert record == {"low_rank": {"native"}, "window_mean": {"native"}}
    with using("reference", torch.device("cpu")) as record:
        single_pass(matrix, matrix, 2)
    assert record == {"low_rank": {"reference"}}


def test_half_precision_is_refused_natively() -> None:
    with pytest.raises(ConfigError, match="low_rank"):
        orthonormalise(torch.randn(9, 3).half(), impl="native")


TALL = torch.ones(6, 2)
REFUSED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "empty": ("empty", lambda impl: orthonormalise(TALL[:0], impl=impl)),
    "wide": ("2 rows", lambda impl: orthonormalise(TALL.mT, impl=impl)),
    "vector": ("tall", lambda impl: orthonormalise(TALL[0], impl=impl)),
    "integers": ("int64", lambda impl: orthonormalise(TALL.long(), impl=impl)),
    "complex": ("complex", lambda impl: orthonormalise(TALL * 1j, impl=impl)),
    "rank": ("rank 0", lambda impl: single_pass(TALL, TALL, 0, impl=impl)),
    "tests": ("broadcasts", lambda impl: single_pass(TALL[:4], TALL, 1, impl=impl)),
    "lead": ("broadcasts", lambda impl: single_pass(TALL.expand(3, 6, 2), TALL, 1, impl=impl)),
    "again": ("basis", lambda impl: two_pass(TALL, lambda frame: frame[:4], 1, impl=impl)),
    "factors": ("rows", lambda impl: product(Factors(TALL, TALL[0]), TALL[:3], impl=impl)),
    "values": ("samples", lambda impl: block_norms(TALL[None], TALL, 0, TALL[0], impl=impl)),
    "tokens": (
        "tokens 0 to 2",
        lambda impl: window_mean(TALL[None], torch.tensor([[0, 2]]), 2, impl=impl),
    ),
}


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, impl: str) -> None:
    match, call = REFUSED[case]
    with pytest.raises(InputError, match=match):
        call(impl)


@both_dtypes
@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float, impl: str, dtype: torch.dtype) -> None:
    good, bad = draw(2, 40, 5).to(dtype), draw(2, 40, 5).to(dtype)
    bad[1, 39, 4] = value
    calls: list[Callable[[], Any]] = [
        lambda: orthonormalise(bad, impl=impl),
        lambda: single_pass(good, bad, 3, impl=impl),
        lambda: single_pass(bad, good, 3, impl=impl),
        lambda: two_pass(good, lambda _: bad, 3, impl=impl),
        lambda: quality(bad, good),
        lambda: quality(good, bad),
        lambda: block_norms(bad, torch.ones(1, 5), 0, torch.arange(2), impl=impl),
    ]
    for call in calls:
        with pytest.raises(NumericalError, match="finite"):
            call()


def test_the_extension_checks_what_it_is_given() -> None:
    extension = native.module(torch.float32)
    matrix, frame, triangle = torch.ones(1, 6, 2), torch.ones(1, 6, 2), torch.ones(1, 2, 2).double()
    workspace = native.workspace(torch.float64)

    def call(*tensors: Tensor, threads: int = 1) -> None:
        extension.orthonormalise(*map(native.array, tensors), workspace, threads)

    call(matrix, frame, triangle)
    with pytest.raises(ValueError, match="frame has shape"):
        call(matrix, frame[:, :5], triangle)
    with pytest.raises(ValueError, match="not contiguous"):
        call(matrix, by_columns(frame), triangle)
    with pytest.raises(ValueError, match="more columns than rows"):
        call(matrix.mT, frame.mT, triangle)
    with pytest.raises(ValueError, match="threads"):
        call(matrix, frame, triangle, threads=0)
    rows, index, mean = torch.ones(1, 1, 2), torch.tensor([[0, 7]]), torch.ones(1, 3)
    parts = [native.array(tensor) for tensor in (rows, index, None, mean)]
    with pytest.raises(ValueError, match="index holds 7"):
        extension.window_mean(*parts, native.workspace(torch.float32), 1)


# --- fuzz ---------------------------------------------------------------------------------------

SPECIAL = [0.0, 1.0, -1.0, 1e-45, 1e-40, 1e38, -1e38, 1e-310, 1e300, float("nan"), float("inf")]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any shape, layout and type, zero sizes among them, with awkward numbers in it."""
    shape = draw(st.lists(st.integers(0, 9), min_size=0, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64] * 4 + [torch.float16, torch.int64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    tensor = tensor * draw(st.sampled_from([1.0, 1.0, 0.0, 1e-320, 1e-160, 1e160, 1e306]))
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        if tensor.numel() > 0:
            tensor.flatten()[draw(st.integers(0, tensor.numel() - 1))] = value
    tensor = tensor.to(dtype)
    if tensor.dim() >= 2:
        layout = draw(st.sampled_from(["as it is", "transposed", "strided", "expanded"]))
        if layout == "transposed":
            tensor = tensor.mT
        elif layout == "strided":
            tensor = tensor[..., ::2]
        elif layout == "expanded" and tensor.shape[-1] > 0:
            tensor = tensor[..., :1].expand(tensor.shape)
    return tensor


@given(tensors(), tensors(), st.integers(-1, 12), st.booleans(), st.sampled_from([1, 3]))
def test_any_input_gives_a_finite_result_or_a_reason(
    one: Tensor, other: Tensor, rank: int, alike: bool, threads: int
) -> None:
    if alike:
        other = one
    torch.set_num_threads(threads)
    calls: list[Callable[[], Any]] = [
        lambda: orthonormalise(one),
        lambda: single_pass(one, other, rank),
        lambda: two_pass(one, lambda frame: frame * 2, rank),
        lambda: two_pass(one, lambda _: other, rank),
        lambda: product(Factors(one, (one.sum(-2) if one.dim() > 1 else one).double()), other),
        lambda: quality(one, other),
        lambda: block_norms(one, other, rank, torch.arange(max(0, rank))),
        lambda: window_mean(one, torch.zeros(one.shape[::2], dtype=torch.int64), 3),
    ]
    for number, call in enumerate(calls):
        try:
            result = call()
        except HeatError as error:
            assert str(error)
            continue
        if number in (0, 1, 2, 3, 6):
            parts = (result.vectors, result.values) if isinstance(result, Factors) else result
            assert all(bool(torch.isfinite(part).all()) for part in parts)
    torch.set_num_threads(1)

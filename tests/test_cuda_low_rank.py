"""The compiled CUDA kernels of the low-rank step, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast import ConfigError, InputError, NumericalError, cuda
from heat_fast.kernels.dispatch import using
from heat_fast.kernels.low_rank import (
    block_norms,
    orthonormalise,
    product,
    quality,
    reference,
    single_pass,
    two_pass,
)
from heat_fast.kernels.low_rank import cuda as kernels
from heat_fast.kernels.rademacher import rademacher
from heat_fast.kernels.window_mean import window_mean

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float64]

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gpu = pytest.mark.gpu
built = pytest.mark.skipif(
    cuda.module() is None, reason=f"the CUDA extension is missing: {cuda.missing()}"
)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def by_columns(matrix: Tensor) -> Tensor:
    """The same matrix with contiguous columns."""
    return matrix.mT.contiguous().mT


def spaced(matrix: Tensor) -> Tensor:
    """The same matrix with no stride of 1."""
    wide = matrix.new_zeros(*matrix.shape[:-1], 2 * matrix.shape[-1])
    wide[..., ::2] = matrix
    return wide[..., ::2]


LAYOUTS = [torch.Tensor.contiguous, by_columns, spaced]

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["rows", "columns", "spaced"])


# --- primitives ---------------------------------------------------------------------------------


@gpu
@built
@both_dtypes
@layouts
@pytest.mark.parametrize(
    ("rows", "left", "right"), [(1, 1, 1), (63, 3, 1), (130, 63, 130), (1000, 65, 17), (16, 64, 64)]
)
def test_gram(rows: int, left: int, right: int, layout: object, dtype: torch.dtype) -> None:
    assert callable(layout)
    a, b = layout(normal(rows, left, dtype=dtype)), layout(normal(rows, right, dtype=dtype))
    tolerance = (rows + 4) * 2.3e-16
    for one, other in ((a, b), (a, a)):
        expected = one.double().mT.contiguous() @ other.double().contiguous()
        scale = one.double().norm(dim=0).outer(other.double().norm(dim=0))
        actual = kernels.gram(one, other)
        assert actual.dtype == torch.float64
        # An entry's error is at most that share of the product of the columns' norms.
        assert_close("A'B", expected / scale, actual / scale, rtol=0.0, atol=tolerance)
    assert torch.equal(kernels.gram(a, a), kernels.gram(a, a).mT)


@gpu
@built
@both_dtypes
@layouts
@pytest.mark.parametrize(
    ("rows", "left", "right"), [(1, 1, 1), (63, 3, 1), (130, 63, 130), (1000, 65, 17), (64, 16, 64)]
)
def test_combine(rows: int, left: int, right: int, layout: object, dtype: torch.dtype) -> None:
    assert callable(layout)
    a, b = layout(normal(rows, left, dtype=dtype)), layout(normal(left, right))
    exact = a.double().contiguous() @ b.contiguous()
    actual = kernels.combine(a, b)
    assert actual.dtype == dtype and actual.is_contiguous()
    scale = a.double().norm(dim=1)[:, None] * b.norm(dim=0)
    tolerance = (left + 4) * 2.3e-16 + torch.finfo(dtype).eps
    assert_close("A B", exact / scale, actual / scale, rtol=0.0, atol=tolerance)


@gpu
@built
@both_dtypes
def test_leading_dimensions_broadcast(dtype: torch.dtype) -> None:
    for lead in ((3,), (2, 3), (2, 1, 3)):
        a, b = normal(3, 130, 5, dtype=dtype), by_columns(normal(*lead, 130, 7, dtype=dtype))
        exact = a.double().mT @ b.double()
        assert_close(f"A'B {lead}", exact, kernels.gram(a, b), rtol=1e-13)
        assert_close(f"B'A {lead}", exact.mT, kernels.gram(b, a), rtol=1e-13)
        small = normal(*lead, 5, 6)
        actual = kernels.combine(a, small)
        tolerance = 20 * torch.finfo(dtype).eps
        assert_close(f"A B {lead}", a.double() @ small, actual, rtol=tolerance)


@gpu
@built
def test_sums_do_not_depend_on_timing_and_split_over_the_device() -> None:
    """Long enough for many chunks; the same bits every time."""
    matrix = normal(20011, 70, dtype=torch.float32)
    first = kernels.gram(matrix, matrix)
    assert_close("A'A", matrix.double().mT @ matrix.double(), first, rtol=20011 * 2.3e-16)
    for _ in range(3):
        assert torch.equal(first, kernels.gram(matrix, matrix))


@gpu
@built
@both_dtypes
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e7])
def test_solve_leaves_the_residual_of_substitution(condition: float, dtype: torch.dtype) -> None:
    basis, turn = torch.linalg.qr(normal(500, 63)).Q, torch.linalg.qr(normal(63, 63)).Q
    spectrum = condition ** -torch.linspace(0, 1, 63, dtype=torch.float64, device=DEVICE)
    matrix = (basis * spectrum @ turn).to(dtype)
    upper = torch.linalg.qr(matrix.double()).R
    found = kernels.solve(matrix, upper).double()
    back = found @ upper
    # Substitution: |A - Q R| within gamma |Q| |R|, and a rounding of Q where it is float32.
    allowed = (found.abs() @ upper.abs()) * (2 * 63 * 2.3e-16 + torch.finfo(dtype).eps)
    excess = ((back - matrix.double()).abs() / allowed).max()
    print(f"residual: {float(excess):.2f} of what substitution may leave")
    assert excess < 1


# --- the step -----------------------------------------------------------------------------------


def degenerate(rows: int, count: int) -> dict[str, Tensor]:
    """Matrices that undo a careless orthonormalisation."""
    plain = normal(rows, count)
    power = torch.arange(count, dtype=torch.float64, device=DEVICE)
    repeated = plain.clone()
    repeated[:, count // 2 :] = repeated[:, : count - count // 2]
    vanishing = plain.clone()
    vanishing[:, ::3] = 0
    turned = torch.linalg.qr(normal(count, count)).Q
    ill = torch.linalg.qr(plain).Q * 10.0 ** (-7 * power / count) @ turned
    return {
        "plain": plain,
        "scales": plain * 10.0 ** (20 * power / count - 10),
        "condition 1e7": ill,
        "repeated": repeated,
        "vanishing": vanishing,
        "zero": torch.zeros_like(plain),
    }


@gpu
@built
@both_dtypes
@layouts
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (63, 63), (1000, 130)])
def test_orthonormalise(rows: int, count: int, layout: object, dtype: torch.dtype) -> None:
    assert callable(layout)
    eps = torch.finfo(dtype).eps
    for name, exact in degenerate(rows, count).items():
        matrix = layout(exact.to(dtype))
        frame, triangle = orthonormalise(matrix, impl="cuda")
        wide = frame.double()
        identity = torch.eye(count, dtype=torch.float64, device=DEVICE)
        allowed = 4 * count**0.5 * eps + 2 * rows**0.5 * 2.3e-16
        assert_close(f"{name}: Q'Q", identity, wide.mT @ wide, rtol=0.0, atol=2 * allowed)
        assert torch.equal(triangle, triangle.triu())
        scale = matrix.double().norm(dim=0).clamp_min(1e-300)
        residual = (wide @ triangle - matrix.double()).norm(dim=0) / scale
        print(f"{name}: residual {float(residual.max()):.1e}")
        assert residual.max() < 40 * count**0.5 * eps


def mixed_signs(size: int) -> Tensor:
    """An indefinite operator with a decaying spectrum."""
    number = torch.arange(size, dtype=torch.float64, device=DEVICE)
    spectrum = torch.where(number % 3 == 1, -1.0, 1.0) * 0.8**number
    basis = torch.linalg.qr(normal(size, size)).Q
    return basis * spectrum @ basis.mT


def dense(vectors: Tensor, values: Tensor) -> Tensor:
    return (vectors.double() * values[..., None, :]) @ vectors.double().mT


@gpu
@built
@both_dtypes
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_factors_are_those_of_the_reference(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    """Single pass and two passes, sequence and token scope, one run recorded."""
    size, rank = 130, 11
    operators = torch.stack([mixed_signs(size) for _ in range(max(1, torch.Size(lead).numel()))])
    operator = operators.view(*lead, size, size)
    numbers = torch.arange(2 * rank, device=DEVICE)
    tests = rademacher(1, numbers, torch.tensor(0, device=DEVICE), size, dtype).mT
    images = by_columns((operator @ tests.double()).to(dtype))

    def apply(frame: Tensor) -> Tensor:
        return (operator @ frame.double()).to(dtype)

    precision = torch.finfo(dtype).eps
    with using("auto", torch.device(DEVICE)) as ran:
        one, two = single_pass(tests, images, rank), two_pass(images, apply, rank)
        applied = product(one, tests)
    assert ran == {"low_rank": {"cuda"}}
    frame, _ = reference.orthonormalise(images)
    expected = (
        reference.single_pass(tests, images, rank, precision),
        reference.second_pass(frame, apply(frame), rank),
    )
    # The single pass divides by core eigenvalues of about 0.8^rank.
    tolerance = 100 * rank * precision / 0.8**rank
    for name, ours, theirs in (("single", one, expected[0]), ("two", two, expected[1])):
        assert ours.vectors.dtype == dtype and ours.values.dtype == torch.float64
        wide = ours.vectors.double()
        identity = torch.eye(rank, dtype=torch.float64, device=DEVICE).expand(*lead, -1, -1)
        assert_close(f"{name}: U'U", identity, wide.mT @ wide, rtol=100 * precision)
        assert_close(f"{name}: w", theirs.values, ours.values, rtol=tolerance)
        exact = dense(theirs.vectors, theirs.values)
        assert_close(f"{name}: H_k", exact, dense(ours.vectors, ours.values), rtol=tolerance)
    exact = dense(one.vectors, one.values) @ tests.double()
    assert_close("H_k T", exact, applied, rtol=100 * precision)
    residual, captured = quality(images, applied)
    assert bool((residual < 1).all()) and bool((captured > 0.5).all())


@gpu
@built
@both_dtypes
def test_all_test_vectors_give_the_operator_itself(dtype: torch.dtype) -> None:
    size = 97
    operator = mixed_signs(size)
    tests = torch.eye(size, dtype=dtype, device=DEVICE)
    factors = single_pass(tests, operator.to(dtype), size, impl="cuda")
    tolerance = 50 * size * torch.finfo(dtype).eps
    assert_close("H", operator, dense(factors.vectors, factors.values), rtol=tolerance)


@gpu
@built
def test_what_is_not_finite_is_refused() -> None:
    matrix = normal(130, 5)
    matrix[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="non-finite"):
        orthonormalise(matrix, impl="cuda")
    with pytest.raises(NumericalError, match="non-finite"):
        single_pass(normal(130, 5), matrix, 2, impl="cuda")


# --- block norms and windows --------------------------------------------------------------------


@gpu
@built
@both_dtypes
@layouts
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("width", "rank", "count"), [(1, 1, 1), (63, 64, 3), (37, 11, 10), (130, 130, 17)]
)
def test_block_norms(
    width: int, rank: int, count: int, per_token: bool, layout: object, dtype: torch.dtype
) -> None:
    """The reference's signs, without forming the blocks; seeds beyond 32 bits, samples in no order.

    Float32 sums of up to width, then rank, then width terms.
    """
    assert callable(layout)
    tokens, seed = 5, (7 << 40) + 3
    vectors = layout(normal(2, tokens, width, rank, dtype=dtype))
    values = normal(2, tokens if per_token else 1, rank)
    samples = torch.randperm(1000)[:count]
    actual = block_norms(vectors, values, seed, samples, impl="cuda")
    wide = vectors.double().contiguous()
    blocks = (wide * values[..., None, :]) @ wide.mT
    own = torch.arange(tokens, device=DEVICE)[:, None]
    signs = rademacher(seed, samples.to(DEVICE), own, width, torch.float64)
    expected = (signs @ blocks).abs().sum(-1)
    # Rounding errors add up to this share of the sum of all magnitudes, mostly of its root.
    magnitude = ((wide.abs() * values.abs()[..., None, :]) @ wide.abs().mT).sum((-2, -1))
    bound = (2 * width + rank) * torch.finfo(dtype).eps
    assert actual.dtype == dtype and actual.shape == (2, tokens, count)
    scaled = expected / magnitude[..., None], actual / magnitude[..., None]
    assert_close("S", *scaled, rtol=0.0, atol=bound)


@gpu
@built
@both_dtypes
@pytest.mark.parametrize("masked", [False, True])
def test_window_mean(masked: bool, dtype: torch.dtype) -> None:
    windows, rows, length, tokens = 5, 3, 63, 130
    index = torch.stack([torch.randperm(tokens)[:length].sort().values for _ in range(windows)])
    index = index.to(DEVICE)
    values = normal(windows, rows, length, dtype=dtype)
    counted = normal(windows, length) > 0 if masked else None
    if counted is not None:
        values = values * counted[:, None]
    expected = window_mean(values.double(), index, tokens, counted, impl="reference")
    actual = window_mean(values, index, tokens, counted, impl="cuda")
    assert actual.dtype == dtype
    assert_close("means", expected, actual, rtol=windows * torch.finfo(dtype).eps)


@gpu
@built
def test_a_window_that_holds_a_token_twice_is_refused() -> None:
    with pytest.raises(InputError, match="hold some twice"):
        index = torch.tensor([[0, 1], [1, 1]], device=DEVICE)
        window_mean(normal(2, 1, 2), index, 3, impl="cuda")


# --- without a device ---------------------------------------------------------------------------


def test_asking_for_what_is_missing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"impl='cuda' cannot take cpu torch\.float32"):
        orthonormalise(torch.ones(3, 1), impl="cuda")


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_launch_without_a_device_says_what_is_missing() -> None:
    matrix, small = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    arrays = cuda.array(matrix), cuda.array(small), cuda.array(torch.empty_like(matrix))
    with pytest.raises(RuntimeError, match=r"combine could not run: .*expected a CUDA device"):
        cuda.module().combine(0, 0, *arrays)


@built
def test_arrays_that_do_not_fit_are_refused() -> None:
    matrix, small = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 3, 2, dtype=torch.float64)
    call = cuda.module().combine
    with pytest.raises(ValueError, match=r"small of shape \[1, 1, 3, 2\].*expected shape"):
        call(0, 0, cuda.array(matrix), cuda.array(small), cuda.array(matrix))
    with pytest.raises(ValueError, match=r"tall of shape .*expected 4 dimensions"):
        call(0, 0, cuda.array(matrix[0]), cuda.array(small), cuda.array(matrix))
    small = small[:, :, :2]
    with pytest.raises(ValueError, match=r"result of shape .*expected contiguous numbers"):
        spread = torch.ones(1, 1, 2, 4).mT
        call(0, 0, cuda.array(matrix), cuda.array(small), cuda.array(spread))
    with pytest.raises(ValueError, match=r"small of shape .*expected 8 bytes a number"):
        call(0, 0, cuda.array(matrix), cuda.array(small.float()), cuda.array(matrix))

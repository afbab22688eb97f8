"""Low-rank approximation of symmetric indefinite operators, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast import InputError, NumericalError
from heat_fast.kernels.low_rank import (
    Factors,
    block_norms,
    orthonormalise,
    product,
    quality,
    single_pass,
    two_pass,
)
from heat_fast.kernels.rademacher import rademacher

SIZE = 211
RANK = 23

# Every test runs natively and by the reference.
pytestmark = pytest.mark.usefixtures("kernels")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def rotation(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def symmetric(spectrum: Tensor) -> Tensor:
    """A dense matrix with that spectrum, zeros beyond it."""
    basis = rotation(SIZE, len(spectrum))
    return basis * spectrum @ basis.mT


def mixed_signs(magnitudes: Tensor) -> Tensor:
    return magnitudes.double() * torch.where(torch.arange(len(magnitudes)) % 3 == 1, -1.0, 1.0)


def sketch(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return rademacher(1, torch.arange(count), torch.tensor(0), SIZE, dtype).mT


def dense(factors: Factors) -> Tensor:
    vectors = factors.vectors.double()
    return vectors * factors.values[..., None, :] @ vectors.mT


# --- orthonormalisation -------------------------------------------------------------------------


def check_qr(label: str, matrix: Tensor, column_rtol: float) -> None:
    """Orthonormal, triangular, and every column recovered relative to its own size."""
    frame, triangle = orthonormalise(matrix)
    count = matrix.shape[-1]
    eps = torch.finfo(matrix.dtype).eps
    gram = frame.double().mT @ frame.double()
    identity = torch.eye(count, dtype=torch.float64).expand_as(gram)
    # The algorithm's own criterion, with as much again for the order of this sum.
    allowed = 8 * count**0.5 * eps + 4 * matrix.shape[-2] ** 0.5 * 2.2e-16
    assert_close(f"{label} Q'Q", identity, gram, rtol=0, atol=allowed)
    assert not triangle.tril(-1).any()
    size = matrix.double().norm(dim=-2, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    product = frame.double() @ triangle / size
    assert_close(f"{label} QR", matrix.double() / size, product, rtol=0, atol=column_rtol)
    assert frame.dtype == matrix.dtype and triangle.dtype == torch.float64


@both_dtypes
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e7, 1e15])
def test_orthonormal_to_working_precision_at_any_condition(
    condition: float, dtype: torch.dtype
) -> None:
    magnitudes = condition ** -torch.linspace(0, 1, RANK, dtype=torch.float64)
    matrix = rotation(SIZE, RANK) * magnitudes @ rotation(RANK, RANK)
    # A rounding of every entry of Q per pass, at most eight.
    check_qr(f"condition {condition:g}", matrix.to(dtype), 8 * torch.finfo(dtype).eps)


@both_dtypes
def test_columns_that_repeat_vanish_or_differ_in_scale(dtype: torch.dtype) -> None:
    columns = torch.randn(SIZE, 5, dtype=dtype)
    matrix = torch.cat(
        [columns, columns, torch.zeros(SIZE, 3, dtype=dtype), 1e-12 * columns, 1e30 * columns], 1
    )
    check_qr("deficient", matrix, 8 * torch.finfo(dtype).eps)


@both_dtypes
def test_nothing_is_served(dtype: torch.dtype) -> None:
    for rows in (20, 391, 760):  # sums of so many equal numbers round alike
        check_qr("zero", torch.zeros(rows, 18, dtype=dtype), 0.0)
    for count in (3, 5, 8, 12):
        for _ in range(10):
            square = torch.randn(count, count, dtype=dtype)
            square[-(count // 3) :] = 0  # what is left has so few dimensions
            check_qr("square", square, 16 * torch.finfo(dtype).eps)


def test_a_batch_is_its_matrices_one_by_one() -> None:
    batch = torch.randn(3, 2, 17, 5, dtype=torch.float64)
    batch[1, 0, :, 2] = 0
    batch[2, 1, :, 3] = batch[2, 1, :, 1]
    check_qr("batch", batch, 1e-14)
    frame, _ = orthonormalise(batch[0, 1])
    assert_close("one", frame, orthonormalise(batch)[0][0, 1], rtol=1e-13)


def test_slices_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(SIZE, RANK, dtype=torch.float64)
    expected = orthonormalise(matrix)
    monkeypatch.setattr("heat_fast.kernels.low_rank.reference._SLICE", 7 * RANK)
    for name, one, other in zip("QR", expected, orthonormalise(matrix), strict=True):
        assert_close(name, one, other, rtol=1e-13)


def test_orthonormalising_more_columns_than_rows_is_refused() -> None:
    with pytest.raises(InputError, match="6 columns of 5 rows"):
        orthonormalise(torch.randn(5, 6))


# --- the two schemes ----------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("passes", [1, 2])
def test_an_operator_of_low_rank_is_recovered(passes: int, dtype: torch.dtype) -> None:
    """Rank 20 of 23, indefinite, condition 1e7: exact up to the rounding of the products."""
    operator = symmetric(mixed_signs(10.0 ** -torch.linspace(0, 7, 20))).to(dtype)
    tests = sketch(2 * RANK, dtype)
    images = operator @ tests
    factors = (
        single_pass(tests, images, RANK)
        if passes == 1
        else two_pass(images, lambda frame: operator @ frame, RANK)
    )
    eps = torch.finfo(dtype).eps
    # Products of length M, taken through an inverse with as many roundings again.
    assert_close("H", operator, dense(factors), rtol=SIZE**0.5 * 8 * eps)
    gram = factors.vectors.double().mT @ factors.vectors.double()
    assert_close("U'U", torch.eye(RANK), gram, rtol=0, atol=64 * RANK**0.5 * eps)
    magnitudes = factors.values.abs()
    assert torch.equal(magnitudes, magnitudes.sort(descending=True).values)


@pytest.mark.parametrize("decay", [1.0, 2.0])
def test_the_error_is_near_the_best_possible(decay: float) -> None:
    """In the mean over five sketches, as a multiple of the best rank-k error.

    Twice the rank in test vectors costs the two-pass scheme at most sqrt(1 + k / (s - k - 1)) < 1.5
    (Halko, Martinsson and Tropp 2011, Theorem 10.5) before its core is truncated; the single pass
    has a factor of the same kind more.
    """
    spectrum = mixed_signs(torch.arange(1, SIZE + 1) ** -decay)
    operator, best = symmetric(spectrum), float(spectrum[RANK:].norm())
    errors = []
    for seed in range(5):
        tests = rademacher(seed, torch.arange(2 * RANK), torch.tensor(0), SIZE, torch.float64).mT
        images = operator @ tests
        found = single_pass(tests, images, RANK), two_pass(images, lambda q: operator @ q, RANK)
        errors.append([float((operator - dense(factors)).norm()) / best for factors in found])
    one, two = torch.tensor(errors).mean(0).tolist()
    print(f"decay {decay}: single pass {one:.2f}, two passes {two:.2f} times the best error")
    assert 1 <= two < one < 2.5
    assert two < 1.5


def test_a_truncated_core_is_what_keeps_an_indefinite_operator_stable() -> None:
    """Among 60 sketches the worst error stays of the operator's size; with s = k it does not."""
    operator = symmetric(mixed_signs(torch.ones(SIZE)))
    worst = {}
    for count in (RANK, 2 * RANK):
        errors = []
        for seed in range(60):
            signs = rademacher(seed, torch.arange(count), torch.tensor(0), SIZE, torch.float64)
            factors = single_pass(signs.mT, operator @ signs.mT, RANK)
            errors.append(float((operator - dense(factors)).norm() / operator.norm()))
        worst[count] = max(errors)
    print(f"worst relative errors: {worst}")
    assert worst[2 * RANK] < 3
    assert worst[RANK] > 3 * worst[2 * RANK]


@pytest.mark.parametrize("passes", [1, 2])
def test_all_test_vectors_give_the_operator_itself(passes: int) -> None:
    """With s = k = M, dependent test vectors among them, and leading dimensions."""
    operators = torch.stack([symmetric(mixed_signs(torch.rand(SIZE) + 0.1)) for _ in range(2)])
    tests = torch.eye(SIZE, dtype=torch.float64)
    images = operators @ tests
    factors = (
        single_pass(tests, images, SIZE)
        if passes == 1
        else two_pass(images, lambda frame: operators @ frame, SIZE)
    )
    assert_close("H", operators, dense(factors), rtol=1e-12)
    again = torch.cat([tests[:, :30], tests[:, :30]], 1)
    doubled = single_pass(again, operators @ again, 60)
    assert_close(
        "repeats",
        dense(single_pass(again[:, :30], images[..., :30], 60)),
        dense(doubled),
        rtol=1e-9,
    )


def test_a_zero_operator_has_rank_zero() -> None:
    tests = sketch(2 * RANK)
    zero = torch.zeros_like(tests)
    for factors in (single_pass(tests, zero, RANK), two_pass(zero, torch.zeros_like, RANK)):
        assert not factors.values.any()
        assert [float(part) for part in quality(zero, product(factors, tests))] == [0.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    tests = sketch(2 * RANK)
    images = tests.clone()
    images[3, 4] = value
    with pytest.raises(NumericalError, match="non-finite"):
        single_pass(tests, images, RANK)
    with pytest.raises(NumericalError, match="non-finite"):
        two_pass(tests, lambda frame: frame * value, RANK)
    with pytest.raises(NumericalError, match="non-finite"):
        orthonormalise(images)


def test_quality_converges_to_the_true_shares() -> None:
    """Over 4,000 probes Hutchinson's relative error is about sqrt(2 / 4000), 2 %."""
    operator = symmetric(mixed_signs(torch.arange(1, SIZE + 1) ** -1.0))
    tests = sketch(2 * RANK)
    factors = single_pass(tests, operator @ tests, RANK)
    probes = rademacher(5, torch.arange(4000), torch.tensor(0), SIZE, torch.float64).mT
    residual, captured = quality(operator @ probes, product(factors, probes))
    whole = operator.norm()
    true = float((operator - dense(factors)).norm() / whole)
    assert abs(float(residual) / true - 1) < 0.06
    share = float((factors.values.norm() / whole).square())
    assert abs(float(captured) / share - 1) < 0.06


# --- block norms --------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("per_token", [False, True])
def test_block_norms_are_those_of_the_formed_blocks(per_token: bool, dtype: torch.dtype) -> None:
    targets, tokens, width, rank = 2, 7, 37, 11
    vectors = torch.randn(targets, tokens, width, rank, dtype=dtype)
    values = torch.randn(targets, tokens if per_token else 1, rank, dtype=torch.float64)
    samples = torch.tensor([4, 0, 9])
    actual = block_norms(vectors, values, 3, samples)
    rows = vectors.double()
    blocks = rows * values[..., None, :] @ rows.mT
    signs = rademacher(3, samples, torch.arange(tokens)[:, None], width, torch.float64)
    expected = (signs @ blocks).abs().sum(-1)
    assert actual.dtype == dtype
    assert_close("S", expected, actual, rtol=width * rank * torch.finfo(dtype).eps)


def test_block_norms_do_not_depend_on_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(7, 5, 3, dtype=torch.float64)
    values, samples = torch.randn(1, 3, dtype=torch.float64), torch.arange(4)
    expected = block_norms(vectors, values, 0, samples)
    monkeypatch.setattr("heat_fast.kernels.low_rank.reference._SLICE", 1)
    assert torch.equal(expected, block_norms(vectors, values, 0, samples))

"""Low-rank factors of a symmetric operator: one door to their implementations.

Shapes and types are checked here, so that the implementations need not: a tall matrix is
`[..., M, s]`, floating point, without empty dimensions. Numbers that are not finite raise
`NumericalError` wherever they come up. `impl`: see `heat_fast.kernels.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heat_fast.errors import InputError, NumericalError
from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.low_rank import cuda, native, reference
from heat_fast.kernels.low_rank.reference import Factors

# The largest rank whose factors' rows fit into the registers of Triton's kernel.
_MAX_RANK = 128

_HOMES = {"reference": reference, "native": native, "cuda": cuda}


def _home(impl: str | None, *tensors: Tensor) -> Any:
    """The module that runs the step on these tensors."""
    return _HOMES[implementation("low_rank", impl, *tensors, offers=("native", "cuda"))]


def single_pass(
    tests: Tensor,
    images: Tensor,
    rank: int,
    precision: float | None = None,
    *,
    impl: str | None = None,
) -> Factors:
    """`H_k` from test vectors `T [..., M, s]` and their images `Y = H T [..., M, s]` alone.

    `tests` broadcasts to the leading dimensions of `images`; k is `rank`, at most s. `precision`:
    relative error of the products, by default that of their dtype; core eigenvalues that it drowns
    are cut off. The vectors have the dtype of the images.

    Raises `NumericalError` for non-finite numbers, `InputError` for shapes that do not fit.

    Example:
        >>> H = torch.diag(torch.tensor([3.0, -2.0, 1e-3, 0.0, 0.0]).double())
        >>> tests = torch.randn(5, 4, dtype=torch.float64)
        >>> single_pass(tests, H @ tests, 2).values.round(decimals=2).tolist()
        [3.0, -2.0]
    """
    _check_tall(tests, images)
    _check_beside(tests, images)
    rank = _rank(rank, images)
    if precision is None:
        precision = torch.finfo(images.dtype).eps
    common = torch.promote_types(tests.dtype, images.dtype)
    wide = tests.to(common), images.to(common)
    factors = _home(impl, *wide).single_pass(*wide, rank, precision)
    return Factors(factors.vectors.to(images.dtype), factors.values)


def two_pass(
    images: Tensor, product: Callable[[Tensor], Tensor], rank: int, *, impl: str | None = None
) -> Factors:
    """`H_k` from images `Y = H T [..., M, s]` and `product(Q) = H Q` of their orthonormal basis.

    Twice the products of the single pass, and the best rank-k approximation within the span of Y.

    Raises `NumericalError` for non-finite numbers, `InputError` for shapes that do not fit.
    """
    frame, _ = orthonormalise(images, impl=impl)
    rank = _rank(rank, images)
    again = product(frame)
    _check_tall(again)
    if again.shape != frame.shape:
        _refuse(again, f"the images of a basis of shape {tuple(frame.shape)}")
    common = torch.promote_types(frame.dtype, again.dtype)
    wide = frame.to(common), again.to(common)
    factors = _home(impl, *wide).second_pass(*wide, rank)
    return Factors(factors.vectors.to(images.dtype), factors.values)


def orthonormalise(matrix: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """`Q [..., M, s]` with orthonormal columns and upper triangular `R [..., s, s]`, `A = Q R`.

    Columns of any scale and matrices of any condition are served. Where A has lower rank, the
    superfluous columns of Q are arbitrary, as in Householder's method. R is in float64.

    Raises `NumericalError` for non-finite numbers, `InputError` for more columns than rows.

    Example:
        >>> Q, R = orthonormalise(torch.tensor([[3.0, 1.0], [4.0, 1.0], [0.0, 1e-6]]))
        >>> bool((Q.T @ Q - torch.eye(2)).abs().max() < 1e-6)
        True
    """
    _check_tall(matrix)
    rows, count = matrix.shape[-2:]
    if count > rows:
        raise InputError(
            f"{count} columns of {rows} rows cannot be orthonormal: expected at most as many "
            "columns as rows. Pass fewer columns."
        )
    frame, triangle = _home(impl, matrix).orthonormalise(matrix)
    return frame, triangle


def product(factors: Factors, directions: Tensor, *, impl: str | None = None) -> Tensor:
    """`H_k Z [..., M, p]` for `Z [..., M, p]`, whose leading dimensions broadcast."""
    vectors, values = factors.vectors, factors.values
    _check_tall(vectors, directions)
    pairs = zip(reversed(vectors.shape[:-2]), reversed(directions.shape[:-2]), strict=False)
    fits = all(one == other or 1 in (one, other) for one, other in pairs)
    if vectors.shape[-2] != directions.shape[-2] or not fits:
        _refuse(directions, f"the rows and leading dimensions of factors {tuple(vectors.shape)}")
    if values.shape != (*vectors.shape[:-2], vectors.shape[-1]):
        _refuse(vectors, f"one for each of the values {tuple(values.shape)}")
    directions = directions.to(vectors.dtype)
    home = _home(impl, vectors, directions)
    images: Tensor = home.combine(vectors, home.gram(vectors, directions) * values[..., None])
    return images


def quality(exact: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """How much of H an approximation holds, from `H Z` and `H_k Z [..., M, p]` of probes that it
    has not seen: the residual `|H - H_k|_F / |H|_F` and the captured energy `|H_k|_F^2 / |H|_F^2`.

    By Hutchinson's estimate `|A|_F^2 = E |A z|^2` for Rademacher z, the same probes above and below
    the line; both `[...]`, in float64. A zero operator has residual 0 and captured energy 1.

    Raises `NumericalError` for non-finite numbers, `InputError` for shapes that do not fit.
    """
    _check_tall(exact, found)
    _check_beside(found, exact)
    reference.finite(exact)
    reference.finite(found)
    return reference.quality(exact, found)


def block_norms(
    vectors: Tensor, values: Tensor, seed: int, samples: Tensor, *, impl: str | None = None
) -> Tensor:
    """`|U_i diag(w) U_i' r|_1` for every token i and probe r, without forming H.

    `vectors [..., N, d, k]`: the rows of U by tokens; `values [..., N or 1, k]`; `samples [m]`:
    numbers of the probes, whose signs are `rademacher(seed, sample, token, d)`, made where they are
    used. Norms `[..., N, m]` in the vectors' dtype.

    Raises `NumericalError` for non-finite results, `InputError` for shapes that do not fit.
    """
    _check_tall(vectors)
    kinds = vectors.dim() >= 3 and values.is_floating_point() and samples.dim() == 1
    if not kinds or samples.is_floating_point() or not _expands(values, vectors):
        raise InputError(
            f"vectors {tuple(vectors.shape)}, values {tuple(values.shape)} ({values.dtype}), "
            f"samples {tuple(samples.shape)} ({samples.dtype}): expected [..., N, d, k], "
            "[..., N or 1, k] and the integers [m]. Check the arguments."
        )
    if len(samples) == 0:
        return vectors.new_empty(*vectors.shape[:-2], 0)
    norms: Tensor = _norms_home(impl, vectors).block_norms(vectors, values, seed, samples)
    if not bool(torch.isfinite(norms).all()):
        raise NumericalError(
            f"block norms that are not finite ({vectors.dtype}): expected finite factors whose "
            "products do not overflow. Check the operator that they belong to."
        )
    return norms


def _norms_home(impl: str | None, vectors: Tensor) -> Any:
    """The same for block norms, which Triton makes where the CUDA module was not built."""
    triton = vectors.dtype == torch.float32 and vectors.shape[-1] <= _MAX_RANK
    offers = ("native", "triton", "cuda") if triton else ("native", "cuda")
    chosen = implementation("block_norms", impl, vectors, offers=offers)
    if chosen == "triton":
        from heat_fast.kernels.low_rank import triton as home

        return home
    return _HOMES[chosen]


def _expands(values: Tensor, vectors: Tensor) -> bool:
    target = (*vectors.shape[:-2], vectors.shape[-1])
    fits = zip(reversed(values.shape), reversed(target), strict=False)
    return 0 < values.dim() <= len(target) and all(size in (1, wanted) for size, wanted in fits)


def _check_tall(*matrices: Tensor) -> None:
    for tall in matrices:
        if tall.dim() < 2 or 0 in tall.shape or not tall.is_floating_point():
            _refuse(tall, "[..., M, s] of floating point, without empty dimensions")


def _check_beside(tall: Tensor, other: Tensor) -> None:
    """The same rows and columns, and leading dimensions that broadcast to the other's."""
    lead, wanted = tall.shape[:-2], other.shape[:-2]
    pairs = zip(reversed(lead), reversed(wanted), strict=False)
    fits = len(lead) <= len(wanted) and all(size in (1, target) for size, target in pairs)
    if tall.shape[-2:] != other.shape[-2:] or not fits:
        _refuse(tall, f"a shape that broadcasts to {tuple(other.shape)}")


def _refuse(tall: Tensor, expected: str) -> None:
    raise InputError(
        f"a tall matrix of shape {tuple(tall.shape)} ({tall.dtype}): expected {expected}. Check "
        "the arguments."
    )


def _rank(rank: int, images: Tensor) -> int:
    """The rank that s test vectors can carry."""
    rows, count = images.shape[-2:]
    if rank < 1 or min(rank, count) > rows:
        raise InputError(
            f"rank {rank} with {count} test vectors of {rows} rows: expected a rank of at least 1 "
            "and at most the rows. Choose another rank."
        )
    return min(rank, count)

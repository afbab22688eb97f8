"""Low-rank approximation of a symmetric, indefinite operator from its products, in plain torch.

`H [M, M]` is known by its products with `s > k` test vectors `T [M, s]`, `Y = H T`. With
`P = T (T' T)^(-1/2)`, the test vectors made orthonormal:

    single pass    C = P' H P = V diag(l) V';  H_k = (H P V_k) diag(1 / l_k) (H P V_k)'
    two passes     Q = orth(Y),  Q' H Q = V diag(l) V';  H_k = (Q V_k) diag(l_k) (Q V_k)'

where k takes the eigenvalues of largest magnitude. The single pass is the generalised Nystroem
approximation with its core truncated to rank k (Park and Nakatsukasa, "Randomized low-rank
approximation for symmetric indefinite matrices", 2023): an indefinite core has eigenvalues near
zero by accident, and inverting those ruins the plain scheme with s = k; among s = 2k they are the
ones that are cut off. Both come as `U diag(w) U'` with orthonormal U, `|w|` descending.

Tall matrices are `[..., M, s]`. Their Gram matrices and all small matrices are in float64, in
slices of rows; what is tall keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heat_fast.errors import InputError, NumericalError
from heat_fast.kernels.rademacher import rademacher

# Numbers in a slice of rows that is worked on in float64.
_SLICE = 1 << 20
# Rounding noise needs four passes to become orthonormal; the last one only looks.
_PASSES = 8
# Eigenvalues of T' T below this share of the largest belong to test vectors that repeat others.
_DEPENDENT = 1e-10


@dataclass(frozen=True)
class Factors:
    """`H_k = U diag(w) U'`: `vectors [..., M, k]`, `values [..., k]` in float64.

    The vectors are orthonormal, the values of descending magnitude; values that are exactly 0 fill
    up an operator whose rank is below k.
    """

    vectors: Tensor
    values: Tensor

    def product(self, directions: Tensor) -> Tensor:
        """`H_k Z [..., M, p]` for `Z [..., M, p]`."""
        inner = _gram(self.vectors, directions) * self.values[..., None]
        return _combine(self.vectors, inner)


def single_pass(
    tests: Tensor, images: Tensor, rank: int, precision: float | None = None
) -> Factors:
    """`H_k` from test vectors `T [..., M, s]` and their images `Y = H T [..., M, s]` alone.

    `tests` broadcasts to the leading dimensions of `images`. `precision`: relative error of the
    products, by default that of their dtype; core eigenvalues that it drowns are cut off.

    Raises `NumericalError` for non-finite numbers, `InputError` for shapes that do not fit.

    Example:
        >>> H = torch.diag(torch.tensor([3.0, -2.0, 1e-3, 0.0, 0.0]).double())
        >>> tests = torch.randn(5, 4, dtype=torch.float64)
        >>> single_pass(tests, H @ tests, 2).values.round(decimals=2).tolist()
        [3.0, -2.0]
    """
    _check(images, rank)
    _check(tests, rank)
    whiten = _inverse_root(_gram(tests, tests))
    core = whiten.mT @ _gram(tests, images) @ whiten
    values, small = _leading(core, rank)
    if precision is None:
        precision = torch.finfo(images.dtype).eps
    known = values.abs() > 4 * precision * values.abs().amax(-1, keepdim=True)
    values = torch.where(known, values, 0.0)
    # Divided by their eigenvalues the columns are near orthonormal, whatever the spectrum is.
    inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
    frame, triangle = orthonormalise(_combine(images, whiten @ small * inverse[..., None, :]))
    values, turn = _leading(triangle * values[..., None, :] @ triangle.mT, rank)
    return Factors(_combine(frame, turn), values)


def two_pass(images: Tensor, product: Callable[[Tensor], Tensor], rank: int) -> Factors:
    """`H_k` from images `Y = H T [..., M, s]` and `product(Q) = H Q` of their orthonormal basis.

    Twice the products of the single pass, and the best rank-k approximation within the span of Y.

    Raises `NumericalError` for non-finite numbers, `InputError` for shapes that do not fit.
    """
    _check(images, rank)
    frame, _ = orthonormalise(images)
    again = product(frame)
    _check(again, rank)
    values, small = _leading(_gram(frame, again), rank)
    return Factors(_combine(frame, small), values)


def quality(exact: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """How much of H an approximation holds, from `H Z` and `H_k Z [..., M, p]` of probes that it
    has not seen: the residual `|H - H_k|_F / |H|_F` and the captured energy `|H_k|_F^2 / |H|_F^2`.

    By Hutchinson's estimate `|A|_F^2 = E |A z|^2` for Rademacher z, the same probes above and below
    the line; both `[...]`. A zero operator has residual 0 and captured energy 1.
    """
    exact, found = exact.double(), found.double()

    def energy(values: Tensor) -> Tensor:
        return values.square().sum((-2, -1))

    whole = energy(exact)
    some = whole > 0
    whole = torch.where(some, whole, 1.0)
    residual = torch.where(some, energy(exact - found).div(whole).sqrt(), 0.0)
    return residual, torch.where(some, energy(found) / whole, 1.0)


def block_norms(vectors: Tensor, values: Tensor, seed: int, samples: Tensor) -> Tensor:
    """`|U_i diag(w) U_i' r|_1` for every token i and probe r, without forming H.

    `vectors [..., N, d, k]`: the rows of U by tokens; `values [..., N or 1, k]`; `samples [m]`:
    numbers of the probes, whose signs are `rademacher(seed, sample, token, d)`. Norms
    `[..., N, m]` in the vectors' dtype.
    """
    tokens, width = vectors.shape[-3:-1]
    values = values.to(vectors.dtype).expand(*vectors.shape[:-2], -1)
    each = vectors.shape[:-3].numel() * width * max(len(samples), vectors.shape[-1])
    norms = []
    for part in _slices(tokens, each):
        own = torch.arange(part.start, part.stop, device=vectors.device)[:, None]
        signs = rademacher(seed, samples.to(vectors.device), own, width, vectors.dtype)
        rows = vectors[..., part, :, :]
        inner = (signs @ rows) * values[..., part, None, :]
        norms.append((inner @ rows.mT).abs().sum(-1))
    return torch.cat(norms, dim=-2)


def orthonormalise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`Q [..., M, s]` with orthonormal columns and upper triangular `R [..., s, s]`, `A = Q R`.

    Shifted Cholesky QR (Fukaya et al. 2020), repeated until `Q' Q` is the identity to working
    precision. The Gram matrix is scaled to a unit diagonal and accumulated in float64, so that
    columns of any scale and float32 matrices of any condition are served. Where A has lower rank,
    the superfluous columns of Q are arbitrary, as in Householder's method. R is in float64.

    Raises `NumericalError` for non-finite numbers, `InputError` for more columns than rows.

    Example:
        >>> Q, R = orthonormalise(torch.tensor([[3.0, 1.0], [4.0, 1.0], [0.0, 1e-6]]))
        >>> bool((Q.T @ Q - torch.eye(2)).abs().max() < 1e-6)
        True
    """
    rows, count = matrix.shape[-2:]
    _check(matrix, 1)
    if count > rows:
        raise InputError(
            f"{count} columns of {rows} rows cannot be orthonormal: expected at most as many "
            "columns as rows. Pass fewer columns."
        )
    identity = torch.eye(count, dtype=torch.float64, device=matrix.device)
    peak = matrix.abs().amax(-2, keepdim=True)
    frame = matrix / torch.where(peak > 0, peak, 1.0)
    triangle = identity * peak.double()
    double = torch.finfo(torch.float64).eps
    # A rounding of the entries, and what the sums of the Gram matrix themselves round off.
    allowed = 4 * count**0.5 * torch.finfo(matrix.dtype).eps + 2 * rows**0.5 * double
    shift = 4 * count * double
    for attempt in range(_PASSES):
        gram = _gram(frame, frame)
        length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        empty = length == 0
        if bool(empty.any()):
            frame = _filled(frame, empty, attempt)
            triangle = torch.where(empty[..., None], 0.0, triangle)
            continue
        if bool((gram - identity).abs().max() <= allowed):
            return frame, triangle
        cosines = gram / (length[..., :, None] * length[..., None, :])
        # Diagonally dominant is positive definite for certain; anything else gets the shift.
        sure = (cosines - identity).abs().sum(-1).amax(-1) < 0.5
        lift = torch.where(sure, 0.0, shift)[..., None, None]
        upper = _cholesky(cosines + lift * identity, shift * identity) * length[..., None, :]
        frame = _solved(frame, upper)
        triangle = upper @ triangle
    raise NumericalError(
        f"{count} columns of {rows} rows were not orthonormal after {_PASSES} passes "
        f"({matrix.dtype}): expected finite numbers that do not underflow. Scale them."
    )


def _cholesky(matrix: Tensor, lift: Tensor) -> Tensor:
    """The upper triangular factor, lifted tenfold more until it exists."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix, upper=True)
    while bool(info.any()):
        lift = 10 * lift
        matrix = torch.where(info[..., None, None] > 0, matrix + lift, matrix)
        factor, info = torch.linalg.cholesky_ex(matrix, upper=True)
    return factor


def _filled(frame: Tensor, empty: Tensor, attempt: int) -> Tensor:
    """Columns that vanish, replaced by signs."""
    rows, count = frame.shape[-2:]
    columns = torch.arange(count, device=frame.device)
    tries = torch.tensor(attempt, device=frame.device)
    signs = rademacher(0, columns, tries, rows, frame.dtype)
    return torch.where(empty[..., None, :], signs.mT, frame)


def _solved(frame: Tensor, upper: Tensor) -> Tensor:
    """`A R^-1`, in float64 slices."""
    result = torch.empty_like(frame)
    for part in _rows(frame):
        rows = frame[..., part, :].double()
        result[..., part, :] = torch.linalg.solve_triangular(upper, rows, upper=True, left=False)
    return result


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """`A' B` in float64, for tall matrices of any dtype whose leading dimensions broadcast."""
    total: Tensor | None = None
    for part in _rows(left if left.numel() > right.numel() else right):
        product = left[..., part, :].double().mT @ right[..., part, :].double()
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _combine(tall: Tensor, small: Tensor) -> Tensor:
    """`A B` in the dtype of the tall matrix, multiplied in float64."""
    parts = [(tall[..., part, :].double() @ small).to(tall.dtype) for part in _rows(tall)]
    return torch.cat(parts, dim=-2)


def _rows(tall: Tensor) -> Iterator[slice]:
    rows = tall.shape[-2]
    return _slices(rows, tall.numel() // max(1, rows))


def _slices(total: int, each: int) -> Iterator[slice]:
    step = max(1, _SLICE // max(1, each))
    for low in range(0, total, step):
        yield slice(low, min(low + step, total))


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues `[..., k]` of largest magnitude and their vectors, k at most the order."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    order = values.abs().argsort(dim=-1, descending=True, stable=True)[..., :rank]
    chosen = order[..., None, :].expand(*vectors.shape[:-1], -1)
    return values.gather(-1, order), vectors.gather(-1, chosen)


def _inverse_root(gram: Tensor) -> Tensor:
    """`G^(-1/2)` on the range of G."""
    values, vectors = torch.linalg.eigh(gram)
    good = values > _DEPENDENT * values.amax(-1, keepdim=True)
    scale = torch.where(good, torch.where(good, values, 1.0).rsqrt(), 0.0)
    root: Tensor = vectors * scale[..., None, :] @ vectors.mT
    return root


def _check(tall: Tensor, rank: int) -> None:
    if rank < 1 or tall.ndim < 2 or 0 in tall.shape:
        raise InputError(
            f"a tall matrix of shape {tuple(tall.shape)} with rank {rank}: expected [..., M, s] "
            "without empty dimensions and a rank of at least 1. Check the arguments."
        )
    if not bool(torch.isfinite(tall).all()):
        raise NumericalError(
            f"non-finite values in a tall matrix ({tall.dtype}): expected finite numbers. Check "
            "the operator whose products they are."
        )

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

from heat_fast.errors import NumericalError
from heat_fast.kernels.rademacher import rademacher
from heat_fast.kernels.rademacher.reference import counter_words

# Numbers in a slice of rows that is worked on in float64.
_SLICE = 1 << 20
# Rounding noise needs four passes to become orthonormal; the last one only looks.
_PASSES = 8
# Eigenvalues of T' T below this share of the largest belong to test vectors that repeat others.
_DEPENDENT = 1e-10

NOT_FINITE = (
    "non-finite values in a tall matrix ({}): expected finite numbers. Check the operator whose "
    "products they are."
)
OUT_OF_RANGE = (
    "a tall matrix ({}) whose sums overflow or underflow: expected finite factors. Scale it."
)


@dataclass(frozen=True)
class Factors:
    """`H_k = U diag(w) U'`: `vectors [..., M, k]`, `values [..., k]` in float64.

    The vectors are orthonormal, the values of descending magnitude; values that are exactly 0 fill
    up an operator whose rank is below k.
    """

    vectors: Tensor
    values: Tensor


@dataclass(frozen=True)
class Primitives:
    """What touches tall matrices: all that another implementation of the algorithm replaces.

    `gram(A, B)`: `A' B` in float64. `combine(A, B)`: `A B` in A's dtype, for a small B in float64.
    `solve(A, R)`: `A R^-1` likewise, for an upper triangular R.
    """

    gram: Callable[[Tensor, Tensor], Tensor]
    combine: Callable[[Tensor, Tensor], Tensor]
    solve: Callable[[Tensor, Tensor], Tensor]


def single_pass(
    tests: Tensor, images: Tensor, rank: int, precision: float, tall: Primitives | None = None
) -> Factors:
    """`H_k` from test vectors `T [..., M, s]` and their images `Y = H T [..., M, s]` alone."""
    tall = tall or TORCH
    finite(tests)
    finite(images)
    whiten = _inverse_root(_in_range(tall.gram(tests, tests), tests))
    core = whiten.mT @ _in_range(tall.gram(tests, images), images) @ whiten
    values, small = _leading(_in_range(core, images), rank)
    known = values.abs() > 4 * precision * values.abs().amax(-1, keepdim=True)
    values = torch.where(known, values, 0.0)
    # Divided by their eigenvalues the columns are near orthonormal, whatever the spectrum is.
    inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
    near = tall.combine(images, whiten @ small * inverse[..., None, :])
    frame, triangle = orthonormalise(near, tall)
    values, turn = _leading(triangle * values[..., None, :] @ triangle.mT, rank)
    return Factors(tall.combine(frame, turn), values)


def second_pass(
    frame: Tensor, images: Tensor, rank: int, tall: Primitives | None = None
) -> Factors:
    """`H_k` from an orthonormal basis `Q [..., M, s]` and its images `H Q [..., M, s]`."""
    tall = tall or TORCH
    finite(images)
    values, small = _leading(_in_range(tall.gram(frame, images), images), rank)
    return Factors(tall.combine(frame, small), values)


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
    """`|U_i diag(w) U_i' r|_1` for every token i and probe r, `[..., N, m]`."""
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


def orthonormalise(matrix: Tensor, tall: Primitives | None = None) -> tuple[Tensor, Tensor]:
    """`A = Q R` by shifted Cholesky QR (Fukaya et al. 2020), repeated until `Q' Q` is the identity
    to working precision.

    The Gram matrix is scaled to a unit diagonal and accumulated in float64, so that columns of any
    scale and float32 matrices of any condition are served.
    """
    tall = tall or TORCH
    rows, count = matrix.shape[-2:]
    finite(matrix)
    identity = torch.eye(count, dtype=torch.float64, device=matrix.device)
    peak = matrix.abs().amax(-2, keepdim=True)
    frame = matrix / torch.where(peak > 0, peak, 1.0)
    triangle = identity * peak.double()
    double = torch.finfo(torch.float64).eps
    # A rounding of the entries, and what the sums of the Gram matrix themselves round off.
    allowed = 4 * count**0.5 * torch.finfo(matrix.dtype).eps + 2 * rows**0.5 * double
    shift = 4 * count * double
    # A pass over a frame this near leaves its rounding alone.
    near = torch.finfo(matrix.dtype).eps ** 0.5
    solved, before = False, float("inf")
    for attempt in range(_PASSES):
        squares = tall.gram(frame, frame)
        length = squares.diagonal(dim1=-2, dim2=-1).sqrt()
        empty = length == 0
        if solved:
            empty |= _swallowed(length, triangle, torch.finfo(matrix.dtype).eps)
        if bool(empty.any()):
            frame = _filled(frame, empty, attempt)
            triangle = torch.where(empty[..., None], 0.0, triangle)
            before = float("inf")
            continue
        distance = float((squares - identity).abs().max())
        if distance <= allowed or before <= near:
            return frame, _in_range(triangle, matrix)
        before = distance
        cosines = squares / (length[..., :, None] * length[..., None, :])
        # Diagonally dominant is positive definite for certain; anything else gets the shift.
        sure = (cosines - identity).abs().sum(-1).amax(-1) < 0.5
        lift = torch.where(sure, 0.0, shift)[..., None, None]
        upper = _cholesky(cosines + lift * identity, shift * identity) * length[..., None, :]
        frame = tall.solve(frame, upper)
        solved = True
        triangle = upper @ triangle
    raise NumericalError(OUT_OF_RANGE.format(matrix.dtype))


def _cholesky(matrix: Tensor, lift: Tensor) -> Tensor:
    """The upper triangular factor, lifted tenfold more until it exists."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix, upper=True)
    while bool(info.any()):
        lift = 10 * lift
        matrix = torch.where(info[..., None, None] > 0, matrix + lift, matrix)
        factor, info = torch.linalg.cholesky_ex(matrix, upper=True)
    return factor


def _swallowed(length: Tensor, triangle: Tensor, eps: float) -> Tensor:
    """Columns of which A has nothing more to say: what the shift has left of them is rounding
    noise, and that may be parallel to another column for ever."""
    peaks = triangle.abs().amax(-2, keepdim=True).clamp_min(torch.finfo(triangle.dtype).tiny)
    share = (triangle.abs() / peaks).amax(-1)
    return (length < 1e-3) & (length * share <= eps / 4)


def _filled(frame: Tensor, empty: Tensor, attempt: int) -> Tensor:
    """Columns that vanish, replaced by uniform numbers.

    Signs would often be parallel where few dimensions are left.
    """
    rows, columns = (torch.arange(size, device=frame.device) for size in frame.shape[-2:])
    tries = torch.tensor(attempt, device=frame.device)
    uniform = counter_words(0, columns, tries, rows[:, None]).double() * 2.0**-31 - 1
    return torch.where(empty[..., None, :], uniform.to(frame.dtype), frame)


def solve(frame: Tensor, upper: Tensor) -> Tensor:
    """`A R^-1`, in float64 slices."""
    result = torch.empty_like(frame)
    for part in _rows(frame):
        rows = frame[..., part, :].double()
        result[..., part, :] = torch.linalg.solve_triangular(upper, rows, upper=True, left=False)
    return result


def gram(left: Tensor, right: Tensor) -> Tensor:
    """`A' B` in float64, for tall matrices of any dtype whose leading dimensions broadcast."""
    total: Tensor | None = None
    for part in _rows(left if left.numel() > right.numel() else right):
        product = left[..., part, :].double().mT @ right[..., part, :].double()
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def combine(tall: Tensor, small: Tensor) -> Tensor:
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


def _inverse_root(squares: Tensor) -> Tensor:
    """`G^(-1/2)` on the range of G."""
    values, vectors = torch.linalg.eigh(squares)
    good = values > _DEPENDENT * values.amax(-1, keepdim=True)
    scale = torch.where(good, torch.where(good, values, 1.0).rsqrt(), 0.0)
    root: Tensor = vectors * scale[..., None, :] @ vectors.mT
    return root


def finite(tall: Tensor) -> None:
    """Raise `NumericalError` for a number that is not finite."""
    if not bool(torch.isfinite(tall).all()):
        raise NumericalError(NOT_FINITE.format(tall.dtype))


def _in_range(small: Tensor, tall: Tensor) -> Tensor:
    if not bool(torch.isfinite(small).all()):
        raise NumericalError(OUT_OF_RANGE.format(tall.dtype))
    return small


TORCH = Primitives(gram, combine, solve)

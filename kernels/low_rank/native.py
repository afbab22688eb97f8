"""The low-rank step by the compiled extension (CPU), one read of a tall matrix for each step.

Shapes are checked by `api.py`. Tall matrices may have any strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heat_fast import native
from heat_fast.errors import NumericalError
from heat_fast.kernels.low_rank.reference import NOT_FINITE, OUT_OF_RANGE, Factors

_REASONS = {"not finite": NOT_FINITE, "range": OUT_OF_RANGE}


def _flat(tall: Tensor, shape: torch.Size) -> Tensor:
    """`[.., M, s]`, broadcast to leading dimensions, as `[B, M, s]`."""
    return tall.expand(*shape, *tall.shape[-2:]).reshape(-1, *tall.shape[-2:])


def _call(function: Any, dtype: torch.dtype, *arguments: Tensor | float) -> None:
    """Call a function of the extension. The tensors that it is given, copies among them, live here
    until it has returned."""
    passed = [native.array(each) if isinstance(each, Tensor) else each for each in arguments]
    reason = function(*passed, native.workspace(torch.float64), torch.get_num_threads())
    if reason:
        raise NumericalError(_REASONS[reason].format(dtype))


def gram(left: Tensor, right: Tensor) -> Tensor:
    """As the reference."""
    shape = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    result = left.new_empty(*shape, left.shape[-1], right.shape[-1], dtype=torch.float64)
    tensors = [_flat(each, shape) for each in (left, right, result)]
    _call(native.module(left.dtype).gram, left.dtype, *tensors)
    return result


def combine(tall: Tensor, small: Tensor) -> Tensor:
    """As the reference."""
    shape = torch.broadcast_shapes(tall.shape[:-2], small.shape[:-2])
    result = tall.new_empty(*shape, tall.shape[-2], small.shape[-1])
    tensors = [_flat(each, shape) for each in (tall, small.double().contiguous(), result)]
    _call(native.module(tall.dtype).combine, tall.dtype, *tensors)
    return result


def orthonormalise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    shape, count = matrix.shape[:-2], matrix.shape[-1]
    frame = torch.empty(matrix.shape, dtype=matrix.dtype)
    triangle = torch.empty(*shape, count, count, dtype=torch.float64)
    tensors = [_flat(each, shape) for each in (matrix, frame, triangle)]
    _call(native.module(matrix.dtype).orthonormalise, matrix.dtype, *tensors)
    return frame, triangle


def single_pass(tests: Tensor, images: Tensor, rank: int, precision: float) -> Factors:
    """As the reference."""
    factors, tensors = _factors(tests, images, rank)
    _call(native.module(images.dtype).single_pass, images.dtype, *tensors, precision)
    return factors


def second_pass(frame: Tensor, images: Tensor, rank: int) -> Factors:
    """As the reference."""
    factors, tensors = _factors(frame, images, rank)
    _call(native.module(images.dtype).second_pass, images.dtype, *tensors)
    return factors


def _factors(tall: Tensor, images: Tensor, rank: int) -> tuple[Factors, list[Tensor]]:
    """Factors to be written, and the tensors of the call that writes them."""
    shape = images.shape[:-2]
    vectors = torch.empty(*images.shape[:-1], rank, dtype=images.dtype)
    values = torch.empty(*shape, rank, dtype=torch.float64)
    tensors = [_flat(each, shape) for each in (tall, images, vectors)]
    return Factors(vectors, values), [*tensors, values.view(-1, rank)]


def block_norms(vectors: Tensor, values: Tensor, seed: int, samples: Tensor) -> Tensor:
    """As the reference."""
    values = values.double().expand(*vectors.shape[:-2], -1)
    norms = vectors.new_empty(*vectors.shape[:-2], len(samples))
    _call(
        native.module(vectors.dtype).block_norms,
        vectors.dtype,
        vectors.reshape(-1, *vectors.shape[-3:]),
        values.reshape(-1, *values.shape[-2:]),
        seed & 0xFFFFFFFFFFFFFFFF,
        samples.to(torch.int64).contiguous(),
        norms.view(-1, *norms.shape[-2:]),
    )
    return norms


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[.., n]`, in no order, and eigenvectors as columns `[.., n, n]`, in float64, of
    the symmetric part of `[.., n, n]`: the eigenproblem inside the factorisations, for tests."""
    order, shape = matrix.shape[-1], matrix.shape[:-2]
    values = torch.empty(*shape, order, dtype=torch.float64)
    rows = torch.empty(*shape, order, order, dtype=torch.float64)
    square = [each.reshape(-1, order, order) for each in (matrix.contiguous(), rows)]
    values_flat = values.view(-1, order)
    function = native.module(torch.float64).symmetric_eigen
    _call(function, matrix.dtype, square[0], values_flat, square[1])
    return values, rows.mT

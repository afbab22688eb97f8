"""The low-rank step by the compiled extension (CPU), one read of a tall matrix for each step.

Shapes are checked by `api.py`. Tall matrices may have any strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast import native
from heat_fast.errors import NumericalError
from heat_fast.kernels.low_rank.reference import NOT_FINITE, OUT_OF_RANGE, Factors

_REASONS = {"not finite": NOT_FINITE, "range": OUT_OF_RANGE}


def _flat(tall: Tensor, shape: torch.Size) -> Tensor:
    """`[.., M, s]`, broadcast to leading dimensions, as `[B, M, s]`."""
    return tall.expand(*shape, *tall.shape[-2:]).reshape(-1, *tall.shape[-2:])


def _finished(reason: str, dtype: torch.dtype) -> None:
    if reason:
        raise NumericalError(_REASONS[reason].format(dtype))


def gram(left: Tensor, right: Tensor) -> Tensor:
    """As the reference."""
    shape = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    result = left.new_empty(*shape, left.shape[-1], right.shape[-1], dtype=torch.float64)
    native.module(left.dtype).gram(
        native.array(_flat(left, shape)),
        native.array(_flat(right, shape)),
        native.array(_flat(result, shape)),
        native.workspace(torch.float64),
        torch.get_num_threads(),
    )
    return result


def combine(tall: Tensor, small: Tensor) -> Tensor:
    """As the reference."""
    shape = torch.broadcast_shapes(tall.shape[:-2], small.shape[:-2])
    result = tall.new_empty(*shape, tall.shape[-2], small.shape[-1])
    native.module(tall.dtype).combine(
        native.array(_flat(tall, shape)),
        native.array(_flat(small.double().contiguous(), shape)),
        native.array(_flat(result, shape)),
        native.workspace(torch.float64),
        torch.get_num_threads(),
    )
    return result


def orthonormalise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    shape, count = matrix.shape[:-2], matrix.shape[-1]
    frame = torch.empty(matrix.shape, dtype=matrix.dtype)
    triangle = torch.empty(*shape, count, count, dtype=torch.float64)
    reason = native.module(matrix.dtype).orthonormalise(
        native.array(_flat(matrix, shape)),
        native.array(_flat(frame, shape)),
        native.array(_flat(triangle, shape)),
        native.workspace(torch.float64),
        torch.get_num_threads(),
    )
    _finished(reason, matrix.dtype)
    return frame, triangle


def single_pass(tests: Tensor, images: Tensor, rank: int, precision: float) -> Factors:
    """As the reference."""
    shape = images.shape[:-2]
    vectors = torch.empty(*images.shape[:-1], rank, dtype=images.dtype)
    values = torch.empty(*shape, rank, dtype=torch.float64)
    reason = native.module(images.dtype).single_pass(
        native.array(_flat(tests, shape)),
        native.array(_flat(images, shape)),
        native.array(_flat(vectors, shape)),
        native.array(values.view(-1, rank)),
        precision,
        native.workspace(torch.float64),
        torch.get_num_threads(),
    )
    _finished(reason, images.dtype)
    return Factors(vectors, values)


def second_pass(frame: Tensor, images: Tensor, rank: int) -> Factors:
    """As the reference."""
    shape = images.shape[:-2]
    vectors = torch.empty(*images.shape[:-1], rank, dtype=images.dtype)
    values = torch.empty(*shape, rank, dtype=torch.float64)
    reason = native.module(images.dtype).second_pass(
        native.array(_flat(frame, shape)),
        native.array(_flat(images, shape)),
        native.array(_flat(vectors, shape)),
        native.array(values.view(-1, rank)),
        native.workspace(torch.float64),
        torch.get_num_threads(),
    )
    _finished(reason, images.dtype)
    return Factors(vectors, values)


def block_norms(vectors: Tensor, values: Tensor, seed: int, samples: Tensor) -> Tensor:
    """As the reference."""
    shape = vectors.shape[:-2]
    values = values.double().expand(*shape, -1)
    norms = vectors.new_empty(*shape, len(samples))
    native.module(vectors.dtype).block_norms(
        native.array(vectors.reshape(-1, *vectors.shape[-3:])),
        native.array(values.reshape(-1, *values.shape[-2:])),
        seed & 0xFFFFFFFFFFFFFFFF,
        native.array(samples.to(torch.int64).contiguous()),
        native.array(norms.view(-1, *norms.shape[-2:])),
        native.workspace(torch.float64),
        torch.get_num_threads(),
    )
    return norms


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[.., n]`, in no order, and eigenvectors as columns `[.., n, n]`, in float64, of
    the symmetric part of `[.., n, n]`: the eigenproblem inside the factorisations, for tests."""
    order, shape = matrix.shape[-1], matrix.shape[:-2]
    values = torch.empty(*shape, order, dtype=torch.float64)
    rows = torch.empty(*shape, order, order, dtype=torch.float64)
    reason = native.module(torch.float64).symmetric_eigen(
        native.array(matrix.reshape(-1, order, order).contiguous()),
        native.array(values.view(-1, order)),
        native.array(rows.view(-1, order, order)),
        native.workspace(torch.float64),
        torch.get_num_threads(),
    )
    _finished(reason, matrix.dtype)
    return values, rows.mT

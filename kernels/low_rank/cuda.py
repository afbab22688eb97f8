"""The low-rank step with tall matrices in the hands of the compiled CUDA kernels (csrc/cuda/).

The algorithm is the reference's. Products of tall matrices are summed in float64 on the tensor
cores, in an order that does not depend on timing. Matrices of the small size (Cholesky factor,
eigenvalues) stay with torch: cuSOLVER's latency of a 128 x 128 one is not to be had cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast import cuda
from heat_fast.kernels.low_rank import reference
from heat_fast.kernels.low_rank.reference import Factors, Primitives

# A chunk of rows is worth a block of its own from here on.
_ROWS = 256
# Row sums of |R^-1| |R| up to which the inverse is as good as substitution, for all that a factor
# of this size in the rounding error matters.
_TAME = 16.0


def gram(left: Tensor, right: Tensor) -> Tensor:
    """As the reference, in two stages: sums over chunks of rows, then over the chunks in order."""
    module = cuda.module()
    same = left is right
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left = _batched(left, lead)
    right = left if same else _batched(right, lead)
    outer, inner, rows = left.shape[:3]
    across = [-(-part.shape[-1] // module.tile) for part in (left, right)]
    tiles = across[0] * (across[0] + 1) // 2 if same else across[0] * across[1]
    # One wave of blocks over the whole device, if there are rows enough.
    blocks = module.resident * cuda.multiprocessors(left.device)
    chunks = max(1, min(blocks // (tiles * outer * inner), rows // _ROWS))
    each = -(-rows // chunks)
    each += -each % module.depth
    chunks = -(-rows // each)
    sizes = left.shape[-1], right.shape[-1]
    partial = left.new_empty(outer, inner, chunks, *sizes, dtype=torch.float64)
    result = left.new_empty(outer, inner, *sizes, dtype=torch.float64)
    cuda.launch("gram", left, left, right, same, partial, each, result)
    return result.view(*lead, *sizes)


def combine(tall: Tensor, small: Tensor) -> Tensor:
    """As the reference; the result is contiguous."""
    lead = torch.broadcast_shapes(tall.shape[:-2], small.shape[:-2])
    left, right = _batched(tall, lead), _batched(small.double(), lead)
    result = tall.new_empty(*left.shape[:-1], small.shape[-1])
    cuda.launch("combine", left, left, right, result)
    return result.view(*lead, *result.shape[-2:])


def solve(frame: Tensor, upper: Tensor) -> Tensor:
    """`A R^-1` as the product with the inverse of the small factor, in float64.

    The inverse X has a small residual column by column, and leaves `A - Q R` of the size of
    `|A| |X| |R|` roundings of float64: below one of float32 for every R that a shifted Cholesky
    factorisation makes (its condition is under 1e8). In float64 one step of refinement,
    `Q + (A - Q R) X`, takes an R of high condition back to the residual of substitution.
    """
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
    result = combine(frame, inverse)
    if frame.dtype == torch.float64:
        growth = (inverse.abs() @ upper.abs()).sum(-1).amax()
        if bool(growth > _TAME):
            result += combine(frame - combine(result, upper), inverse)
    return result


def block_norms(vectors: Tensor, values: Tensor, seed: int, samples: Tensor) -> Tensor:
    """As the reference; vectors whose last stride is not 1 are copied."""
    lead, (tokens, width, rank) = vectors.shape[:-3], vectors.shape[-3:]
    outer = lead.numel()
    factors = vectors.reshape(outer, tokens, width, rank)
    if factors.stride(-1) != 1:
        factors = factors.contiguous()
    # The weights in the precision of the vectors, as everywhere.
    weights = values.to(vectors.dtype).double().expand(*lead, tokens, rank)
    weights = weights.reshape(outer, tokens, rank)
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    numbers = samples.to(vectors.device, torch.int64).contiguous()
    count = len(numbers)
    workspace = vectors.new_empty(outer, tokens, count, rank)
    result = vectors.new_empty(outer, tokens, count)
    unsigned = seed & 0xFFFFFFFFFFFFFFFF
    cuda.launch("block_norms", vectors, factors, weights, unsigned, numbers, workspace, result)
    return result.view(*lead, tokens, count)


def _batched(matrix: Tensor, lead: torch.Size) -> Tensor:
    """`[outer, inner, M, s]`: two leading dimensions, which may be broadcast."""
    spread = matrix.expand(*lead, *matrix.shape[-2:])
    if len(lead) > 2:
        return spread.flatten(0, len(lead) - 2)
    return spread[(None,) * (2 - len(lead))]


_CUDA = Primitives(gram, combine, solve)


def orthonormalise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    return reference.orthonormalise(matrix, _CUDA)


def single_pass(tests: Tensor, images: Tensor, rank: int, precision: float) -> Factors:
    """As the reference."""
    return reference.single_pass(tests, images, rank, precision, _CUDA)


def second_pass(frame: Tensor, images: Tensor, rank: int) -> Factors:
    """As the reference."""
    return reference.second_pass(frame, images, rank, _CUDA)

"""Block norms of a low-rank operator: one door to their implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.low_rank import reference

# The largest rank whose factors' rows fit into the GPU kernel's registers.
_MAX_RANK = 128


def block_norms(
    vectors: Tensor, values: Tensor, seed: int, samples: Tensor, *, impl: str | None = None
) -> Tensor:
    """`|U_i diag(w) U_i' r|_1` for every token i and probe r, without forming H.

    `vectors [..., N, d, k]`: the rows of U by tokens; `values [..., N or 1, k]`; `samples [m]`:
    numbers of the probes, whose signs are `rademacher(seed, sample, token, d)`. Norms
    `[..., N, m]` in the vectors' dtype. `impl`: see `heat_fast.kernels.dispatch`; the GPU kernel
    takes vectors of float32 and ranks up to 128.

    Example:
        >>> block_norms(torch.eye(2)[None], torch.tensor([[3.0, -2.0]]), 0, torch.arange(2))
        tensor([[5., 5.]])
    """
    served = vectors.dtype == torch.float32 and vectors.shape[-1] <= _MAX_RANK
    offers = ("triton",) if served else ()
    if implementation("block_norms", impl, vectors, offers=offers) == "triton":
        from heat_fast.kernels.low_rank import triton

        return triton.block_norms(vectors, values, seed, samples)
    return reference.block_norms(vectors, values, seed, samples)

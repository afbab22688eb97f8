"""The two halves of the attention-value gate, in plain torch.

Value-output norms, for token i and query head h with output projection slice `W_O^h [D, d]`:

    norm[h, i] = | V[h, i] W_O^h |_1                                             (paper Eq. 2 ff.)

Column sweep, for weights `rho` over query positions (one row per target):

    flow[h, r, i] = sum_j rho[r, j] A[h, j, i],    A = softmax rows recomputed from q, k, lse

No `T x T` map is kept for all heads: rows are recomputed tile by tile, memory `O(H R T)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.kernels.branch_attention.reference import TILE_ELEMENTS, Masking


def attention_flow(
    query: Tensor, key: Tensor, normaliser: Tensor, rho: Tensor, masking: Masking
) -> Tensor:
    """`flow [Hk, G, R, T]` from `query [Hk, G, Q, D]`, `key [Hk, T, D]`, `normaliser [Hk, G, Q]`.

    The queries stand at the last `Q` of the `T` positions. `rho` weighs them: `[R, Q]` (the same
    for every head) or `[Hk, G, R, Q]`; the sums are taken in its dtype.
    """
    heads, group, queries, width = query.shape
    length = key.shape[1]
    offset = length - queries
    rho = rho.expand(heads, group, *rho.shape[-2:])
    flow = rho.new_zeros(heads, group, rho.shape[-2], length)
    rows = max(1, TILE_ELEMENTS // max(1, group * length))
    for head in range(heads):
        for low in range(0, queries, rows):
            high = min(low + rows, queries)
            first, stop = masking.first_key(offset + low), offset + high
            tile = query[head, :, low:high].reshape(-1, width).to(rho.dtype)
            scores = (tile @ key[head, first:stop].to(rho.dtype).t()) * masking.scale
            scores = scores.view(group, high - low, stop - first)
            if masking.softcap is not None:
                scores = masking.softcap * torch.tanh(scores / masking.softcap)
            weights = (scores - normaliser[head, :, low:high, None].to(rho.dtype)).exp_()
            hidden = masking.hidden(
                torch.arange(offset + low, stop, device=query.device),
                torch.arange(first, stop, device=query.device),
            )
            weights.masked_fill_(hidden, 0.0)
            flow[head, :, :, first:stop] += rho[head, :, :, low:high] @ weights
    return flow


def value_output_norms(value: Tensor, output_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`norm [Hk, G, T]` from `value [Hk, T, D]` and `output_weight [d, Hk * G * D]` (out, in).

    Each query head multiplies its group's value by its own columns of the output projection.
    """
    heads, length, width = value.shape
    slices = output_weight.t().reshape(heads, -1, width, output_weight.shape[0])
    norms = torch.empty(heads, slices.shape[1], length, dtype=dtype, device=value.device)
    for head in range(heads):
        for member in range(slices.shape[1]):
            moved = value[head] @ slices[head, member]
            norms[head, member] = moved.to(dtype).abs().sum(-1)
    return norms

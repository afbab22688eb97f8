"""Attention of many branches over a shared prefix by the compiled extension (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast import native
from heat_fast.kernels.branch_attention.reference import Masking
from heat_fast.kernels.norm.reference import wide


def prepared(x: Tensor, dtype: torch.dtype, lanes: int) -> Tensor:
    """`x` in the dtype of the sums, its head dimension filled up with zeros to whole vectors.

    Zeros leave dot products as they are.
    """
    x = x.to(dtype)
    missing = -x.shape[-1] % lanes
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_like(x: Tensor, depth: int) -> Tensor:
    """An empty `[Hk, B, G, Q, D]` whose memory is laid out `[B, Q, Hk, G, D]`.

    The output projection reads a row's heads side by side, so merging them costs no copy.
    """
    heads, batch, group, rows, _ = x.shape
    return x.new_empty(batch, rows, heads, group, depth).permute(2, 0, 3, 1, 4)


def branch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    masking: Masking,
) -> tuple[Tensor, Tensor]:
    """As the reference; half precision is cast to float32 first."""
    dtype, depth = query.dtype, query.shape[-1]
    extension = native.module(wide(dtype))
    lanes = extension.lanes()
    query, key, value = (prepared(x, wide(dtype), lanes) for x in (query, key, value))
    below = [
        prepared(x, wide(dtype), lanes) if x.shape[1] else None for x in (prefix_key, prefix_value)
    ]
    output = heads_like(query, query.shape[-1])
    normaliser = query.new_empty(query.shape[:-1])
    extension.branch_attention(
        native.array(query),
        native.array(key),
        native.array(value),
        native.array(below[0]),
        native.array(below[1]),
        native.array(output),
        native.array(normaliser),
        masking.scale,
        masking.window or 0,
        masking.softcap or 0.0,
        native.workspace(query.dtype),
        torch.get_num_threads(),
    )
    return output[..., :depth].to(dtype), normaliser

"""Attention's tangent and tangent of adjoint by the compiled extension (CPU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heat_fast import native
from heat_fast.kernels.branch_attention.native import heads_like, prepared
from heat_fast.kernels.norm.reference import wide
from heat_fast.kernels.second_order_attention.reference import Primal


def _primal(primal: Primal, lanes: int) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The primal's tensors (to be kept alive) and the arguments that describe it."""
    dtype = primal.normaliser.dtype
    kept = [prepared(x, dtype, lanes) for x in (primal.query, primal.key, primal.value)]
    kept += [primal.normaliser, prepared(primal.output, dtype, lanes)]
    masking = primal.masking
    arguments = (
        tuple(native.array(x) for x in kept),
        primal.start,
        masking.scale,
        masking.window or 0,
        masking.softcap or 0.0,
    )
    return kept, arguments


def attention_tangent(primal: Primal, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the reference; half precision is cast to float32 first."""
    dtype, depth = query.dtype, query.shape[-1]
    extension = native.module(wide(dtype))
    lanes = extension.lanes()
    query, key, value = (prepared(x, wide(dtype), lanes) for x in (query, key, value))
    kept, arguments = _primal(primal, lanes)
    output = heads_like(query, query.shape[-1])
    extension.attention_tangent(
        *arguments,
        native.array(query),
        native.array(key),
        native.array(value),
        native.array(output),
        native.workspace(wide(dtype)),
        torch.get_num_threads(),
    )
    del kept
    return output[..., :depth].to(dtype)


def attention_adjoint_tangent(
    primal: Primal,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    output_bar: Tensor,
    output_bar_dot: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; half precision is cast to float32 first."""
    dtype, depth = query.dtype, query.shape[-1]
    sums = wide(dtype)
    extension = native.module(sums)
    lanes = extension.lanes()
    tangents = [prepared(x, sums, lanes) for x in (query, key, value, output)]
    output_bar, output_bar_dot = (prepared(x, sums, lanes) for x in (output_bar, output_bar_dot))
    kept, arguments = _primal(primal, lanes)
    results = [torch.empty_like(x) for x in tangents[:3]]
    extension.attention_adjoint_tangent(
        *arguments,
        tuple(native.array(x) for x in tangents),
        native.array(output_bar),
        native.array(output_bar_dot),
        tuple(native.array(x) for x in results),
        native.workspace(sums),
        torch.get_num_threads(),
    )
    del kept
    query_bar, key_bar, value_bar = (x[..., :depth].to(dtype) for x in results)
    return query_bar, key_bar, value_bar

"""Attention's tangent and tangent of adjoint on a GPU; `reference.py` has the mathematics.

In half precision kernels of our own do all of it while a tile is in registers (`fused.py`). For
float32 and for heads too wide for that, torch multiplies and one kernel does what lies between
(`staged.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from heat_fast.kernels.compile import Variant
from heat_fast.kernels.dispatch import HALF
from heat_fast.kernels.second_order_attention import fused, staged
from heat_fast.kernels.second_order_attention.reference import Primal


def way(query: Tensor) -> ModuleType:
    """The module that serves such queries."""
    return fused if query.dtype in HALF and query.shape[-1] <= fused.WIDEST else staged


def attention_tangent(primal: Primal, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the reference; summed in float32."""
    result: Tensor = way(query).attention_tangent(primal, query, key, value)
    return result


def attention_adjoint_tangent(
    primal: Primal,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    output_bar: Tensor,
    output_bar_dot: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; summed in float32."""
    dtype = sums = query.dtype
    if dtype == torch.float16:
        # Adjoints are small, and their products with weights would drop out of float16's range.
        # All results are linear in them: they are scaled by a power of two, and scaled back.
        largest = torch.maximum(output_bar.abs().amax(), output_bar_dot.abs().amax()).float()
        back = torch.exp2(torch.log2(largest.clamp(min=2.0**-24)).floor())
        sums = torch.float32
        output_bar, output_bar_dot = ((x / back).to(dtype) for x in (output_bar, output_bar_dot))
    moved = query, key, value, output, output_bar, output_bar_dot
    results: tuple[Tensor, Tensor, Tensor]
    results = way(query).attention_adjoint_tangent(primal, *moved, sums)
    if dtype == torch.float16:
        to_query, to_key, to_value = ((x * back).to(dtype) for x in results)
        return to_query, to_key, to_value
    return results


def variants(capability: int) -> Iterator[Variant]:
    """Every kernel as it is launched on an architecture."""
    yield from fused.variants(capability)
    yield from staged.variants()

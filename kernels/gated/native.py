"""The elementwise part of a gated layer by the compiled extension (CPU), in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast import native


def _arrays(*tensors: Tensor) -> list[tuple[int, tuple[int, ...], tuple[int, ...]] | None]:
    return [native.array(tensor) for tensor in tensors]


def gate_tangent(value: Tensor, slope: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """As the reference, for float32 and float64."""
    result = gate.new_empty(gate.shape)
    native.module(gate.dtype).gate_tangent(
        *_arrays(value, slope, gate, up, result), torch.get_num_threads()
    )
    return result


def gate_adjoint_tangent(
    value: Tensor,
    slope: Tensor,
    bend: Tensor,
    mixed: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the reference, for float32 and float64."""
    results = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    native.module(gate.dtype).gate_adjoint_tangent(
        *_arrays(value, slope, bend, mixed, gate, up, hidden, *results), torch.get_num_threads()
    )
    return results

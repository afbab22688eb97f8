"""The elementwise part of a gated feed-forward layer: one door to its implementations."""

from __future__ import annotations

from torch import Tensor

from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.gated import native, reference


def _native(impl: str | None, *tensors: Tensor) -> bool:
    same = all(part.dtype == tensors[0].dtype and part.stride(-1) == 1 for part in tensors)
    offers = ("native",) if same else ()
    return implementation("gated", impl, *tensors, offers=offers) == "native"


def gate_tangent(
    value: Tensor, slope: Tensor, gate: Tensor, up: Tensor, *, impl: str | None = None
) -> Tensor:
    """`h. = slope o g. + value o u.`, `[B, S, f]`; primal values `[S, f]`, see `reference.py`."""
    tensors = (value, slope, gate, up)
    if _native(impl, *tensors):
        return native.gate_tangent(*tensors)
    return reference.gate_tangent(*tensors)


def gate_adjoint_tangent(
    value: Tensor,
    slope: Tensor,
    bend: Tensor,
    mixed: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`g_.` and `u_. [B, S, f]` from primal values `[S, f]` and tangents, see `reference.py`."""
    tensors = (value, slope, bend, mixed, gate, up, hidden)
    if _native(impl, *tensors):
        return native.gate_adjoint_tangent(*tensors)
    return reference.gate_adjoint_tangent(*tensors)

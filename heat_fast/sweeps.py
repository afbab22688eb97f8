"""Hessian-vector products against the trunk: one tangent sweep up, one tangent of adjoint down.

For directions `r [B, S, d]` that vanish below position `start`, the product `z = (H r)[start:]`
with the Hessian of `g(X)` is the tangent of the gradient (Pearlmutter 1994, forward over reverse):

    up:    x_0. = r;  x_{l+1}. = J_l x_l.                       (kept per block)
    head:  x_L_. = d^2 g / dx^2 . x_L.
    down:  x_l_. = J_l' x_{l+1}_. + (dJ_l . x_l.)' x_{l+1}_     (x_ from the trunk's adjoint)

The trunk's forward and adjoint values are shared by all directions; each direction costs two
matrix products per weight. By causality positions below `start` neither move nor matter. Where the
trunk's `layers` are only the last blocks, X stands for the residual stream that enters them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from heat_fast.decoder.block import BlockTangent
from heat_fast.trunk import TargetAdjoint, Trunk

Inspect = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class TangentSweep:
    """Everything that moved on the way up: per-block tangents and `last [B, n, d]`."""

    start: int
    blocks: list[BlockTangent]
    last: Tensor


def tangent_sweep(
    trunk: Trunk, directions: Tensor, start: int, inspect: Inspect | None = None
) -> TangentSweep:
    """Push directions `[B, M - start, d]` at positions `start..M-1` through the trunk's layers."""
    x_dot = directions if trunk.first else trunk.decoder.scale(directions)
    tangents = []
    for layer in trunk.layers:
        block = trunk.decoder.blocks[layer]
        x_dot, tangent = block.tangent(trunk.states[layer], x_dot, trunk.rows(layer, start))
        if inspect is not None:
            inspect(f"the tangent at block {layer}", x_dot)
        tangents.append(tangent)
    return TangentSweep(start, tangents, x_dot)


def hessian_rows(
    trunk: Trunk,
    sweep: TangentSweep,
    adjoint: TargetAdjoint,
    inspect: Inspect | None = None,
    *,
    last: bool = False,
) -> Tensor:
    """Finish the products of one target: `(H r) [B, p + 1 - start, d]` at `start..p`.

    For the `last` target the blocks' tangents are let go of on the way.
    """
    decoder, target = trunk.decoder, adjoint.target
    row = slice(target, target + 1)
    x_bar_dot = decoder.head.adjoint_tangent(adjoint.head, sweep.last[:, row])
    for layer in reversed(trunk.layers):
        x_bar_dot = decoder.blocks[layer].adjoint_tangent(
            trunk.states[layer],
            sweep.blocks.pop() if last else sweep.blocks[layer - trunk.first],
            adjoint.blocks[layer - trunk.first],
            x_bar_dot,
            trunk.target_rows(layer, sweep.start, target),
        )
        if inspect is not None:
            inspect(f"the tangent of the gradient at block {layer}", x_bar_dot)
    return x_bar_dot if trunk.first else decoder.scale(x_bar_dot)

"""A gated feed-forward layer between its matrix products, in plain torch.

For `h = phi(g) o u`, with the primal values `value = phi`, `slope = phi' o u`, `bend = h_ o u o
phi''` and `mixed = h_ o phi'` shared by all rows of a batch:

    h. = slope o g. + value o u.
    g_. = h_. o slope + bend o g. + mixed o u.,    u_. = h_. o value + mixed o g.
"""

from __future__ import annotations

from torch import Tensor


def gate_tangent(value: Tensor, slope: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """`h. [B, S, f]` from primal values `[S, f]` and tangents `[B, S, f]`."""
    return (slope * gate).addcmul_(value, up)


def gate_adjoint_tangent(
    value: Tensor,
    slope: Tensor,
    bend: Tensor,
    mixed: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """`g_.` and `u_. [B, S, f]`; `hidden` is `h_.`."""
    gate_bar = (hidden * slope).addcmul_(bend, gate).addcmul_(mixed, up)
    return gate_bar, (hidden * value).addcmul_(mixed, gate)

"""LayerNorm and RMSNorm forward, tangent and tangent of adjoint, in plain torch.

With `c(x) = x - mean x` (LayerNorm) or `c(x) = x` (RMSNorm) and `r = (mean c(x)^2 + eps)^-1/2`:

    x^ = r c(x),   y = w x^ + b
    y. = w r (x. - x^ mean(x^ x.))
    x_. = r [u. - r a u - r b x. + x^ (3 r a b - mean(x^ u.) - r mean(x. u))]

with `u = w y_`, `a = mean(x^ x.)`, `b = mean(x^ u)` (all centred for LayerNorm). Sums are taken in
at least float32. The primal's `x^`, `r`, `u`, `b` are shared by all rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: float64 stays, everything shorter becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Affine:
    """What a norm applies around its statistics.

    `weight`, `bias [d]` may be None. `weight_offset` is 1 for families that store `w - 1` (Gemma).
    `late_cast` says whether the weight is applied before the result returns to the input's dtype
    (LayerNorm, Gemma) or after (Llama and kin); it matters for half precision only.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centered: bool
    weight_offset: float = 0.0
    late_cast: bool = False

    def centre(self, x: Tensor) -> Tensor:
        """`c(x)`."""
        return x - x.mean(-1, keepdim=True) if self.centered else x

    def scale(self, x: Tensor) -> Tensor:
        """`w o x`."""
        if self.weight is None:
            return x
        weight = self.weight.to(x.dtype)
        return x * (weight + self.weight_offset if self.weight_offset else weight)


def norm_forward(affine: Affine, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, `x^` and `r [..., 1]` of rows `x [..., d]`."""
    centred = affine.centre(x.to(wide(x.dtype)))
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    inverse = torch.rsqrt(length.square() / x.shape[-1] + affine.eps)
    normalised = centred * inverse
    y = affine.scale(normalised if affine.late_cast else normalised.to(x.dtype))
    if affine.bias is not None:
        y = y + affine.bias.to(y.dtype)
    return y.to(x.dtype), normalised, inverse


def norm_tangent(affine: Affine, normalised: Tensor, inverse: Tensor, x_dot: Tensor) -> Tensor:
    """`y. [B, ..., d]` of `x. [B, ..., d]`."""
    moved = affine.centre(x_dot.to(normalised.dtype))
    along = torch.linalg.vecdot(moved, normalised)[..., None] / -x_dot.shape[-1]
    result = torch.addcmul(moved, normalised, along)
    return affine.scale(result * inverse).to(x_dot.dtype)


def norm_adjoint_tangent(
    affine: Affine,
    normalised: Tensor,
    inverse: Tensor,
    pulled: Tensor,
    along: Tensor,
    x_dot: Tensor,
    y_bar_dot: Tensor,
) -> Tensor:
    """`x_. [B, ..., d]`; `pulled` is `u`, `along` is `b [..., 1]`."""
    width = x_dot.shape[-1]
    moved = affine.centre(x_dot.to(normalised.dtype))
    pulled_dot = affine.centre(affine.scale(y_bar_dot.to(normalised.dtype)))
    a = torch.linalg.vecdot(moved, normalised)[..., None] / width
    cross = torch.linalg.vecdot(moved, pulled)[..., None] / width
    radial = torch.linalg.vecdot(pulled_dot, normalised)[..., None] / width
    result = torch.addcmul(pulled_dot, inverse * a, pulled, value=-1)
    result = result.addcmul_(inverse * along, moved, value=-1)
    result = result.addcmul_(normalised, inverse * (3 * a * along - cross) - radial)
    return result.mul_(inverse).to(y_bar_dot.dtype)

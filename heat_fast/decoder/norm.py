"""Normalisation: LayerNorm and RMSNorm in four readings.

With `c(x) = x - mean x` (LayerNorm) or `c(x) = x` (RMSNorm) and `r = (mean c(x)^2 + eps)^-1/2`:

    x^ = r c(x),   y = w x^ + b

The Jacobian is `diag(w) r (C - x^ x^'/d)`, `C` the centring (or the identity), so it is symmetric
up to the weight. All statistics are computed in at least float32, as the models themselves do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: float64 stays, everything shorter becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Norm:
    """RMSNorm (`centered=False`) or LayerNorm (`centered=True`) over the last dimension.

    `weight_offset` is 1 for families that store `w - 1` (Gemma). `late_cast` says whether the
    weight is applied before the result returns to the model's dtype (LayerNorm, Gemma) or after
    (Llama and kin); it matters for half precision only. `weight` and `bias` may be None.
    """

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        centered: bool,
        weight_offset: float = 0.0,
        late_cast: bool = False,
    ) -> None:
        self.weight = None if weight is None else weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.eps = eps
        self.centered = centered
        self.weight_offset = weight_offset
        self.late_cast = late_cast

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centered else x

    def _scale(self, x: Tensor) -> Tensor:
        """Multiply by the weight, `w o x`."""
        if self.weight is None:
            return x
        weight = self.weight.to(x.dtype)
        return x * (weight + self.weight_offset if self.weight_offset else weight)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(x^, r)`: the normalised rows `[..., d]` and their inverse deviations `[..., 1]`."""
        centred = self._centre(x.to(wide(x.dtype)))
        inverse = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)
        return centred * inverse, inverse

    def forward(self, x: Tensor) -> Tensor:
        """`y = w x^ + b`."""
        normalised, _ = self.statistics(x)
        if not self.late_cast:
            normalised = normalised.to(x.dtype)
        y = self._scale(normalised)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def tangent(self, x: Tensor, x_dot: Tensor) -> Tensor:
        """`y. = w r (x. - x^ mean(x^ x.))`; `x [S, d]` is shared by all `x_dot [B, S, d]`."""
        normalised, inverse = self.statistics(x)
        moved = self._centre(x_dot.to(normalised.dtype))
        along = (normalised * moved).mean(-1, keepdim=True)
        return self._scale((moved - normalised * along) * inverse).to(x_dot.dtype)

    def adjoint(self, x: Tensor, y_bar: Tensor) -> Tensor:
        """`x_ = r (u - x^ mean(x^ u))` with `u = w y_`."""
        normalised, inverse = self.statistics(x)
        pulled = self._centre(self._scale(y_bar.to(normalised.dtype)))
        along = (normalised * pulled).mean(-1, keepdim=True)
        return ((pulled - normalised * along) * inverse).to(y_bar.dtype)

    def adjoint_tangent(self, x: Tensor, x_dot: Tensor, y_bar: Tensor, y_bar_dot: Tensor) -> Tensor:
        """The derivative of `adjoint` along `(x_dot, y_bar_dot)`.

        With `u = w y_`, `a = mean(x^ x.)`, `b = mean(x^ u)` (all centred for LayerNorm):

            x_. = r [u. - r a u - r b x. + x^ (3 r a b - mean(x^ u.) - r mean(x. u))]

        `x`, `y_bar` are `[S, d]` and shared; `x_dot`, `y_bar_dot` are `[B, S, d]`.
        """
        normalised, inverse = self.statistics(x)
        moved = self._centre(x_dot.to(normalised.dtype))
        pulled = self._centre(self._scale(y_bar.to(normalised.dtype)))
        pulled_dot = self._centre(self._scale(y_bar_dot.to(normalised.dtype)))
        a = (normalised * moved).mean(-1, keepdim=True)
        b = (normalised * pulled).mean(-1, keepdim=True)
        cross = (moved * pulled).mean(-1, keepdim=True)
        radial = (normalised * pulled_dot).mean(-1, keepdim=True)
        result = pulled_dot - (inverse * a) * pulled
        result = torch.addcmul(result, inverse * b, moved, value=-1)
        result = torch.addcmul(result, normalised, inverse * (3 * a * b - cross) - radial)
        return (result * inverse).to(y_bar_dot.dtype)


class Identity:
    """The norm that is not there: families without post-norms use it in their place."""

    def forward(self, x: Tensor) -> Tensor:
        """`y = x`."""
        return x

    def tangent(self, x: Tensor, x_dot: Tensor) -> Tensor:
        """`y. = x.`."""
        return x_dot

    def adjoint(self, x: Tensor, y_bar: Tensor) -> Tensor:
        """`x_ = y_`."""
        return y_bar

    def adjoint_tangent(self, x: Tensor, x_dot: Tensor, y_bar: Tensor, y_bar_dot: Tensor) -> Tensor:
        """`x_. = y_.`."""
        return y_bar_dot

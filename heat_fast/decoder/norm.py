"""Normalisation: LayerNorm and RMSNorm in four readings.

With `c(x) = x - mean x` (LayerNorm) or `c(x) = x` (RMSNorm) and `r = (mean c(x)^2 + eps)^-1/2`:

    x^ = r c(x),   y = w x^ + b

The Jacobian is `diag(w) r (C - x^ x^'/d)`, `C` the centring (or the identity), so it is symmetric
up to the weight. All statistics are computed in at least float32, as the models themselves do, and
kept: every probe shares them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: float64 stays, everything shorter becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class NormState:
    """Normalised rows `x^ [..., S, d]` and inverse deviations `r [..., S, 1]` of the primal."""

    normalised: Tensor
    inverse: Tensor

    def rows(self, rows: slice) -> NormState:
        """The same state for some of its rows."""
        return NormState(self.normalised[..., rows, :], self.inverse[..., rows, :])

    def select(self, index: int | None, dim: int) -> NormState:
        """The state without a dimension (`index`), or with a new one of size 1 (None)."""
        if index is None:
            return NormState(self.normalised.unsqueeze(dim), self.inverse.unsqueeze(dim))
        return NormState(self.normalised.select(dim, index), self.inverse.select(dim, index))


@dataclass(frozen=True)
class NormAdjoint:
    """The primal adjoint: `u = w y_ [..., S, d]` (centred) and `b = mean(x^ u) [..., S, 1]`."""

    pulled: Tensor
    along: Tensor

    def rows(self, rows: slice) -> NormAdjoint:
        """The same adjoint for some of its rows."""
        return NormAdjoint(self.pulled[..., rows, :], self.along[..., rows, :])


# What a norm that is not there keeps of the primal.
_NO_STATE = NormState(torch.empty(1, 1, 1, 0, 1), torch.empty(1, 1, 1, 0, 1))
_NO_ADJOINT = NormAdjoint(torch.empty(1, 1, 1, 0, 1), torch.empty(1, 1, 1, 0, 1))


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

    def forward(self, x: Tensor) -> tuple[Tensor, NormState]:
        """`y = w x^ + b` and the statistics."""
        centred = self._centre(x.to(wide(x.dtype)))
        length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
        inverse = torch.rsqrt(length.square() / x.shape[-1] + self.eps)
        normalised = centred * inverse
        y = self._scale(normalised if self.late_cast else normalised.to(x.dtype))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype), NormState(normalised, inverse)

    def tangent(self, state: NormState, x_dot: Tensor) -> Tensor:
        """`y. = w r (x. - x^ mean(x^ x.))`; the state is shared by all `x_dot [B, S, d]`."""
        moved = self._centre(x_dot.to(state.normalised.dtype))
        along = torch.linalg.vecdot(moved, state.normalised)[..., None] / -x_dot.shape[-1]
        result = torch.addcmul(moved, state.normalised, along)
        return self._scale(result * state.inverse).to(x_dot.dtype)

    def adjoint(self, state: NormState, y_bar: Tensor) -> tuple[Tensor, NormAdjoint]:
        """`x_ = r (u - x^ mean(x^ u))` with `u = w y_`, and what `adjoint_tangent` needs of it."""
        pulled = self._centre(self._scale(y_bar.to(state.normalised.dtype)))
        along = (state.normalised * pulled).mean(-1, keepdim=True)
        x_bar = (pulled - state.normalised * along) * state.inverse
        return x_bar.to(y_bar.dtype), NormAdjoint(pulled, along)

    def adjoint_tangent(
        self, state: NormState, x_dot: Tensor, bar: NormAdjoint, y_bar_dot: Tensor
    ) -> Tensor:
        """The derivative of `adjoint` along `(x_dot, y_bar_dot)`, `[B, S, d]`.

        With `u = w y_`, `a = mean(x^ x.)`, `b = mean(x^ u)` (all centred for LayerNorm):

            x_. = r [u. - r a u - r b x. + x^ (3 r a b - mean(x^ u.) - r mean(x. u))]
        """
        normalised, inverse = state.normalised, state.inverse
        width = x_dot.shape[-1]
        moved = self._centre(x_dot.to(normalised.dtype))
        pulled_dot = self._centre(self._scale(y_bar_dot.to(normalised.dtype)))
        a = torch.linalg.vecdot(moved, normalised)[..., None] / width
        cross = torch.linalg.vecdot(moved, bar.pulled)[..., None] / width
        radial = torch.linalg.vecdot(pulled_dot, normalised)[..., None] / width
        result = torch.addcmul(pulled_dot, inverse * a, bar.pulled, value=-1)
        result = result.addcmul_(inverse * bar.along, moved, value=-1)
        result = result.addcmul_(normalised, inverse * (3 * a * bar.along - cross) - radial)
        return result.mul_(inverse).to(y_bar_dot.dtype)


class Identity:
    """The norm that is not there: families without post-norms or head norms use it instead."""

    def forward(self, x: Tensor) -> tuple[Tensor, NormState]:
        """`y = x`."""
        return x, _NO_STATE

    def tangent(self, state: NormState, x_dot: Tensor) -> Tensor:
        """`y. = x.`."""
        return x_dot

    def adjoint(self, state: NormState, y_bar: Tensor) -> tuple[Tensor, NormAdjoint]:
        """`x_ = y_`."""
        return y_bar, _NO_ADJOINT

    def adjoint_tangent(
        self, state: NormState, x_dot: Tensor, bar: NormAdjoint, y_bar_dot: Tensor
    ) -> Tensor:
        """`x_. = y_.`."""
        return y_bar_dot


AnyNorm = Norm | Identity


def kept(norm: AnyNorm, x_dot: Tensor) -> Tensor:
    """A tangent that `adjoint_tangent` will need, or nothing where the norm is not there.

    The empty stand-in has the rows of `x_dot` in its shape but no storage.
    """
    return x_dot if isinstance(norm, Norm) else x_dot.new_empty(1).expand(x_dot.shape)

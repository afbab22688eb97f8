"""Normalisation: LayerNorm and RMSNorm in four readings.

The formulas are in `kernels/norm/reference.py`. The Jacobian is `diag(w) r (C - x^ x^'/d)`, `C` the
centring (or the identity), so it is symmetric up to the weight. The statistics of the primal are
kept: every probe shares them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heat_fast.kernels.norm import (
    Affine,
    norm_adjoint_tangent,
    norm_forward,
    norm_tangent,
    wide,
)


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

    The other arguments are those of `heat_fast.kernels.norm.Affine`.
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
        self.affine = Affine(
            None if weight is None else weight.detach(),
            None if bias is None else bias.detach(),
            eps,
            centered,
            weight_offset,
            late_cast,
        )

    def forward(self, x: Tensor, *, keep: bool = True) -> tuple[Tensor, NormState]:
        """`y = w x^ + b` and the statistics, which are empty with `keep=False`."""
        y, normalised, inverse = norm_forward(self.affine, x, keep=keep)
        return y, NormState(normalised, inverse) if keep else _NO_STATE

    def tangent(self, state: NormState, x_dot: Tensor) -> Tensor:
        """`y. = w r (x. - x^ mean(x^ x.))`; the state is shared by all `x_dot [B, S, d]`."""
        return norm_tangent(self.affine, state.normalised, state.inverse, x_dot)

    def adjoint(self, state: NormState, y_bar: Tensor) -> tuple[Tensor, NormAdjoint]:
        """`x_ = r (u - x^ mean(x^ u))` with `u = w y_`, and what `adjoint_tangent` needs of it."""
        affine = self.affine
        pulled = affine.centre(affine.scale(y_bar.to(state.normalised.dtype)))
        along = (state.normalised * pulled).mean(-1, keepdim=True)
        x_bar = (pulled - state.normalised * along) * state.inverse
        return x_bar.to(y_bar.dtype), NormAdjoint(pulled, along)

    def adjoint_tangent(
        self, state: NormState, x_dot: Tensor, bar: NormAdjoint, y_bar_dot: Tensor
    ) -> Tensor:
        """The derivative of `adjoint` along `(x_dot, y_bar_dot)`, `[B, S, d]`."""
        return norm_adjoint_tangent(
            self.affine,
            state.normalised,
            state.inverse,
            bar.pulled,
            bar.along,
            x_dot,
            y_bar_dot,
        )


class NormOfHeads(Norm):
    """A norm over all heads of a row at once, of head-major rows `[Hk, B, (G,) S, D]` (OLMo 2).

    The states are head-major as well, `r [1, B, (1,) S, 1]`, so that rows of them can be taken.
    """

    def forward(self, x: Tensor, *, keep: bool = True) -> tuple[Tensor, NormState]:
        """As `Norm.forward` on `[B, S, Hk (G) D]`."""
        y, state = super().forward(_whole_rows(x), keep=keep)
        if keep:
            state = NormState(_by_heads(state.normalised, x), _by_heads(state.inverse, _one(x)))
        return _by_heads(y, x), state

    def tangent(self, state: NormState, x_dot: Tensor) -> Tensor:
        """As `Norm.tangent`."""
        return _by_heads(super().tangent(_whole_state(state), _whole_rows(x_dot)), x_dot)

    def adjoint(self, state: NormState, y_bar: Tensor) -> tuple[Tensor, NormAdjoint]:
        """As `Norm.adjoint`."""
        x_bar, bar = super().adjoint(_whole_state(state), _whole_rows(y_bar))
        pulled, along = _by_heads(bar.pulled, y_bar), _by_heads(bar.along, _one(y_bar))
        return _by_heads(x_bar, y_bar), NormAdjoint(pulled, along)

    def adjoint_tangent(
        self, state: NormState, x_dot: Tensor, bar: NormAdjoint, y_bar_dot: Tensor
    ) -> Tensor:
        """As `Norm.adjoint_tangent`."""
        whole = NormAdjoint(_whole_rows(bar.pulled), _whole_rows(bar.along))
        result = super().adjoint_tangent(
            _whole_state(state), _whole_rows(x_dot), whole, _whole_rows(y_bar_dot)
        )
        return _by_heads(result, y_bar_dot)


def _whole_rows(x: Tensor) -> Tensor:
    """`[Hk, B, (G,) S, D] -> [B, S, Hk (G) D]`."""
    order = (1, 3, 0, 2, 4) if x.dim() == 5 else (1, 2, 0, 3)
    return x.permute(order).flatten(2)


def _whole_state(state: NormState) -> NormState:
    return NormState(_whole_rows(state.normalised), _whole_rows(state.inverse))


def _by_heads(rows: Tensor, like: Tensor) -> Tensor:
    """The reverse of `_whole_rows`, contiguous, for rows with the heads of `like`."""
    if like.dim() == 5:
        sizes: tuple[int, ...] = (like.shape[0], like.shape[2], like.shape[4])
        order: tuple[int, ...] = (2, 0, 3, 1, 4)
    else:
        sizes, order = (like.shape[0], like.shape[3]), (2, 0, 1, 3)
    heads: Tensor = rows.unflatten(-1, sizes).permute(order)
    return heads.contiguous()


def _one(x: Tensor) -> Tensor:
    """One number of every row, as a head of its own."""
    return x[:1, :, :1, :, :1] if x.dim() == 5 else x[:1, ..., :1]


class Identity:
    """The norm that is not there: families without post-norms or head norms use it instead."""

    def forward(self, x: Tensor, *, keep: bool = True) -> tuple[Tensor, NormState]:
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


class Factor(Identity):
    """A number in a norm's place: some families weigh what a layer adds (Granite)."""

    def __init__(self, value: float) -> None:
        self.value = value

    def forward(self, x: Tensor, *, keep: bool = True) -> tuple[Tensor, NormState]:
        """`y = f x`."""
        return self.value * x, _NO_STATE

    def tangent(self, state: NormState, x_dot: Tensor) -> Tensor:
        """`y. = f x.`."""
        return self.value * x_dot

    def adjoint(self, state: NormState, y_bar: Tensor) -> tuple[Tensor, NormAdjoint]:
        """`x_ = f y_`."""
        return self.value * y_bar, _NO_ADJOINT

    def adjoint_tangent(
        self, state: NormState, x_dot: Tensor, bar: NormAdjoint, y_bar_dot: Tensor
    ) -> Tensor:
        """`x_. = f y_.`."""
        return self.value * y_bar_dot


AnyNorm = Norm | Identity


def kept(norm: AnyNorm, x_dot: Tensor) -> Tensor:
    """A tangent that `adjoint_tangent` will need, or nothing where the norm is not there.

    The empty stand-in has the rows of `x_dot` in its shape but no storage.
    """
    return x_dot if isinstance(norm, Norm) else x_dot.new_empty(1).expand(x_dot.shape)


__all__ = [
    "AnyNorm",
    "Factor",
    "Identity",
    "Norm",
    "NormAdjoint",
    "NormOfHeads",
    "NormState",
    "kept",
    "wide",
]

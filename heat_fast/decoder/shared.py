"""Feed-forward layers made of others: an expert that all rows share, beside those that are chosen.

    y = f(x) + g(x)        or, weighed,    y = sigma o f(x),   sigma = sigmoid(t),  t = x w'

Each of these has the four readings of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Activation, FeedForward, FeedForwardSizes


@dataclass(frozen=True)
class Both:
    """What two layers keep: states, tangents or adjoints."""

    left: Any
    right: Any

    def first(self) -> Both:
        """The states of the first of a batch."""
        return Both(self.left.first(), self.right.first())

    def rows(self, rows: slice) -> Both:
        """The same for some rows."""
        return Both(self.left.rows(rows), self.right.rows(rows))


class Sum:
    """`f(x) + g(x)`."""

    def __init__(self, left: FeedForward, right: FeedForward) -> None:
        self.left = left
        self.right = right
        self.routed = left.routed or right.routed

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All affine submodules."""
        return *self.left.linears, *self.right.linears

    @property
    def activations(self) -> tuple[Activation, ...]:
        """Those of both."""
        return *self.left.activations, *self.right.activations

    def sizes(self, row: Tensor) -> FeedForwardSizes:
        """What a row meets, and what of it is kept."""
        return self.left.sizes(row) + self.right.sizes(row)

    def forward(self, x: Tensor) -> tuple[Tensor, Both]:
        """`y [.., S, d]`, and what both keep."""
        left, left_state = self.left.forward(x)
        right, right_state = self.right.forward(x)
        return left + right, Both(left_state, right_state)

    def with_derivatives(self, state: Both) -> Both:
        """The states with what many probes share."""
        return Both(
            self.left.with_derivatives(state.left), self.right.with_derivatives(state.right)
        )

    def tangent(self, state: Both, x_dot: Tensor) -> tuple[Tensor, Both]:
        """`y.`, the sum of both."""
        left, left_tangent = self.left.tangent(state.left, x_dot)
        right, right_tangent = self.right.tangent(state.right, x_dot)
        return left + right, Both(left_tangent, right_tangent)

    def adjoint(self, state: Both, y_bar: Tensor, width: int) -> tuple[Tensor, Both]:
        """`x_`, the sum of both."""
        left, left_bar = self.left.adjoint(state.left, y_bar, width)
        right, right_bar = self.right.adjoint(state.right, y_bar, width)
        return left + right, Both(left_bar, right_bar)

    def adjoint_tangent(
        self, state: Both, tangent: Both, bar: Both, y_bar_dot: Tensor, width: int
    ) -> Tensor:
        """`x_.`, the sum of both."""
        left = self.left.adjoint_tangent(state.left, tangent.left, bar.left, y_bar_dot, width)
        right = self.right.adjoint_tangent(state.right, tangent.right, bar.right, y_bar_dot, width)
        return left + right


@dataclass(frozen=True)
class WeighedState:
    """The primal: `weight [.., S, 1]` (sigma), `y [.., S, d]` (f(x)), and what f keeps."""

    weight: Tensor
    y: Tensor
    inner: Any

    def first(self) -> WeighedState:
        """The state of the first of a batch."""
        return WeighedState(self.weight[0], self.y[0], self.inner.first())

    def rows(self, rows: slice) -> WeighedState:
        """The same state for some of its rows."""
        return WeighedState(self.weight[rows], self.y[rows], self.inner.rows(rows))


@dataclass(frozen=True)
class WeighedTangent:
    """Tangents `logit [B, S, 1]` (t), `y [B, S, d]`, and those that f keeps."""

    logit: Tensor
    y: Tensor
    inner: Any

    def rows(self, rows: slice) -> WeighedTangent:
        """The same tangents for some of their rows."""
        return WeighedTangent(self.logit[:, rows], self.y[:, rows], self.inner.rows(rows))


@dataclass(frozen=True)
class WeighedAdjoint:
    """Primal adjoints: `y [S, d]`, of the sum; `weight [S, 1]`; and those that f keeps."""

    y: Tensor
    weight: Tensor
    inner: Any

    def rows(self, rows: slice) -> WeighedAdjoint:
        """The same adjoints for some of their rows."""
        return WeighedAdjoint(self.y[rows], self.weight[rows], self.inner.rows(rows))


class Weighed:
    """`sigmoid(x w') o f(x)`; `weigher`: the model's own layer `w [1, d]`."""

    def __init__(self, weigher: Linear, inner: FeedForward) -> None:
        self.weigher = weigher
        self.inner = inner
        self.routed = inner.routed

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All affine submodules."""
        return self.weigher, *self.inner.linears

    @property
    def activations(self) -> tuple[Activation, ...]:
        """Those of f."""
        return self.inner.activations

    def sizes(self, row: Tensor) -> FeedForwardSizes:
        """What a row meets, and what of it is kept."""
        width = row.shape[-1]
        weigher = FeedForwardSizes(hidden=width + 1, inner=0, weights=width, passed=width + 1)
        return weigher + self.inner.sizes(row)

    def forward(self, x: Tensor) -> tuple[Tensor, WeighedState]:
        """`y [.., S, d]`, and what is kept."""
        weight = self.weigher.forward(x).sigmoid()
        y, inner = self.inner.forward(x)
        return weight * y, WeighedState(weight, y, inner)

    def with_derivatives(self, state: WeighedState) -> WeighedState:
        """The state with what many probes share."""
        return WeighedState(state.weight, state.y, self.inner.with_derivatives(state.inner))

    def tangent(self, state: WeighedState, x_dot: Tensor) -> tuple[Tensor, WeighedTangent]:
        """`y. = sigma o f. + sigma (1 - sigma) t. o f`."""
        logit = self.weigher.tangent(x_dot)
        y, inner = self.inner.tangent(state.inner, x_dot)
        moved = _slope(state.weight) * logit
        return state.weight * y + moved * state.y, WeighedTangent(logit, y, inner)

    def adjoint(
        self, state: WeighedState, y_bar: Tensor, width: int
    ) -> tuple[Tensor, WeighedAdjoint]:
        """`x_`, by `f_ = sigma o y_`, `sigma_ = <y_, f>`, `t_ = sigma (1 - sigma) sigma_`."""
        weight = (y_bar * state.y).sum(-1, keepdim=True)
        x_bar, inner = self.inner.adjoint(state.inner, state.weight * y_bar, width)
        logit = _slope(state.weight) * weight
        kept = WeighedAdjoint(y_bar, weight, inner)
        return x_bar + self.weigher.adjoint(logit, width), kept

    def adjoint_tangent(
        self,
        state: WeighedState,
        tangent: WeighedTangent,
        bar: WeighedAdjoint,
        y_bar_dot: Tensor,
        width: int,
    ) -> Tensor:
        """`x_.`, by `f_. = sigma o y_. + sigma. o y_`, `sigma_. = <y_., f> + <y_, f.>`,

        t_. = sigma (1 - sigma) (sigma_. + (1 - 2 sigma) t. sigma_).
        """
        slope = _slope(state.weight)
        inner_bar = state.weight * y_bar_dot + slope * tangent.logit * bar.y
        x_bar = self.inner.adjoint_tangent(state.inner, tangent.inner, bar.inner, inner_bar, width)
        weight = (y_bar_dot * state.y + bar.y * tangent.y).sum(-1, keepdim=True)
        logit = slope * (weight + (1 - 2 * state.weight) * tangent.logit * bar.weight)
        return x_bar + self.weigher.adjoint(logit, width)


def _slope(weight: Tensor) -> Tensor:
    return weight * (1 - weight)

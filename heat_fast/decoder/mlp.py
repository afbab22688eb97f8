"""The feed-forward layer, gated or plain, in four readings.

    gated: h = phi(g) o u, g = x W_g', u = x W_u'      plain: h = phi(g), g = x W_g' + b
    y = h W_down'

`phi'` and `phi''` come from differentiating the model's own activation module, element by element;
they and their products with primal values are made once and shared by every probe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import wide
from heat_fast.kernels.gated import gate_adjoint_tangent, gate_tangent

Activation = nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeedForwardSizes:
    """What one row meets in a feed-forward layer, in numbers.

    `hidden`: pre-activations; `inner`: what is multiplied by `W_down`; `weights`: those that it is
    multiplied by; `passed`: what goes into and out of products; `gathered`: copies of the row and
    of what becomes of it, one for each of its experts; `experts`: the weights of all experts, of
    which `chance` is a row's share.
    """

    hidden: int
    inner: int
    weights: int
    passed: int
    gathered: int = 0
    experts: int = 0
    chance: float = 1.0

    def __add__(self, other: FeedForwardSizes) -> FeedForwardSizes:
        """Of two layers that a row meets together, of which one has experts at most."""
        routed = self if self.experts else other
        return FeedForwardSizes(
            self.hidden + other.hidden,
            self.inner + other.inner,
            self.weights + other.weights,
            self.passed + other.passed,
            self.gathered + other.gathered,
            routed.experts,
            routed.chance,
        )

    def read(self, rows: int) -> int:
        """The weights that a batch of rows reads, where experts are chosen evenly."""
        spared = self.experts * (1 - self.chance) ** rows
        return self.weights + round(self.experts * (1 - self.chance) - spared)


class FeedForward(Protocol):
    """A feed-forward layer in four readings; its records have `rows`, and its states `first`.

    `routed`: whether rows go to some of its experts.
    """

    routed: bool

    @property
    def activations(self) -> tuple[Activation, ...]: ...

    @property
    def linears(self) -> tuple[Linear, ...]: ...

    def sizes(self, row: Tensor) -> FeedForwardSizes: ...

    def forward(self, x: Tensor) -> tuple[Tensor, Any]: ...

    def with_derivatives(self, state: Any) -> Any: ...

    def tangent(self, state: Any, x_dot: Tensor) -> tuple[Tensor, Any]: ...

    def adjoint(self, state: Any, y_bar: Tensor, width: int) -> tuple[Tensor, Any]: ...

    def adjoint_tangent(
        self, state: Any, tangent: Any, bar: Any, y_bar_dot: Tensor, width: int
    ) -> Tensor: ...


def derivatives(activation: Activation, gate: Tensor, order: int) -> tuple[Tensor, ...]:
    """`(phi, phi', ..)` at `gate` up to `order`, element by element, in its dtype."""
    with torch.enable_grad():
        x = gate.detach().to(wide(gate.dtype)).requires_grad_()
        x = x.view_as(x)  # torch's counters of FLOPs hook modules, and bear no leaves in them
        values = [activation(x)]
        for step in range(order):
            total = values[-1].sum()
            if not total.requires_grad:  # e.g. the second derivative of a ReLU
                values.append(torch.zeros_like(x))
                continue
            (slope,) = torch.autograd.grad(total, x, create_graph=step + 1 < order)
            values.append(slope)
    return tuple(value.detach().to(gate.dtype) for value in values)


@dataclass(frozen=True)
class MlpState:
    """Primal pre-activations, `[S, f]`: `gate` (g) and `up` (u, None for a plain layer).

    `value` (phi) and `slope` (phi' o u; plain: phi') are kept where many probes will share them.
    """

    gate: Tensor
    up: Tensor | None
    value: Tensor | None = None
    slope: Tensor | None = None

    def first(self) -> MlpState:
        """The state of the first of a batch."""
        return MlpState(self.gate[0], None if self.up is None else self.up[0])

    def rows(self, rows: slice) -> MlpState:
        """The same state for some of its rows."""

        def cut(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[rows]

        return MlpState(self.gate[rows], cut(self.up), cut(self.value), cut(self.slope))


@dataclass(frozen=True)
class MlpAdjoint:
    """Primal adjoints inside the layer, `[S, f]`: `h_ o phi'` and `h_ o u o phi''`."""

    slope: Tensor
    bend: Tensor

    def rows(self, rows: slice) -> MlpAdjoint:
        """The same adjoint for some of its rows."""
        return MlpAdjoint(self.slope[rows], self.bend[rows])


@dataclass(frozen=True)
class MlpTangent:
    """Tangents of the pre-activations, `[B, S, f]`."""

    gate: Tensor
    up: Tensor | None

    def rows(self, rows: slice) -> MlpTangent:
        """The same tangents for some of their rows."""
        return MlpTangent(self.gate[:, rows], None if self.up is None else self.up[:, rows])


class Mlp:
    """A feed-forward layer over the model's own linear and activation modules.

    Either `gate` and `up` are separate (`up=None`: plain layer), or `fused=True` and `gate` yields
    both halves side by side, the gate first.
    """

    routed = False

    def __init__(
        self,
        gate: Linear,
        up: Linear | None,
        down: Linear,
        activation: Activation,
        *,
        fused: bool = False,
    ) -> None:
        self.gate = gate
        self.up = up
        self.down = down
        self.activation = activation
        self.fused = fused

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The one there is."""
        return (self.activation,)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All affine submodules."""
        return tuple(layer for layer in (self.gate, self.up, self.down) if layer is not None)

    def sizes(self, row: Tensor) -> FeedForwardSizes:
        """What a row meets, and what of it is kept."""
        gate, width = self.gate.out_features(row), row.shape[-1]
        hidden = gate + (0 if self.up is None else self.up.out_features(row))
        inner = gate // 2 if self.fused else gate
        weights = (hidden + inner) * width
        passed = hidden + inner + (2 if self.up is None else 3) * width
        return FeedForwardSizes(hidden, inner, weights, passed)

    def _split(self, read: Callable[[Linear], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Gate and up values from one reading (`forward` or `tangent`) of the input layers."""
        gate = read(self.gate)
        if self.fused:
            left, right = gate.chunk(2, dim=-1)
            return left, right
        return gate, None if self.up is None else read(self.up)

    def forward(self, x: Tensor) -> tuple[Tensor, MlpState]:
        """`y [..., S, d]` and the pre-activations."""
        gate, up = self._split(lambda linear: linear.forward(x))
        hidden = self.activation(gate)
        y = self.down.forward(hidden if up is None else hidden * up)
        return y, MlpState(gate, up)

    def with_derivatives(self, state: MlpState) -> MlpState:
        """The state with `phi` and `phi' o u` kept: worth their memory when many probes follow."""
        value, slope = self._slopes(state)
        return replace(state, value=value, slope=slope)

    def _slopes(self, state: MlpState) -> tuple[Tensor, Tensor]:
        """`phi` and `phi' o u` (plain: `phi'`)."""
        if state.value is not None and state.slope is not None:
            return state.value, state.slope
        value, slope = derivatives(self.activation, state.gate, 1)
        return value, slope if state.up is None else slope * state.up

    def tangent(self, state: MlpState, x_dot: Tensor) -> tuple[Tensor, MlpTangent]:
        """`h. = phi' u g. + phi u.`, `y. = h. W_down'`."""
        gate, up = self._split(lambda linear: linear.tangent(x_dot))
        value, slope = self._slopes(state)
        hidden = slope * gate if up is None else gate_tangent(value, slope, gate, up)
        return self.down.tangent(hidden), MlpTangent(gate, up)

    def adjoint(self, state: MlpState, y_bar: Tensor, width: int) -> tuple[Tensor, MlpAdjoint]:
        """`x_`, by `h_ = y_ W_down`, `g_ = h_ u phi'`, `u_ = h_ phi`."""
        hidden = self.down.adjoint(y_bar, state.gate.shape[-1])
        value, slope, bend = derivatives(self.activation, state.gate, 2)
        kept = MlpAdjoint(hidden * slope, hidden * bend)
        if state.up is None:
            return self._pull(kept.slope, None, width), kept
        kept = MlpAdjoint(kept.slope, kept.bend * state.up)
        return self._pull(kept.slope * state.up, hidden * value, width), kept

    def adjoint_tangent(
        self,
        state: MlpState,
        tangent: MlpTangent,
        bar: MlpAdjoint,
        y_bar_dot: Tensor,
        width: int,
    ) -> Tensor:
        """`x_.`, with

        g_. = h_. u phi' + h_ u. phi' + h_ u phi'' g.,   u_. = h_. phi + h_ phi' g.
        """
        hidden_dot = self.down.adjoint(y_bar_dot, state.gate.shape[-1])
        value, slope = self._slopes(state)
        if tangent.up is None:
            gate_bar = (hidden_dot * slope).addcmul_(bar.bend, tangent.gate)
            return self._pull(gate_bar, None, width)
        gate_bar, up_bar = gate_adjoint_tangent(
            value, slope, bar.bend, bar.slope, tangent.gate, tangent.up, hidden_dot
        )
        return self._pull(gate_bar, up_bar, width)

    def _pull(self, gate: Tensor, up: Tensor | None, width: int) -> Tensor:
        """Adjoint of the input layers, `[..., S, f] -> [..., S, d]`."""
        if self.fused:
            assert up is not None
            return self.gate.adjoint(torch.cat((gate, up), dim=-1), width)
        x_bar = self.gate.adjoint(gate, width)
        if up is not None and self.up is not None:
            x_bar = x_bar + self.up.adjoint(up, width)
        return x_bar

"""A mixture of experts in place of a feed-forward layer, in four readings.

    y = sum_{e in T} w_e h_e W_down,e',   h_e = phi(g_e) o u_e,   [g_e | u_e] = x W_e'

with the experts `T` and weights `w` that a router finds (`router.py`); or, with biases and within a
bound c (gpt-oss), h_e = phi(min(g_e, c)) o (1 + clip(u_e, -c, c)); u stands for 1 + clip(u, -c, c)
then.

A row and one of its experts are a slot. Slots are sorted by expert, so that an expert multiplies
rows that lie together; what it makes of them is brought back and summed row by row, in the same
order in every run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Activation, FeedForwardSizes, derivatives
from heat_fast.decoder.product import product
from heat_fast.decoder.router import Router, Routing, RoutingTangent
from heat_fast.kernels.gated import gate_adjoint_tangent, gate_tangent


@dataclass(frozen=True)
class Slots:
    """`place [S, k]`: the slots of a row; `row`, `expert [n]`: of which row and expert each is.

    `counts`: how many slots each expert has.
    """

    place: Tensor
    row: Tensor
    expert: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def of(chosen: Tensor, experts: int) -> Slots:
        """From the experts `[S, k]`, of so many, that each row goes to."""
        expert, order = chosen.flatten().sort(stable=True)
        return Slots._sorted(order, expert, chosen.shape, experts)

    def all_of(self, rows: slice) -> bool:
        """Whether these are all rows."""
        return len(range(*rows.indices(len(self.place)))) == len(self.place)

    def cut(self, rows: slice) -> tuple[Slots, Tensor]:
        """The slots of some rows, and which of these they are."""
        place = self.place[rows]
        taken, order = place.flatten().sort()
        expert = self.expert[taken]
        return Slots._sorted(order, expert, place.shape, len(self.counts)), taken

    @staticmethod
    def _sorted(order: Tensor, expert: Tensor, shape: torch.Size, experts: int) -> Slots:
        """`order [n]`: where each slot was when they lay row by row."""
        counts = torch.bincount(expert, minlength=experts).tolist()
        return Slots(_inverse(order).view(shape), order // shape[1], expert, tuple(counts))

    def gather(self, x: Tensor) -> Tensor:
        """`[.., S, d] -> [.., n, d]`."""
        return x.index_select(-2, self.row)

    def sum(self, x: Tensor) -> Tensor:
        """`[.., n, d] -> [.., S, d]`: the sums over a row's slots."""
        parts: Tensor = x.index_select(-2, self.place.flatten()).unflatten(-2, self.place.shape)
        return parts.sum(-2)

    def scatter(self, a: Tensor) -> Tensor:
        """`[.., n] -> [.., S, E]`, zero where a row does not go."""
        result = a.new_zeros(*a.shape[:-1], len(self.place), len(self.counts))
        result[..., self.row, self.expert] = a
        return result


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


@dataclass(frozen=True)
class ExpertsState:
    """The primal: `gate`, `up [n, f]` and `weight [n]` (w) by slot, and the router's.

    `value` (phi) and `slope` (phi' o u) are kept where many probes will share them. `inside`:
    whether `up` is within its bound; None where it has none.
    """

    slots: Slots
    gate: Tensor
    up: Tensor
    weight: Tensor
    routing: Routing
    value: Tensor | None = None
    slope: Tensor | None = None
    inside: Tensor | None = None

    def first(self) -> ExpertsState:
        """The state of a batch of one, whose rows are all there are."""
        return self

    def rows(self, rows: slice) -> ExpertsState:
        """The same state for some of its rows."""
        if self.slots.all_of(rows):
            return self
        slots, taken = self.slots.cut(rows)

        def cut(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[taken]

        return ExpertsState(
            slots,
            self.gate[taken],
            self.up[taken],
            self.weight[taken],
            self.routing.rows(rows),
            cut(self.value),
            cut(self.slope),
            cut(self.inside),
        )

    def free(self, up: Tensor) -> Tensor:
        """A tangent or an adjoint of `up`, zero where it is bounded."""
        return up if self.inside is None else up * self.inside


@dataclass(frozen=True)
class ExpertsTangent:
    """Tangents `gate`, `up [B, n, f]`, `weight [B, n]`, the router's, and their slots."""

    slots: Slots
    gate: Tensor
    up: Tensor
    weight: Tensor
    routing: RoutingTangent

    def rows(self, rows: slice) -> ExpertsTangent:
        """The same tangents for some of their rows."""
        if self.slots.all_of(rows):
            return self
        slots, taken = self.slots.cut(rows)
        return ExpertsTangent(
            slots,
            self.gate[:, taken],
            self.up[:, taken],
            self.weight[:, taken],
            self.routing.rows(rows),
        )


@dataclass(frozen=True)
class ExpertsAdjoint:
    """Primal adjoints by slot, and their slots.

    `pulled [n, f]`: `W_down' y_`; `slope`, `bend [n, f]`: `h_ o phi'` and `h_ o u o phi''` with
    `h_ = w W_down' y_`; `weight [n]`: `w_`.
    """

    slots: Slots
    pulled: Tensor
    slope: Tensor
    bend: Tensor
    weight: Tensor

    def rows(self, rows: slice) -> ExpertsAdjoint:
        """The same adjoint for some of its rows."""
        if self.slots.all_of(rows):
            return self
        slots, taken = self.slots.cut(rows)
        parts = (part[taken] for part in (self.pulled, self.slope, self.bend, self.weight))
        return ExpertsAdjoint(slots, *parts)


class Experts:
    """A router and gated experts, whose weights are the model's own.

    `gate_up [E, 2 f, d]`, gates first or `interleaved` with their factors; `down [E, d, f]`;
    `biases`: of both, `[E, 2 f]`, `[E, d]`; `bound`: c, which the activation keeps to as well.
    """

    linears: tuple[Linear, ...] = ()
    routed = True

    def __init__(
        self,
        router: Router,
        gate_up: Tensor,
        down: Tensor,
        activation: Activation,
        *,
        interleaved: bool = False,
        biases: tuple[Tensor, Tensor] | None = None,
        bound: float | None = None,
    ) -> None:
        self.router = router
        self.gate_up = gate_up.detach()
        self.down = down.detach()
        self.activation = activation
        self.interleaved = interleaved
        self.biases = None if biases is None else (biases[0].detach(), biases[1].detach())
        self.bound = bound

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The one of all experts."""
        return (self.activation,)

    def sizes(self, row: Tensor) -> FeedForwardSizes:
        """What a row meets, and what of it is kept."""
        experts, width = self.router.weight.shape
        top = self.router.top
        inner = top * self.down.shape[-1]
        return FeedForwardSizes(
            hidden=2 * inner,
            inner=inner,
            weights=(experts * (1 if self.biases is None else 2) + 3 * inner) * width,
            passed=width + experts + top * 2 * width + 3 * inner,
            gathered=2 * top * width,
            experts=self.gate_up.numel() + self.down.numel(),
            chance=top / experts,
        )

    def _each(self, x: Tensor, slots: Slots, matrices: Tensor) -> Tensor:
        """Slots `x [.., n, i]` times their experts' matrices `[E, i, o]`."""
        parts = [
            product(part, matrix)
            for part, matrix in zip(x.split(slots.counts, -2), matrices, strict=True)
            if part.shape[-2]
        ]
        return torch.cat(parts, -2) if parts else x.new_empty(*x.shape[:-1], matrices.shape[-1])

    def _in(self, x: Tensor, slots: Slots, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates and factors `[.., n, f]` of rows `[.., S, d]`."""
        features = self._each(slots.gather(x), slots, self.gate_up.mT)
        if bias is not None:
            features = features + bias[slots.expert]
        if self.interleaved:  # copies: a view would keep what it is a part of
            return features[..., ::2].contiguous(), features[..., 1::2].contiguous()
        gate, up = features.chunk(2, -1)
        return gate, up

    def _out(self, hidden: Tensor, weight: Tensor, slots: Slots) -> Tensor:
        """`sum_e h_e W_down' + w_e b_down`, `h_e` weighed already; `weight [.., n]`."""
        y = slots.sum(self._each(hidden, slots, self.down.mT))
        if self.biases is not None:
            y = y + product(slots.scatter(weight), self.biases[1])
        return y

    def _along(self, y_bar: Tensor, slots: Slots) -> Tensor | float:
        """What the biases add to the adjoint of the weights: `<y_, b_down>`, `[.., n]`."""
        if self.biases is None:
            return 0.0
        return product(y_bar, self.biases[1].mT)[..., slots.row, slots.expert]

    def _pull(self, gate: Tensor, up: Tensor, slots: Slots) -> Tensor:
        """Adjoint of the experts' input, `[.., S, d]`."""
        parts = (gate, up)
        features = torch.stack(parts, -1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
        return slots.sum(self._each(features, slots, self.gate_up))

    def forward(self, x: Tensor) -> tuple[Tensor, ExpertsState]:
        """`y [.., S, d]`, and the primal of all rows in one list."""
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights, routing = self.router.forward(flat)
        slots = Slots.of(chosen, len(self.gate_up))
        weight = weights[slots.row, slots.expert].to(x.dtype)
        gate, up = self._in(flat, slots, None if self.biases is None else self.biases[0])
        inside = None
        if self.bound is not None:
            inside = up.abs() <= self.bound
            up = 1 + up.clamp(-self.bound, self.bound)
        hidden = self.activation(gate) * up * weight[:, None]
        y = self._out(hidden, weight, slots).view(x.shape)
        return y, ExpertsState(slots, gate, up, weight, routing, inside=inside)

    def with_derivatives(self, state: ExpertsState) -> ExpertsState:
        """The state with `phi` and `phi' o u` kept: worth their memory when many probes follow."""
        value, slope = self._slopes(state)
        return replace(state, value=value, slope=slope)

    def _slopes(self, state: ExpertsState) -> tuple[Tensor, Tensor]:
        """`phi` and `phi' o u`."""
        if state.value is not None and state.slope is not None:
            return state.value, state.slope
        value, slope = derivatives(self.activation, state.gate, 1)
        return value, slope * state.up

    def tangent(self, state: ExpertsState, x_dot: Tensor) -> tuple[Tensor, ExpertsTangent]:
        """`h. = phi' u g. + phi u.`, `y. = sum_e (w. h + w h.) W_down'`, for `x. [B, S, d]`."""
        slots = state.slots
        relative, routing = self.router.tangent(state.routing, x_dot)
        weight = state.weight * relative[:, slots.row, slots.expert].to(x_dot.dtype)
        gate, up = self._in(x_dot, slots)
        gate, up = gate.contiguous(), state.free(up).contiguous()
        value, slope = self._slopes(state)
        hidden = gate_tangent(value, slope, gate, up) * state.weight[:, None]
        hidden = hidden + weight[..., None] * (value * state.up)
        y = self._out(hidden, weight, slots)
        return y, ExpertsTangent(slots, gate, up, weight, routing)

    def adjoint(
        self, state: ExpertsState, y_bar: Tensor, width: int
    ) -> tuple[Tensor, ExpertsAdjoint]:
        """`x_ [S, d]`, by `h_ = w W_down' y_` and, for the router, `w_ = <W_down' y_, h>`."""
        slots = state.slots
        pulled = self._each(slots.gather(y_bar), slots, self.down)
        value, slope, bend = derivatives(self.activation, state.gate, 2)
        weight = (pulled * value * state.up).sum(-1) + self._along(y_bar, slots)
        hidden = pulled * state.weight[:, None]
        kept = ExpertsAdjoint(slots, pulled, hidden * slope, hidden * bend * state.up, weight)
        experts = self._pull(kept.slope * state.up, state.free(hidden * value), slots)
        along = slots.scatter((weight * state.weight).to(state.routing.share.dtype))
        return experts + self.router.adjoint(state.routing, along).to(experts.dtype), kept

    def adjoint_tangent(
        self,
        state: ExpertsState,
        tangent: ExpertsTangent,
        bar: ExpertsAdjoint,
        y_bar_dot: Tensor,
        width: int,
    ) -> Tensor:
        """`x_. [B, S, d]`: `g_.`, `u_.` are an MLP's for `h_. = w. W_down' y_ + w W_down' y_.`;

        w_. = <W_down' y_., h> + <W_down' y_, h.>,   (w_ w). = w_. w + w_ w.
        """
        slots = state.slots
        pulled = self._each(slots.gather(y_bar_dot), slots, self.down)
        value, slope = self._slopes(state)
        hidden_dot = gate_tangent(value, slope, tangent.gate, tangent.up)
        weight = (pulled * (value * state.up)).sum(-1) + (bar.pulled * hidden_dot).sum(-1)
        weight = weight + self._along(y_bar_dot, slots)
        hidden_bar = pulled * state.weight[:, None] + tangent.weight[..., None] * bar.pulled
        gate, up = gate_adjoint_tangent(
            value, slope, bar.bend, bar.slope, tangent.gate, tangent.up, hidden_bar
        )
        experts = self._pull(gate, state.free(up), slots)
        dtype = state.routing.share.dtype
        along = slots.scatter((bar.weight * state.weight).to(dtype))
        moved = weight * state.weight + bar.weight * tangent.weight
        along_dot = slots.scatter(moved.to(dtype))
        router = self.router.adjoint_tangent(state.routing, tangent.routing, along, along_dot)
        return experts + router.to(experts.dtype)

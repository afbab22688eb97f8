"""A mixture of experts in place of a feed-forward layer, in four readings.

    z = x W_r',  p = softmax(z),  T the k experts of the largest p,  w = p_T or p_T / sum p_T
    y = sum_{e in T} w_e h_e W_down,e',   h_e = phi(g_e) o u_e,   [g_e | u_e] = x W_e'

or, with biases and within a bound c (gpt-oss), h_e = phi(min(g_e, c)) o (1 + clip(u_e, -c, c)); u
stands for 1 + clip(u, -c, c) then.

Which experts a row goes to is piecewise constant: derivatives are those of the piece that the trunk
is on, a branch chooses for itself. Of both kinds of weights

    w_e. = w_e (z_e. - <q, z.>),   q = w on T, 0 elsewhere, or p,   q. = q o (z. - <q, z.>)

A row and one of its experts are a slot. Slots are sorted by expert, so that an expert multiplies
rows that lie together; what it makes of them is brought back and summed row by row, in the same
order in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import FeedForwardSizes, derivatives
from heat_fast.decoder.norm import wide
from heat_fast.decoder.product import affine, product
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.gated import gate_adjoint_tangent, gate_tangent

_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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

    def total(self, a: Tensor) -> Tensor:
        """`[.., n] -> [.., S, 1]`, likewise."""
        return a[..., self.place].sum(-1, keepdim=True)

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
    """The primal: `gate`, `up [n, f]` by slot, `weight [n]` (w) and `share [S, E]` (q).

    `value` (phi) and `slope` (phi' o u) are kept where many probes will share them. `inside`:
    whether `up` is within its bound; None where it has none.
    """

    slots: Slots
    gate: Tensor
    up: Tensor
    weight: Tensor
    share: Tensor
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
            self.share[rows],
            cut(self.value),
            cut(self.slope),
            cut(self.inside),
        )

    def free(self, up: Tensor) -> Tensor:
        """A tangent or an adjoint of `up`, zero where it is bounded."""
        return up if self.inside is None else up * self.inside


@dataclass(frozen=True)
class ExpertsTangent:
    """Tangents `gate`, `up [B, n, f]`, `weight [B, n]` and `share [B, S, E]`, and their slots."""

    slots: Slots
    gate: Tensor
    up: Tensor
    weight: Tensor
    share: Tensor

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
            self.share[:, rows],
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

    `router [E, d]`; `gate_up [E, 2 f, d]`, gates first or `interleaved` with their factors; `down
    [E, d, f]`; `top`: k; `renormalised`: whether the weights of a row's experts sum to 1; `biases`:
    of the three, `[E]`, `[E, 2 f]`, `[E, d]`; `bound`: c, which the activation keeps to as well.
    """

    linears: tuple[Linear, ...] = ()

    def __init__(
        self,
        router: Tensor,
        gate_up: Tensor,
        down: Tensor,
        activation: nn.Module | Callable[[Tensor], Tensor],
        *,
        top: int,
        renormalised: bool,
        interleaved: bool = False,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        bound: float | None = None,
    ) -> None:
        self.router = router.detach()
        self.gate_up = gate_up.detach()
        self.down = down.detach()
        self.activation = activation
        self.top = top
        self.renormalised = renormalised
        self.interleaved = interleaved
        self.biases = None if biases is None else tuple(bias.detach() for bias in biases)
        self.bound = bound

    def sizes(self, row: Tensor) -> FeedForwardSizes:
        """What a row meets, and what of it is kept."""
        experts, width = self.router.shape
        inner = self.top * self.down.shape[-1]
        return FeedForwardSizes(
            hidden=2 * inner,
            inner=inner,
            weights=(experts * (1 if self.biases is None else 2) + 3 * inner) * width,
            passed=width + experts + self.top * 2 * width + 3 * inner,
            gathered=2 * self.top * width,
            experts=self.gate_up.numel() + self.down.numel(),
            chance=self.top / experts,
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
            y = y + product(slots.scatter(weight), self.biases[2])
        return y

    def _along(self, y_bar: Tensor, slots: Slots) -> Tensor | float:
        """What the biases add to the adjoint of the weights: `<y_, b_down>`, `[.., n]`."""
        if self.biases is None:
            return 0.0
        return product(y_bar, self.biases[2].mT)[..., slots.row, slots.expert]

    def _pull(self, gate: Tensor, up: Tensor, logits: Tensor, slots: Slots) -> Tensor:
        """Adjoint of the experts' and the router's input, `[.., S, d]`."""
        parts = (gate, up)
        features = torch.stack(parts, -1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
        x_bar = slots.sum(self._each(features, slots, self.gate_up))
        return x_bar + product(logits.to(x_bar.dtype), self.router)

    def forward(self, x: Tensor) -> tuple[Tensor, ExpertsState]:
        """`y [.., S, d]`, and the primal of all rows in one list."""
        flat = x.reshape(-1, x.shape[-1])
        router_bias, bias, _ = self.biases or (None, None, None)
        logits = affine(flat, self.router, router_bias)
        share = logits.to(wide(logits.dtype)).softmax(-1)
        weight, chosen = share.topk(self.top, dim=-1)
        if self.renormalised:
            weight = weight / weight.sum(-1, keepdim=True)
            share = torch.zeros_like(share).scatter_(-1, chosen, weight)
        slots = Slots.of(chosen, len(self.router))
        by_slot = share[slots.row, slots.expert].to(x.dtype)
        gate, up = self._in(flat, slots, bias)
        inside = None
        if self.bound is not None:
            inside = up.abs() <= self.bound
            up = 1 + up.clamp(-self.bound, self.bound)
        hidden = self.activation(gate) * up * by_slot[:, None]
        y = self._out(hidden, by_slot, slots).view(x.shape)
        return y, ExpertsState(slots, gate, up, by_slot, share, inside=inside)

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
        slots, share = state.slots, state.share
        logits = product(x_dot, self.router.mT).to(share.dtype)
        moved = logits - (share * logits).sum(-1, keepdim=True)
        weight = state.weight * moved[:, slots.row, slots.expert].to(x_dot.dtype)
        gate, up = self._in(x_dot, slots)
        gate, up = gate.contiguous(), state.free(up).contiguous()
        value, slope = self._slopes(state)
        hidden = gate_tangent(value, slope, gate, up) * state.weight[:, None]
        hidden = hidden + weight[..., None] * (value * state.up)
        y = self._out(hidden, weight, slots)
        return y, ExpertsTangent(slots, gate, up, weight, share * moved)

    def adjoint(
        self, state: ExpertsState, y_bar: Tensor, width: int
    ) -> tuple[Tensor, ExpertsAdjoint]:
        """`x_ [S, d]`, by `h_ = w W_down' y_`, `w_ = <W_down' y_, h>`, and

        z_ = a - q sum a,   a = w_ w.
        """
        slots = state.slots
        pulled = self._each(slots.gather(y_bar), slots, self.down)
        value, slope, bend = derivatives(self.activation, state.gate, 2)
        weight = (pulled * value * state.up).sum(-1) + self._along(y_bar, slots)
        hidden = pulled * state.weight[:, None]
        kept = ExpertsAdjoint(slots, pulled, hidden * slope, hidden * bend * state.up, weight)
        along = (weight * state.weight).to(state.share.dtype)
        logits = slots.scatter(along) - state.share * slots.total(along)
        up = state.free(hidden * value)
        return self._pull(kept.slope * state.up, up, logits, slots), kept

    def adjoint_tangent(
        self,
        state: ExpertsState,
        tangent: ExpertsTangent,
        bar: ExpertsAdjoint,
        y_bar_dot: Tensor,
        width: int,
    ) -> Tensor:
        """`x_. [B, S, d]`: `g_.`, `u_.` are an MLP's for `h_. = w. W_down' y_ + w W_down' y_.`;

        w_. = <W_down' y_., h> + <W_down' y_, h.>,   a. = w_. w + w_ w.,
        z_. = a. - q. sum a - q sum a.
        """
        slots, share = state.slots, state.share
        pulled = self._each(slots.gather(y_bar_dot), slots, self.down)
        value, slope = self._slopes(state)
        hidden_dot = gate_tangent(value, slope, tangent.gate, tangent.up)
        weight = (pulled * (value * state.up)).sum(-1) + (bar.pulled * hidden_dot).sum(-1)
        weight = weight + self._along(y_bar_dot, slots)
        hidden_bar = pulled * state.weight[:, None] + tangent.weight[..., None] * bar.pulled
        gate, up = gate_adjoint_tangent(
            value, slope, bar.bend, bar.slope, tangent.gate, tangent.up, hidden_bar
        )
        along = (bar.weight * state.weight).to(share.dtype)
        moved = (weight * state.weight + bar.weight * tangent.weight).to(share.dtype)
        logits = slots.scatter(moved) - share * slots.total(moved)
        logits = logits - tangent.share * slots.total(along)
        return self._pull(gate, state.free(up), logits, slots)


def experts_of(layer: Any) -> Experts:
    """A view of transformers' sparse block: its router `gate`, and `experts`.

    Mixtral's router does not say whether a row's weights sum to 1: they do.
    """
    router, experts = layer.gate, layer.experts
    return Experts(
        plain_tensor(router, "weight", 2),
        plain_tensor(experts, "gate_up_proj", 3),
        plain_tensor(experts, "down_proj", 3),
        experts.act_fn,
        top=router.top_k,
        renormalised=getattr(router, "norm_topk_prob", True),
    )


def plain_tensor(module: Any, name: str, dimensions: int) -> Tensor:
    """A tensor of a module whose numbers torch multiplies."""
    if hasattr(module, "base_layer"):
        raise UnsupportedModelError(
            f"a {type(module).__name__} stands in place of a router or of experts: expected "
            "transformers' own, whose derivatives are written out. If it is an adapter, merge it "
            "into the model (PEFT: merge_and_unload())."
        )
    weight = getattr(module, name, None)
    usable = isinstance(weight, Tensor) and weight.dtype in _NUMBERS and not weight.is_meta
    if isinstance(weight, Tensor) and usable and weight.dim() == dimensions:
        return weight
    raise UnsupportedModelError(
        f"a {type(module).__name__} has no plain {name} of {dimensions} dimensions: expected the "
        "weights of its experts as transformers loads them, [E, 2 f, d] and [E, d, f] in float64, "
        "float32, bfloat16 or float16. Load the model without quantising its experts, or upgrade "
        "transformers."
    )

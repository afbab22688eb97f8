"""Attention's tangent, adjoint and tangent of adjoint, in plain torch.

`P` are the softmax rows, `c` the scale; a dot is a tangent, a bar (`_`) an adjoint:

    S. = c (Q. K' + Q K.'),  m = rowsum(P o S.),  P. = P o (S. - m),  O. = P. V + P V.
    D = rowsum(O_ o O),      D. = rowsum(O_. o O + O_ o O.)
    dP = O_ V',              dP. = O_. V' + O_ V.'
    dS = P o (dP - D),       dS. = P. o (dP - D) + P o (dP. - D.)
    Q_ = c dS K,             Q_. = c (dS. K + dS K.)
    K_ = c dS' Q,            K_. = c (dS.' Q + dS' Q.)
    V_ = P' O_,              V_. = P.' O_ + P' O_.

A soft-cap `s = cap tanh(u/cap)`, `u` the raw score, multiplies by `w = 1 - tanh^2`: `S. = w U.`,
`dU = w dS`, `dU. = w dS. + w. dS` with `w. = -2 tanh w U. / cap`.

A sink, a logit of the head's that takes its share of every softmax row and has no value, is in the
normaliser: the rows of `P` then sum to less than 1, and all of the above holds as it stands.

`P`, `dP`, `dS` belong to the primal: they are formed once and shared by a batch of `B` probes.
Key and value tangents vanish below position `start` (a causal model does not move before the
perturbed token), so the sums over keys split into a shared prefix and the probes' own rows; all
rows are exact. Half-precision inputs are summed in float32 and returned as they came. Layout as in
`branch_attention`: head-major, `G` query heads per key-value head. Works by tiles of heads and
queries: memory is linear in the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heat_fast.kernels.branch_attention.reference import (
    Masking,
    shared_left,
    shared_right,
    tile_shape,
)


@dataclass(frozen=True)
class Primal:
    """What the unmodified context leaves behind, for query rows `[Q]` and all keys `[0, stop)`.

    `query`, `output`: `[Hk, G, Q, D]`; `key`, `value`: `[Hk, stop, D]`; `normaliser` (log-sum-exp):
    `[Hk, G, Q]`. The queries stand at the last `Q` positions before `stop`; tangents of keys and
    values begin at `start`, which is not above the first query. `sunk [Hk, G, Q]`: what the rows of
    P lack of 1, the share of a sink that is in the normaliser; None without one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    normaliser: Tensor
    output: Tensor
    start: int
    masking: Masking
    sunk: Tensor | None = None

    def tiles(self, batch: int) -> Iterator[tuple[slice, slice]]:
        """Slices of key-value heads and of queries whose scores for `batch` probes stay in cache.

        Every quantity of a query row is its own; what is summed over rows is summed over tiles.
        """
        heads, group, queries, _ = self.query.shape
        per_row = batch * group * self.key.shape[1]
        rows, step = tile_shape(heads, per_row, queries, self.query.device)
        for head in range(0, heads, step):
            for low in range(0, queries, rows):
                yield slice(head, min(head + step, heads)), slice(low, min(low + rows, queries))

    def rows(self, heads: slice, queries: slice) -> _Rows:
        """The softmax rows of a tile, from the log-sum-exp, up to its last visible key."""
        sums = self.normaliser.dtype
        first = self.key.shape[1] - self.query.shape[2] + queries.start
        stop = first + queries.stop - queries.start
        query = self.query[heads, :, queries].flatten(1, 2).to(sums)
        output = self.output[heads, :, queries].flatten(1, 2).to(sums)
        normaliser = self.normaliser[heads, :, queries].flatten(1, 2)[..., None]
        positions = torch.arange(first, stop, device=query.device)
        bounds = [(self.start, stop)]
        if self.masking.first_key(first) < self.start:
            bounds.append((self.masking.first_key(first), self.start))
        parts = []
        for low, high in bounds:
            key, value = self.key[heads, low:high].to(sums), self.value[heads, low:high].to(sums)
            scores = (query @ key.transpose(1, 2)).mul_(self.masking.scale)
            slope = bend = None
            if self.masking.softcap is not None:
                ratio = torch.tanh(scores / self.masking.softcap)
                scores = self.masking.softcap * ratio
                slope = 1 - ratio.square()
                bend = (-2 / self.masking.softcap) * ratio * slope
            weights = scores.sub_(normaliser).exp_()
            if low == self.start or self.masking.window is not None:
                keys = torch.arange(low, high, device=query.device)
                hidden = self.masking.hidden(positions, keys).repeat(self.query.shape[1], 1)
                weights.masked_fill_(hidden, 0.0)
            parts.append(_Part(slice(low, high), key, value, weights, slope, bend))
        return _Rows(query, output, parts[0], parts[1:])


@dataclass(frozen=True)
class _Part:
    """Keys and values `[H, K, D]` of some positions, and a tile's `weights` (P) on them.

    `slope` (w) and `bend` (w./U.) belong to the soft-cap.
    """

    keys: slice
    key: Tensor
    value: Tensor
    weights: Tensor
    slope: Tensor | None
    bend: Tensor | None


@dataclass(frozen=True)
class _Rows:
    """One tile: `query`, `output [H, GQ, D]`; the probes' own keys, and the prefix if visible."""

    query: Tensor
    output: Tensor
    own: _Part
    prefix: list[_Part]

    @property
    def parts(self) -> list[_Part]:
        """The own keys first."""
        return [self.own, *self.prefix]


def _flat(x: Tensor, heads: slice, queries: slice, dtype: torch.dtype) -> Tensor:
    """`[Hk, B, G, Q, D] -> [H, B, GQ, D]` of a tile, in the dtype of the sums."""
    return x[heads, :, :, queries].flatten(2, 3).to(dtype)


def _pair(dotted: Tensor, plain: Tensor, other: Tensor, other_dotted: Tensor) -> Tensor:
    """`dotted other' + plain other_dotted'` as one product with twice the inner dimension.

    `dotted [H, B, m, D]`, `plain [H, m, D]`, `other [H, n, D]`, `other_dotted [H, B, n, D]`.
    """
    left = torch.cat((dotted, plain[:, None].expand_as(dotted)), dim=-1)
    right = torch.cat((other[:, None].expand_as(other_dotted), other_dotted), dim=-1)
    return left @ right.transpose(2, 3)


def _products(
    rows: _Rows, moved: Tensor, fixed: Tensor, of: str, own_moved: Tensor
) -> list[Tensor]:
    """`moved X' + fixed X.'` on every part, where only the own rows of X (`of`) move."""
    results = [_pair(moved, fixed, getattr(rows.own, of), own_moved)]
    results += [shared_right(moved, getattr(part, of).transpose(1, 2)) for part in rows.prefix]
    return results


def _softmax_tangent(rows: _Rows, raw: list[Tensor]) -> list[Tensor]:
    """`P. = P o (S. - rowsum(P o S.))` on every part, written over the raw score tangents."""
    scores = [
        values if part.slope is None else values * part.slope[:, None]
        for part, values in zip(rows.parts, raw, strict=True)
    ]
    mean = torch.zeros_like(raw[0][..., :1])
    for part, values in zip(rows.parts, scores, strict=True):
        mean += (part.weights[:, None] * values).sum(-1, keepdim=True)
    return [
        values.sub_(mean).mul_(part.weights[:, None])
        for part, values in zip(rows.parts, scores, strict=True)
    ]


def _mix(rows: _Rows, weights: list[Tensor], of: str) -> Tensor:
    """`sum over parts of weights X`, `[H, B, GQ, D]`."""
    total = shared_right(weights[0], getattr(rows.own, of))
    for part, values in zip(rows.prefix, weights[1:], strict=True):
        total = total + shared_right(values, getattr(part, of))
    return total


def attention_tangent(primal: Primal, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`O.`, `[Hk, B, G, Q, D]`, from `query [Hk, B, G, Q, D]`, `key`, `value [Hk, B, S, D]`."""
    scale = primal.masking.scale
    output = torch.empty_like(query)
    sums, group = primal.normaliser.dtype, query.shape[2]
    for heads, queries in primal.tiles(query.shape[1]):
        rows = primal.rows(heads, queries)
        seen = slice(0, rows.own.key.shape[1])
        query_dot = _flat(query, heads, queries, sums) * scale
        key_dot, value_dot = key[heads, :, seen].to(sums), value[heads, :, seen].to(sums)
        raw = _products(rows, query_dot, rows.query * scale, "key", key_dot)
        total = _mix(rows, _softmax_tangent(rows, raw), "value")
        total = total + shared_left(rows.own.weights, value_dot)
        output[heads, :, :, queries] = total.unflatten(2, (group, -1)).to(output.dtype)
    return output


def attention_adjoint(primal: Primal, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Q_ [Hk, G, Q, D]`, `K_`, `V_ [Hk, stop, D]` from the output's adjoint `[Hk, G, Q, D]`."""
    sums, group, scale = primal.normaliser.dtype, output.shape[1], primal.masking.scale
    query = torch.empty_like(primal.query)
    key = torch.zeros_like(primal.key, dtype=sums)
    value = torch.zeros_like(primal.value, dtype=sums)
    for heads, queries in primal.tiles(1):
        rows = primal.rows(heads, queries)
        pulled = output[heads, :, queries].flatten(1, 2).to(sums)
        shift = (pulled * rows.output).sum(-1, keepdim=True)
        total = torch.zeros_like(rows.query)
        for part in rows.parts:
            scores = (pulled @ part.value.transpose(1, 2)).sub_(shift).mul_(part.weights)
            if part.slope is not None:
                scores = scores * part.slope
            total += scores @ part.key
            key[heads, part.keys] += scale * (scores.transpose(1, 2) @ rows.query)
            value[heads, part.keys] += part.weights.transpose(1, 2) @ pulled
        query[heads, :, queries] = (scale * total).unflatten(1, (group, -1)).to(query.dtype)
    return query, key.to(primal.key.dtype), value.to(primal.value.dtype)


def attention_adjoint_tangent(
    primal: Primal,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    output_bar: Tensor,
    output_bar_dot: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Q_. [Hk, B, G, Q, D]`, `K_.` and `V_. [Hk, B, S, D]`.

    `query`, `key`, `value`, `output` are the tangents going up; `output_bar [Hk, G, Q, D]` is the
    primal adjoint, `output_bar_dot [Hk, B, G, Q, D]` its tangent.
    """
    sums, group, scale = primal.normaliser.dtype, query.shape[2], primal.masking.scale
    query_result = torch.empty_like(query)
    key_result = torch.zeros_like(key, dtype=sums)
    value_result = torch.zeros_like(value, dtype=sums)
    for heads, queries in primal.tiles(query.shape[1]):
        rows = primal.rows(heads, queries)
        seen = slice(0, rows.own.key.shape[1])
        query_dot = _flat(query, heads, queries, sums) * scale
        out_dot = _flat(output, heads, queries, sums)
        bar_dot = _flat(output_bar_dot, heads, queries, sums)
        key_dot, value_dot = key[heads, :, seen].to(sums), value[heads, :, seen].to(sums)
        bar = output_bar[heads, :, queries].flatten(1, 2).to(sums)
        scaled = rows.query * scale

        raw = _products(rows, query_dot, scaled, "key", key_dot)
        bent = [
            None if part.bend is None else values * part.bend[:, None]
            for part, values in zip(rows.parts, raw, strict=True)
        ]
        moved = _softmax_tangent(rows, raw)
        shift = (bar * rows.output).sum(-1, keepdim=True)
        shift_dot = (bar_dot * rows.output[:, None] + bar[:, None] * out_dot).sum(-1, keepdim=True)
        scores_dot = _products(rows, bar_dot, bar, "value", value_dot)  # dP., becomes dS.
        scores = []
        for index, part in enumerate(rows.parts):
            centred = (bar @ part.value.transpose(1, 2)).sub_(shift)  # dP - D
            dotted = scores_dot[index].sub_(shift_dot).mul_(part.weights[:, None])
            dotted = dotted.addcmul_(moved[index], centred[:, None])
            plain = centred.mul_(part.weights)  # dS
            curved = bent[index]
            if part.slope is not None and curved is not None:
                dotted = (dotted * part.slope[:, None]).addcmul_(curved, plain[:, None])
                plain = plain * part.slope
            scores_dot[index] = dotted
            scores.append(plain)

        own, own_dot = scores[0], scores_dot[0]
        total = scale * (_mix(rows, scores_dot, "key") + shared_left(own, key_dot))
        query_result[heads, :, :, queries] = total.unflatten(2, (group, -1)).to(query.dtype)
        total = shared_right(own_dot.transpose(2, 3), scaled)
        key_result[heads, :, seen] += total + shared_left(own.transpose(1, 2), query_dot)
        total = shared_right(moved[0].transpose(2, 3), bar)
        value_result[heads, :, seen] += total + shared_left(
            rows.own.weights.transpose(1, 2), bar_dot
        )
    return query_result, key_result.to(key.dtype), value_result.to(value.dtype)

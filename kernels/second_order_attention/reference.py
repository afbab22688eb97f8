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
    TILE_ELEMENTS,
    Masking,
    shared_left,
    shared_right,
)


@dataclass(frozen=True)
class Primal:
    """What the unmodified context leaves behind, for query rows `[Q]` and all keys `[0, stop)`.

    `query`, `output`: `[Hk, G, Q, D]`; `key`, `value`: `[Hk, stop, D]`; `normaliser` (log-sum-exp):
    `[Hk, G, Q]`. The queries stand at the last `Q` positions before `stop`; tangents of keys and
    values begin at `start`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    normaliser: Tensor
    output: Tensor
    start: int
    masking: Masking

    def tiles(self, batch: int) -> Iterator[tuple[slice, slice]]:
        """Slices of key-value heads and of queries whose scores for `batch` probes stay in cache.

        Every quantity of a query row is its own; what is summed over rows is summed over tiles.
        """
        heads, group, queries, _ = self.query.shape
        per_row = max(1, batch * group * self.key.shape[1])
        rows = min(queries, max(1, TILE_ELEMENTS // per_row))
        step = max(1, TILE_ELEMENTS // (per_row * rows))
        for head in range(0, heads, step):
            for low in range(0, queries, rows):
                yield slice(head, min(head + step, heads)), slice(low, min(low + rows, queries))

    def rows(self, heads: slice, queries: slice) -> _Rows:
        """The softmax rows of a tile, from the log-sum-exp, up to its last visible key."""
        sums = self.normaliser.dtype
        count = self.query.shape[2]
        first = self.key.shape[1] - count + queries.start
        stop = self.key.shape[1] - count + queries.stop
        query = self.query[heads, :, queries].flatten(1, 2).to(sums)
        group = self.query.shape[1]
        key, value = self.key[heads, :stop].to(sums), self.value[heads, :stop].to(sums)
        scores = (query @ key.transpose(1, 2)).mul_(self.masking.scale)
        slope = bend = None
        if self.masking.softcap is not None:
            ratio = torch.tanh(scores / self.masking.softcap)
            scores = self.masking.softcap * ratio
            slope = 1 - ratio.square()
            bend = (-2 / self.masking.softcap) * ratio * slope
        positions = torch.arange(first, stop, device=query.device)
        hidden = self.masking.hidden(positions, torch.arange(stop, device=query.device))
        scores -= self.normaliser[heads, :, queries].flatten(1, 2)[..., None]
        weights = scores.exp_().masked_fill_(hidden.repeat(group, 1), 0.0)
        output = self.output[heads, :, queries].flatten(1, 2).to(sums)
        # Own keys that some query of the tile can see.
        own = slice(0, stop - self.start)
        return _Rows(query, key, value, output, weights, slope, bend, own)


@dataclass(frozen=True)
class _Rows:
    """One tile: `query`, `output [H, GQ, D]`, `weights` (P), `slope` (w), `bend` (w./U.).

    `own`: which of the probes' own keys, from `start` on, the tile can see.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    weights: Tensor
    slope: Tensor | None
    bend: Tensor | None
    own: slice


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


def _score_tangent(rows: _Rows, start: int, scale: float, query: Tensor, key: Tensor) -> Tensor:
    """`U. = c (Q. K' + Q K.')` over all keys, `[H, B, GQ, K]`."""
    stop = rows.key.shape[1]
    result = query.new_empty(*query.shape[:3], stop)
    if start:
        result[..., :start] = shared_right(query, rows.key[:, :start].transpose(1, 2))
    result[..., start:] = _pair(query, rows.query, rows.key[:, start:], key)
    return result.mul_(scale)


def _softmax_tangent(rows: _Rows, raw: Tensor) -> Tensor:
    """`P. = P o (S. - rowsum(P o S.))`, written over the raw score tangent."""
    scores = raw if rows.slope is None else raw * rows.slope[:, None]
    weights = rows.weights[:, None]
    mean = (weights * scores).sum(-1, keepdim=True)
    return scores.sub_(mean).mul_(weights)


def attention_tangent(primal: Primal, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`O.`, `[Hk, B, G, Q, D]`, from `query [Hk, B, G, Q, D]`, `key`, `value [Hk, B, S, D]`."""
    start, scale = primal.start, primal.masking.scale
    output = torch.empty_like(query)
    sums, group = primal.normaliser.dtype, query.shape[2]
    for heads, queries in primal.tiles(query.shape[1]):
        rows = primal.rows(heads, queries)
        query_dot = _flat(query, heads, queries, sums)
        key_dot, value_dot = key[heads, :, rows.own].to(sums), value[heads, :, rows.own].to(sums)
        raw = _score_tangent(rows, start, scale, query_dot, key_dot)
        total = shared_right(_softmax_tangent(rows, raw), rows.value)
        total = total + shared_left(rows.weights[..., start:], value_dot)
        output[heads, :, :, queries] = total.unflatten(2, (group, -1)).to(output.dtype)
    return output


def attention_adjoint(primal: Primal, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Q_ [Hk, G, Q, D]`, `K_`, `V_ [Hk, stop, D]` from the output's adjoint `[Hk, G, Q, D]`."""
    sums, group = primal.normaliser.dtype, output.shape[1]
    query = torch.empty_like(primal.query)
    key = torch.zeros_like(primal.key, dtype=sums)
    value = torch.zeros_like(primal.value, dtype=sums)
    scale = primal.masking.scale
    for heads, queries in primal.tiles(1):
        rows = primal.rows(heads, queries)
        stop = rows.key.shape[1]
        pulled = output[heads, :, queries].flatten(1, 2).to(sums)
        shift = (pulled * rows.output).sum(-1, keepdim=True)
        scores = (pulled @ rows.value.transpose(1, 2)).sub_(shift).mul_(rows.weights)
        if rows.slope is not None:
            scores = scores * rows.slope
        query[heads, :, queries] = (
            (scale * (scores @ rows.key)).unflatten(1, (group, -1)).to(query.dtype)
        )
        key[heads, :stop] += scale * (scores.transpose(1, 2) @ rows.query)
        value[heads, :stop] += rows.weights.transpose(1, 2) @ pulled
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
    start, scale = primal.start, primal.masking.scale
    sums, group = primal.normaliser.dtype, query.shape[2]
    query_result = torch.empty_like(query)
    key_result = torch.zeros_like(key, dtype=sums)
    value_result = torch.zeros_like(value, dtype=sums)
    for heads, queries in primal.tiles(query.shape[1]):
        rows = primal.rows(heads, queries)
        query_dot = _flat(query, heads, queries, sums)
        out_dot = _flat(output, heads, queries, sums)
        bar_dot = _flat(output_bar_dot, heads, queries, sums)
        key_dot, value_dot = key[heads, :, rows.own].to(sums), value[heads, :, rows.own].to(sums)
        bar = output_bar[heads, :, queries].flatten(1, 2).to(sums)

        raw = _score_tangent(rows, start, scale, query_dot, key_dot)
        bent = None if rows.bend is None else raw * rows.bend[:, None]
        moved = _softmax_tangent(rows, raw)

        shift = (bar * rows.output).sum(-1, keepdim=True)
        centred = (bar @ rows.value.transpose(1, 2)).sub_(shift)  # dP - D
        scores = rows.weights * centred  # dS
        shift_dot = (bar_dot * rows.output[:, None] + bar[:, None] * out_dot).sum(-1, keepdim=True)
        scores_dot = bar_dot.new_empty(raw.shape)  # starts as dP., becomes dS.
        if start:
            scores_dot[..., :start] = shared_right(bar_dot, rows.value[:, :start].transpose(1, 2))
        scores_dot[..., start:] = _pair(bar_dot, bar, rows.value[:, start:], value_dot)
        scores_dot.sub_(shift_dot).mul_(rows.weights[:, None])
        scores_dot.addcmul_(moved, centred[:, None])
        if rows.slope is not None and bent is not None:
            scores_dot = scores_dot * rows.slope[:, None] + bent * scores[:, None]
            scores = scores * rows.slope

        own, own_dot = scores[..., start:], scores_dot[..., start:]
        total = shared_right(scores_dot, rows.key) + shared_left(own, key_dot)
        total = (scale * total).unflatten(2, (group, -1))
        query_result[heads, :, :, queries] = total.to(query_result.dtype)
        total = shared_right(own_dot.transpose(2, 3), rows.query)
        total = total + shared_left(own.transpose(1, 2), query_dot)
        key_result[heads, :, rows.own] += scale * total
        total = shared_right(moved[..., start:].transpose(2, 3), bar)
        value_result[heads, :, rows.own] += total + shared_left(
            rows.weights[..., start:].transpose(1, 2), bar_dot
        )
    return query_result, key_result.to(key.dtype), value_result.to(value.dtype)

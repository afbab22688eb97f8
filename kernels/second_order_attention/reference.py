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
`branch_attention`: head-major, `G` query heads per key-value head. Memory: score tiles of one chunk
of heads at a time, `O(S K)`, and the stored rows, `O(S D)`.
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

    def chunks(self, batch: int) -> Iterator[slice]:
        """Slices of key-value heads whose score tiles for `batch` probes stay within cache."""
        heads, group, queries, _ = self.query.shape
        per_head = max(1, batch * group * queries * self.key.shape[1])
        step = max(1, TILE_ELEMENTS // per_head)
        for low in range(0, heads, step):
            yield slice(low, min(low + step, heads))

    def rows(self, heads: slice) -> _Rows:
        """The softmax rows of a chunk of heads, recomputed from the log-sum-exp."""
        sums = self.normaliser.dtype
        query = self.query[heads].to(sums)
        count, group, queries, width = query.shape
        query = query.reshape(count, group * queries, width)
        key, value = self.key[heads].to(sums), self.value[heads].to(sums)
        scores = (query @ key.transpose(1, 2)).mul_(self.masking.scale)
        slope = bend = None
        if self.masking.softcap is not None:
            ratio = torch.tanh(scores / self.masking.softcap)
            scores = self.masking.softcap * ratio
            slope = 1 - ratio.square()
            bend = (-2 / self.masking.softcap) * ratio * slope
        stop = self.key.shape[1]
        positions = torch.arange(stop - queries, stop, device=query.device)
        hidden = self.masking.hidden(positions, torch.arange(stop, device=query.device))
        scores -= self.normaliser[heads].reshape(count, group * queries, 1)
        weights = scores.exp_().masked_fill_(hidden.repeat(group, 1), 0.0)
        return _Rows(query, key, value, weights, slope, bend)


@dataclass(frozen=True)
class _Rows:
    """One chunk of heads: `query [H, GQ, D]`, `weights` (P), `slope` (w), `bend` (w./U.)."""

    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor
    slope: Tensor | None
    bend: Tensor | None


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[H, B, G, Q, D] -> [H, B, GQ, D]` in the dtype of the sums."""
    return x.flatten(2, 3).to(dtype)


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
    sums = primal.normaliser.dtype
    for heads in primal.chunks(query.shape[1]):
        rows = primal.rows(heads)
        raw = _score_tangent(rows, start, scale, _flat(query[heads], sums), key[heads].to(sums))
        total = shared_right(_softmax_tangent(rows, raw), rows.value)
        total = total + shared_left(rows.weights[..., start:], value[heads].to(sums))
        output[heads] = total.view_as(query[heads])
    return output


def attention_adjoint(primal: Primal, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Q_ [Hk, G, Q, D]`, `K_`, `V_ [Hk, stop, D]` from the output's adjoint `[Hk, G, Q, D]`."""
    query = torch.empty_like(primal.query)
    key, value = torch.empty_like(primal.key), torch.empty_like(primal.value)
    scale = primal.masking.scale
    for heads in primal.chunks(1):
        rows = primal.rows(heads)
        pulled = output[heads].flatten(1, 2).to(rows.weights.dtype)
        shift = (pulled * primal.output[heads].flatten(1, 2)).sum(-1, keepdim=True)
        scores = (pulled @ rows.value.transpose(1, 2)).sub_(shift).mul_(rows.weights)
        if rows.slope is not None:
            scores = scores * rows.slope
        query[heads] = (scale * (scores @ rows.key)).view_as(query[heads])
        key[heads] = scale * (scores.transpose(1, 2) @ rows.query)
        value[heads] = rows.weights.transpose(1, 2) @ pulled
    return query, key, value


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
    query_result = torch.empty_like(query)
    key_result, value_result = torch.empty_like(key), torch.empty_like(value)
    sums = primal.normaliser.dtype
    for heads in primal.chunks(query.shape[1]):
        rows = primal.rows(heads)
        query_dot, out_dot = _flat(query[heads], sums), _flat(output[heads], sums)
        key_dot, value_dot = key[heads].to(sums), value[heads].to(sums)
        bar_dot = _flat(output_bar_dot[heads], sums)
        bar, out = output_bar[heads].flatten(1, 2).to(sums), primal.output[heads].flatten(1, 2)

        raw = _score_tangent(rows, start, scale, query_dot, key_dot)
        bent = None if rows.bend is None else raw * rows.bend[:, None]
        moved = _softmax_tangent(rows, raw)

        centred = (bar @ rows.value.transpose(1, 2)) - (bar * out).sum(-1, keepdim=True)  # dP - D
        scores = rows.weights * centred  # dS
        shift_dot = (bar_dot * out[:, None] + bar[:, None] * out_dot).sum(-1, keepdim=True)
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
        query_result[heads] = (scale * total).view_as(query[heads])
        total = shared_right(own_dot.transpose(2, 3), rows.query)
        total = total + shared_left(own.transpose(1, 2), query_dot)
        key_result[heads] = scale * total
        total = shared_right(moved[..., start:].transpose(2, 3), bar)
        value_result[heads] = total + shared_left(
            rows.weights[..., start:].transpose(1, 2), bar_dot
        )
    return query_result, key_result, value_result

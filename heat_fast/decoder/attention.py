"""The attention layer: projections, head norms, rotation, softmax core, output projection.

The layer turns normed rows into heads, hands them to the softmax core in `kernels/`, and maps the
heads' outputs back. Only the core and the optional head norms are nonlinear; every other step is
affine, so its tangent is itself and its adjoint the transpose.

Heads are kept head-major, `[Hk, B, G, S, D]` for queries and `[Hk, B, S, D]` for keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import Identity, Norm
from heat_fast.decoder.rotary import Rotary
from heat_fast.kernels.branch_attention import Masking, branch_attention
from heat_fast.kernels.second_order_attention import (
    Primal,
    attention_adjoint,
    attention_adjoint_tangent,
    attention_tangent,
)


@dataclass(frozen=True)
class Heads:
    """Query, key and value of some rows; queries may be the last `Q` of the `S` rows only."""

    query: Tensor
    key: Tensor
    value: Tensor


class Projection(Protocol):
    """How a family makes queries, keys and values; flat features, `[B, rows, heads, D]` each."""

    def forward(self, x: Tensor, queries: int) -> Heads: ...

    def tangent(self, x_dot: Tensor, queries: int) -> Heads: ...

    def adjoint(self, bar: Heads, width: int) -> Tensor: ...


class SeparateProjection:
    """One linear layer each for queries, keys and values."""

    def __init__(self, query: Linear, key: Linear, value: Linear, head_dim: int) -> None:
        self.query = query
        self.key = key
        self.value = value
        self.head_dim = head_dim

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads

    def forward(self, x: Tensor, queries: int) -> Heads:
        """Project `x [B, S, d]`; queries for its last `queries` rows."""
        return Heads(
            self._heads(self.query.forward(x[:, -queries:])),
            self._heads(self.key.forward(x)),
            self._heads(self.value.forward(x)),
        )

    def tangent(self, x_dot: Tensor, queries: int) -> Heads:
        """The same without biases."""
        return Heads(
            self._heads(self.query.tangent(x_dot[:, -queries:])),
            self._heads(self.key.tangent(x_dot)),
            self._heads(self.value.tangent(x_dot)),
        )

    def adjoint(self, bar: Heads, width: int) -> Tensor:
        """`[B, S, d]` from the three adjoints."""
        x_bar = self.key.adjoint(bar.key.flatten(-2), width)
        x_bar = x_bar + self.value.adjoint(bar.value.flatten(-2), width)
        queries = bar.query.shape[1]
        x_bar[:, -queries:] += self.query.adjoint(bar.query.flatten(-2), width)
        return x_bar


class FusedProjection:
    """One linear layer for all three.

    `interleaved=False`: features are all queries, then all keys, then all values (Phi-3, GPT-2).
    `interleaved=True`: per head its query, key and value in turn (GPT-NeoX).
    """

    def __init__(
        self, linear: Linear, heads: int, key_heads: int, head_dim: int, *, interleaved: bool
    ) -> None:
        self.linear = linear
        self.heads = heads
        self.key_heads = key_heads
        self.head_dim = head_dim
        self.interleaved = interleaved

    def _split(self, features: Tensor, queries: int) -> Heads:
        if self.interleaved:
            per_head = features.unflatten(-1, (self.heads, 3, self.head_dim))
            query, key, value = per_head.unbind(-2)
        else:
            per_head = features.unflatten(-1, (-1, self.head_dim))
            sizes = (self.heads, self.key_heads, self.key_heads)
            query, key, value = per_head.split(sizes, dim=-2)
        return Heads(query[:, -queries:], key, value)

    def forward(self, x: Tensor, queries: int) -> Heads:
        """Project `x [B, S, d]`; queries for its last `queries` rows."""
        return self._split(self.linear.forward(x), queries)

    def tangent(self, x_dot: Tensor, queries: int) -> Heads:
        """The same without biases."""
        return self._split(self.linear.tangent(x_dot), queries)

    def adjoint(self, bar: Heads, width: int) -> Tensor:
        """`[B, S, d]`; rows without a query get a zero query adjoint."""
        missing = bar.key.shape[1] - bar.query.shape[1]
        query = torch.nn.functional.pad(bar.query, (0, 0, 0, 0, missing, 0))
        if self.interleaved:
            features = torch.stack((query, bar.key, bar.value), dim=-2).flatten(-3)
        else:
            features = torch.cat((query, bar.key, bar.value), dim=-2).flatten(-2)
        return self.linear.adjoint(features, width)


@dataclass(frozen=True)
class AttentionState:
    """Primal heads of all rows, head-major, after rotation.

    `query`, `output [Hk, G, S, D]`, `key`, `value [Hk, S, D]`, `normaliser [Hk, G, S]`; the raw
    heads before head norms are kept only where there are such norms. `output_rows` are the rows
    for which queries exist (all, or the last few in the last block).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    normaliser: Tensor
    output: Tensor
    raw_query: Tensor | None
    raw_key: Tensor | None
    first_query: int

    def primal(self, rows: Rows, masking: Masking) -> Primal:
        """The part that concerns some rows, as the softmax core wants it."""
        queries = slice(rows.first_query - self.first_query, rows.stop - self.first_query)
        return Primal(
            query=self.query[:, :, queries],
            key=self.key[:, : rows.stop],
            value=self.value[:, : rows.stop],
            normaliser=self.normaliser[:, :, queries],
            output=self.output[:, :, queries],
            start=rows.start,
            masking=masking,
        )


@dataclass(frozen=True)
class Rows:
    """Which positions a sweep touches: keys `[start, stop)`, queries `[first_query, stop)`."""

    start: int
    first_query: int
    stop: int

    @property
    def queries(self) -> int:
        """How many query rows there are."""
        return self.stop - self.first_query

    @property
    def keys(self) -> int:
        """How many key rows there are."""
        return self.stop - self.start


@dataclass(frozen=True)
class AttentionTangent:
    """Tangents going up, head-major: after rotation, and (with head norms) before the norms."""

    heads: Heads
    output: Tensor
    raw_query: Tensor | None
    raw_key: Tensor | None


@dataclass(frozen=True)
class AttentionAdjoint:
    """Primal adjoints going down: of the heads' outputs and, with head norms, of their results."""

    output: Tensor
    normed_query: Tensor | None
    normed_key: Tensor | None


class Attention:
    """One attention layer of the user's model, in four readings."""

    def __init__(
        self,
        projection: Projection,
        output: Linear,
        rotary: Rotary | None,
        masking: Masking,
        groups: int,
        query_norm: Norm | Identity | None = None,
        key_norm: Norm | Identity | None = None,
    ) -> None:
        self.projection = projection
        self.output = output
        self.rotary = rotary
        self.masking = masking
        self.groups = groups
        self.query_norm: Norm | Identity = query_norm or Identity()
        self.key_norm: Norm | Identity = key_norm or Identity()
        self.normed = isinstance(self.query_norm, Norm) or isinstance(self.key_norm, Norm)

    # Between flat features [B, S, H, D] and head-major [Hk, B, (G,) S, D].

    def _split_query(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(2, (-1, self.groups)).permute(2, 0, 3, 1, 4)
        return heads.contiguous()

    @staticmethod
    def _split_key(x: Tensor) -> Tensor:
        return x.permute(2, 0, 1, 3).contiguous()

    @staticmethod
    def _merge_query(x: Tensor) -> Tensor:
        return x.permute(1, 3, 0, 2, 4).flatten(2, 3)

    @staticmethod
    def _merge_key(x: Tensor) -> Tensor:
        return x.permute(1, 2, 0, 3)

    def _turn(self, heads: Heads, rows: Rows) -> Heads:
        if self.rotary is None:
            return heads
        return Heads(
            self.rotary.forward(heads.query, rows.first_query),
            self.rotary.forward(heads.key, rows.start),
            heads.value,
        )

    def forward(
        self, x: Tensor, rows: Rows, prefix: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState]:
        """`y [B, Q, d]` from normed rows `x [B, S, d]`, attending to the prefix below them.

        The returned state is meaningful as a primal for `B = 1`, `rows.start = 0`.
        """
        flat = self.projection.forward(x, rows.queries)
        raw = Heads(
            self._split_query(flat.query), self._split_key(flat.key), self._split_key(flat.value)
        )
        normed = Heads(
            self.query_norm.forward(raw.query), self.key_norm.forward(raw.key), raw.value
        )
        heads = self._turn(normed, rows)
        if prefix is None:
            below_key = below_value = heads.key[:, 0, :0]
        else:
            below_key = prefix.key[:, : rows.start]
            below_value = prefix.value[:, : rows.start]
        output, normaliser = branch_attention(
            heads.query, heads.key, heads.value, below_key, below_value, self.masking
        )
        y = self.output.forward(self._merge_query(output).flatten(2))
        state = AttentionState(
            query=heads.query[:, 0],
            key=heads.key[:, 0],
            value=heads.value[:, 0],
            normaliser=normaliser[:, 0],
            output=output[:, 0],
            raw_query=raw.query[:, 0] if self.normed else None,
            raw_key=raw.key[:, 0] if self.normed else None,
            first_query=rows.first_query,
        )
        return y, state

    def tangent(
        self, state: AttentionState, x_dot: Tensor, rows: Rows
    ) -> tuple[Tensor, AttentionTangent]:
        """`y. [B, Q, d]` from `x. [B, S, d]`."""
        flat = self.projection.tangent(x_dot, rows.queries)
        raw = Heads(
            self._split_query(flat.query), self._split_key(flat.key), self._split_key(flat.value)
        )
        normed = raw
        if self.normed:
            raw_query, raw_key = self._raw(state, rows)
            normed = Heads(
                self.query_norm.tangent(raw_query[:, None], raw.query),
                self.key_norm.tangent(raw_key[:, None], raw.key),
                raw.value,
            )
        heads = self._turn(normed, rows)
        primal = state.primal(rows, self.masking)
        output = attention_tangent(primal, heads.query, heads.key, heads.value)
        y = self.output.tangent(self._merge_query(output).flatten(2))
        kept = (raw.query, raw.key) if self.normed else (None, None)
        return y, AttentionTangent(heads, output, *kept)

    def adjoint(
        self, state: AttentionState, y_bar: Tensor, rows: Rows
    ) -> tuple[Tensor, AttentionAdjoint]:
        """`x_ [S, d]` from `y_ [Q, d]`; `rows.start` must be 0."""
        width = y_bar.shape[-1]
        pulled = self._pull_output(y_bar[None], state)
        primal = state.primal(rows, self.masking)
        query, key, value = attention_adjoint(primal, pulled[:, 0])
        normed = self._turn_back(Heads(query[:, None], key[:, None], value[:, None]), rows)
        raw = normed
        if self.normed:
            raw_query, raw_key = self._raw(state, rows)
            raw = Heads(
                self.query_norm.adjoint(raw_query[:, None], normed.query),
                self.key_norm.adjoint(raw_key[:, None], normed.key),
                normed.value,
            )
        kept = (normed.query[:, 0], normed.key[:, 0]) if self.normed else (None, None)
        return self._pull_heads(raw, width)[0], AttentionAdjoint(pulled[:, 0], *kept)

    def adjoint_tangent(
        self,
        state: AttentionState,
        tangent: AttentionTangent,
        bar: AttentionAdjoint,
        y_bar_dot: Tensor,
        rows: Rows,
    ) -> Tensor:
        """`x_. [B, S, d]` from `y_. [B, Q, d]`, the tangents going up and the primal adjoints."""
        width = y_bar_dot.shape[-1]
        pulled = self._pull_output(y_bar_dot, state)
        heads = tangent.heads
        query, key, value = attention_adjoint_tangent(
            state.primal(rows, self.masking),
            heads.query,
            heads.key,
            heads.value,
            tangent.output,
            bar.output,
            pulled,
        )
        raw = normed = self._turn_back(Heads(query, key, value), rows)
        if self.normed:
            assert tangent.raw_query is not None and tangent.raw_key is not None
            assert bar.normed_query is not None and bar.normed_key is not None
            raw_query, raw_key = self._raw(state, rows)
            raw = Heads(
                self.query_norm.adjoint_tangent(
                    raw_query[:, None], tangent.raw_query, bar.normed_query[:, None], normed.query
                ),
                self.key_norm.adjoint_tangent(
                    raw_key[:, None],
                    tangent.raw_key,
                    bar.normed_key[:, None, rows.start : rows.stop],
                    normed.key,
                ),
                normed.value,
            )
        return self._pull_heads(raw, width)

    def _raw(self, state: AttentionState, rows: Rows) -> tuple[Tensor, Tensor]:
        """Heads before their norms: queries `[Hk, G, Q, D]`, keys `[Hk, S, D]`."""
        assert state.raw_query is not None and state.raw_key is not None
        first = rows.first_query - state.first_query
        return (
            state.raw_query[:, :, first : rows.stop - state.first_query],
            state.raw_key[:, rows.start : rows.stop],
        )

    def _turn_back(self, heads: Heads, rows: Rows) -> Heads:
        if self.rotary is None:
            return heads
        return Heads(
            self.rotary.adjoint(heads.query, rows.first_query),
            self.rotary.adjoint(heads.key, rows.start),
            heads.value,
        )

    def _pull_output(self, y_bar: Tensor, state: AttentionState) -> Tensor:
        """Adjoint of the output projection, split into heads `[Hk, B, G, Q, D]`."""
        heads, group, _, width = state.query.shape
        flat = self.output.adjoint(y_bar, heads * group * width)
        return self._split_query(flat.unflatten(-1, (heads * group, width)))

    def _pull_heads(self, bar: Heads, width: int) -> Tensor:
        """Adjoint of the projections, `[B, S, d]`."""
        flat = Heads(
            self._merge_query(bar.query), self._merge_key(bar.key), self._merge_key(bar.value)
        )
        return self.projection.adjoint(flat, width)

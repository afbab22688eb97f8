"""The attention layer: projections, head norms, rotation, softmax core, output projection.

The layer turns normed rows into heads, hands them to the softmax core in `kernels/`, and maps the
heads' outputs back. Only the core and the optional head norms are nonlinear; every other step is
affine, so its tangent is itself and its adjoint the transpose.

Heads are kept head-major, `[Hk, B, G, S, D]` for queries and `[Hk, B, S, D]` for keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import AnyNorm, Identity, NormAdjoint, NormState, kept
from heat_fast.decoder.projection import Heads, Projection
from heat_fast.decoder.rotary import Rotary
from heat_fast.kernels.branch_attention import (
    Masking,
    RaggedRows,
    branch_attention,
    ragged_attention,
    sink,
)
from heat_fast.kernels.rotary import Table, place
from heat_fast.kernels.second_order_attention import (
    Primal,
    attention_adjoint,
    attention_adjoint_tangent,
    attention_tangent,
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
class AttentionState:
    """Primal heads of all rows, head-major, after rotation.

    `query`, `output [Hk, G, Q, D]`, `key`, `value [Hk, S, D]`, `normaliser [Hk, G, Q]`; queries
    begin at position `first_query` (0, or the last few rows in the last block). `query_norm`,
    `key_norm` are the head norms' states, `projection` is what the projections keep. `sunk [Hk, G,
    Q]`: the sink's share, None without one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    normaliser: Tensor
    output: Tensor
    query_norm: NormState
    key_norm: NormState
    projection: Any
    first_query: int
    sunk: Tensor | None = None

    def queries(self, rows: Rows) -> slice:
        """Where the query rows of a sweep lie among the kept ones."""
        return slice(rows.first_query - self.first_query, rows.stop - self.first_query)

    def primal(self, rows: Rows, masking: Masking) -> Primal:
        """The part that concerns some rows, as the softmax core wants it."""
        queries = self.queries(rows)
        return Primal(
            query=self.query[:, :, queries],
            key=self.key[:, : rows.stop],
            value=self.value[:, : rows.stop],
            normaliser=self.normaliser[:, :, queries],
            output=self.output[:, :, queries],
            start=rows.start,
            masking=masking,
            sunk=None if self.sunk is None else self.sunk[:, :, queries],
        )

    def projected(self, rows: Rows) -> Any:
        """What the projections keep of some rows."""
        return self.projection.rows(slice(rows.start, rows.stop), self.queries(rows))

    def norms(self, rows: Rows) -> tuple[NormState, NormState]:
        """The head norms' states over some rows, with a dimension for the batch."""
        query = self.query_norm.rows(self.queries(rows)).select(None, 1)
        key = self.key_norm.rows(slice(rows.start, rows.stop)).select(None, 1)
        return query, key


@dataclass(frozen=True)
class AttentionTangent:
    """Tangents going up, head-major: `heads` after rotation, the raw ones before head norms.

    `projection`: what the projections keep of them.
    """

    heads: Heads
    output: Tensor
    raw_query: Tensor
    raw_key: Tensor
    projection: Any

    def rows(self, keys: slice, queries: slice) -> AttentionTangent:
        """The same tangents for some of their rows."""
        heads = Heads(
            self.heads.query[..., queries, :],
            self.heads.key[..., keys, :],
            self.heads.value[..., keys, :],
        )
        return AttentionTangent(
            heads,
            self.output[..., queries, :],
            self.raw_query[..., queries, :],
            self.raw_key[..., keys, :],
            self.projection.rows(keys, queries),
        )


@dataclass(frozen=True)
class AttentionAdjoint:
    """Primal adjoints going down: of the heads' outputs `[Hk, G, Q, D]` and of the head norms.

    `projection`: what the projections keep of them.
    """

    output: Tensor
    query_norm: NormAdjoint
    key_norm: NormAdjoint
    projection: Any

    def rows(self, keys: slice, queries: slice) -> AttentionAdjoint:
        """The same adjoints for some of their rows."""
        return AttentionAdjoint(
            self.output[..., queries, :],
            self.query_norm.rows(queries),
            self.key_norm.rows(keys),
            self.projection.rows(keys, queries),
        )


class Attention:
    """One attention layer of the user's model, in four readings.

    `value_dim`: how many columns of a value are the model's, where it is filled up with zeros to
    the width of queries and keys.
    """

    def __init__(
        self,
        projection: Projection,
        output: Linear,
        rotary: Rotary | None,
        masking: Masking,
        groups: int,
        query_norm: AnyNorm | None = None,
        key_norm: AnyNorm | None = None,
        sinks: Tensor | None = None,
        value_dim: int | None = None,
    ) -> None:
        self.projection = projection
        self.output = output
        self.rotary = rotary
        self.masking = masking
        self.groups = groups
        self.query_norm: AnyNorm = query_norm or Identity()
        self.key_norm: AnyNorm = key_norm or Identity()
        self.value_dim = value_dim
        self.normed = query_norm is not None or key_norm is not None
        self.sinks = None if sinks is None else sinks.detach().unflatten(0, (-1, groups))

    def _sink(self, output: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the softmax core gives, with the heads' sinks beside their scores."""
        if self.sinks is None:
            return output, normaliser, None
        return sink(output, normaliser, self.sinks)

    # Between flat features [B, S, H, D] and head-major [Hk, B, (G,) S, D]. Heads are turned on the
    # way, unless they pass a norm first.

    def _table(self, at: int | Tensor, like: Tensor) -> Table | None:
        if self.rotary is None or self.normed:
            return None
        return self.rotary.table(at, like, like.shape[1])

    def _split(self, flat: Heads, query_at: int | Tensor, key_at: int | Tensor) -> Heads:
        query = _head_major(flat.query, self._table(query_at, flat.query))
        return Heads(
            query.unflatten(0, (-1, self.groups)).transpose(1, 2),
            _head_major(flat.key, self._table(key_at, flat.key)),
            _head_major(flat.value, None),
        )

    def _merge(self, bar: Heads, rows: Rows) -> Heads:
        """The transposed map of `_split`."""
        query = bar.query.transpose(1, 2).flatten(0, 1).permute(1, 2, 0, 3)
        key, value = bar.key.permute(1, 2, 0, 3), bar.value.permute(1, 2, 0, 3)
        return Heads(
            _flat_major(query, self._table(rows.first_query, query)),
            _flat_major(key, self._table(rows.start, key)),
            _flat_major(value, None),
        )

    def _rows(self, output: Tensor) -> Tensor:
        """`[Hk, B, G, Q, D] -> [B, Q, H D]`: what the output projection takes."""
        return output[..., : self.value_dim].permute(1, 3, 0, 2, 4).flatten(2)

    def _turn(self, heads: Heads, query_at: int | Tensor, key_at: int | Tensor) -> Heads:
        if self.rotary is None or not self.normed:
            return heads
        return Heads(
            self.rotary.forward(heads.query, query_at),
            self.rotary.forward(heads.key, key_at),
            heads.value,
        )

    def _turn_back(self, heads: Heads, rows: Rows) -> Heads:
        if self.rotary is None or not self.normed:
            return heads
        return Heads(
            self.rotary.adjoint(heads.query, rows.first_query),
            self.rotary.adjoint(heads.key, rows.start),
            heads.value,
        )

    def _project(
        self,
        x: Tensor,
        queries: int,
        query_at: int | Tensor,
        key_at: int | Tensor,
        *,
        keep: bool = False,
    ) -> tuple[Heads, NormState, NormState, Any]:
        """Heads of rows `x [B, S, d]`, normed and turned.

        With `keep` the head norms' states too, and what the projections keep.
        """
        flat, projection = self.projection.forward(x, queries, keep=keep)
        raw = self._split(flat, query_at, key_at)
        query, query_norm = self.query_norm.forward(raw.query, keep=keep)
        key, key_norm = self.key_norm.forward(raw.key, keep=keep)
        heads = self._turn(Heads(query, key, raw.value), query_at, key_at)
        return heads, query_norm, key_norm, projection

    def _pull_output(self, y_bar: Tensor, state: AttentionState) -> Tensor:
        """Adjoint of the output projection, split into heads `[Hk, B, G, Q, D]`."""
        heads, group, _, full = state.query.shape
        width = full if self.value_dim is None else self.value_dim
        flat = self.output.adjoint(y_bar, heads * group * width)
        split: Tensor = flat.unflatten(-1, (heads, group, width)).permute(2, 0, 3, 1, 4)
        return split if width == full else torch.nn.functional.pad(split, (0, full - width))

    def forward(
        self, x: Tensor, rows: Rows, prefix: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState]:
        """`y [B, Q, d]` from normed rows `x [B, S, d]`, attending to the prefix below them.

        The returned state is a primal for `B = 1`, `rows.start = 0`, no prefix.
        """
        heads, query_norm, key_norm, projection = self._project(
            x, rows.queries, rows.first_query, rows.start, keep=prefix is None
        )
        if prefix is None:
            below_key = below_value = heads.key[:, 0, :0]
        else:
            below_key = prefix.key[:, : rows.start]
            below_value = prefix.value[:, : rows.start]
        output, normaliser, sunk = self._sink(
            *branch_attention(
                heads.query, heads.key, heads.value, below_key, below_value, self.masking
            )
        )
        y = self.output.forward(self._rows(output))
        return y, AttentionState(
            query=heads.query[:, 0],
            key=heads.key[:, 0],
            value=heads.value[:, 0],
            normaliser=normaliser[:, 0],
            output=output[:, 0],
            query_norm=query_norm.select(0, 1),
            key_norm=key_norm.select(0, 1),
            projection=projection.first(),
            first_query=rows.first_query,
            sunk=None if sunk is None else sunk[:, 0],
        )

    def forward_replaced(
        self, x: Tensor, index: Tensor, rows: Rows, trunk: AttentionState
    ) -> Tensor:
        """`y [B, S, d]` of branches that enter as the trunk does, save for one row each.

        `x [B, d]`: these rows, normed; `index [B]`: where they stand among the `rows`. Only they
        need projections of their own.
        """
        at, batch = index + rows.start, torch.arange(len(index), device=x.device)
        moved, _, _, _ = self._project(x[None], len(index), at, at)

        def copies(kept: Tensor) -> Tensor:
            # repeat copies always: what it makes is written to.
            return kept[:, None].repeat(1, len(index), *[1] * (kept.dim() - 1))

        query = copies(trunk.query[:, :, trunk.queries(rows)])
        query[:, batch, :, index] = moved.query[:, 0].permute(2, 0, 1, 3)
        key, value = copies(trunk.key[:, rows.start :]), copies(trunk.value[:, rows.start :])
        key[:, batch, index] = moved.key[:, 0]
        value[:, batch, index] = moved.value[:, 0]
        below = slice(0, rows.start)
        found = branch_attention(
            query, key, value, trunk.key[:, below], trunk.value[:, below], self.masking
        )
        output, _, _ = self._sink(*found)
        return self.output.forward(self._rows(output))

    def forward_ragged(self, x: Tensor, rows: RaggedRows, trunk: AttentionState) -> Tensor:
        """`y [Q, d]` from normed rows `x [R, d]` of branches that are the trunk elsewhere."""
        first = len(rows.position) - rows.queries
        heads, _, _, _ = self._project(x[None], rows.queries, rows.position[first:], rows.position)
        found = ragged_attention(
            heads.query[:, 0],
            heads.key[:, 0, : rows.keys],
            heads.value[:, 0, : rows.keys],
            trunk.key,
            trunk.value,
            rows,
            self.masking,
        )
        output, _, _ = self._sink(*found)
        return self.output.forward(self._rows(output[:, None]))[0]

    def tangent(
        self, state: AttentionState, x_dot: Tensor, rows: Rows
    ) -> tuple[Tensor, AttentionTangent]:
        """`y. [B, Q, d]` from `x. [B, S, d]`."""
        flat, projection = self.projection.tangent(state.projected(rows), x_dot, rows.queries)
        raw = self._split(flat, rows.first_query, rows.start)
        query_norm, key_norm = state.norms(rows)
        normed = Heads(
            self.query_norm.tangent(query_norm, raw.query),
            self.key_norm.tangent(key_norm, raw.key),
            raw.value,
        )
        heads = self._turn(normed, rows.first_query, rows.start)
        primal = state.primal(rows, self.masking)
        output = attention_tangent(primal, heads.query, heads.key, heads.value)
        y = self.output.tangent(self._rows(output))
        raw_query, raw_key = kept(self.query_norm, raw.query), kept(self.key_norm, raw.key)
        return y, AttentionTangent(heads, output, raw_query, raw_key, projection)

    def adjoint(
        self, state: AttentionState, y_bar: Tensor, rows: Rows
    ) -> tuple[Tensor, AttentionAdjoint]:
        """`x_ [S, d]` from `y_ [Q, d]`; `rows.start` must be 0."""
        pulled = self._pull_output(y_bar[None], state)
        primal = state.primal(rows, self.masking)
        query, key, value = attention_adjoint(primal, pulled[:, 0])
        normed = self._turn_back(Heads(query[:, None], key[:, None], value[:, None]), rows)
        query_norm, key_norm = state.norms(rows)
        query, query_bar = self.query_norm.adjoint(query_norm, normed.query)
        key, key_bar = self.key_norm.adjoint(key_norm, normed.key)
        flat = self._merge(Heads(query, key, normed.value), rows)
        x_bar, projection = self.projection.adjoint(state.projected(rows), flat, y_bar.shape[-1])
        return x_bar[0], AttentionAdjoint(pulled[:, 0], query_bar, key_bar, projection)

    def adjoint_tangent(
        self,
        state: AttentionState,
        tangent: AttentionTangent,
        bar: AttentionAdjoint,
        y_bar_dot: Tensor,
        rows: Rows,
    ) -> Tensor:
        """`x_. [B, S, d]` from `y_. [B, Q, d]`, the tangents going up and the primal adjoints."""
        heads = tangent.heads
        query, key, value = attention_adjoint_tangent(
            state.primal(rows, self.masking),
            heads.query,
            heads.key,
            heads.value,
            tangent.output,
            bar.output,
            self._pull_output(y_bar_dot, state),
        )
        normed = self._turn_back(Heads(query, key, value), rows)
        query_norm, key_norm = state.norms(rows)
        raw = Heads(
            self.query_norm.adjoint_tangent(
                query_norm, tangent.raw_query, bar.query_norm, normed.query
            ),
            self.key_norm.adjoint_tangent(key_norm, tangent.raw_key, bar.key_norm, normed.key),
            normed.value,
        )
        return self.projection.adjoint_tangent(
            state.projected(rows),
            tangent.projection,
            bar.projection,
            self._merge(raw, rows),
            y_bar_dot.shape[-1],
        )


def _head_major(x: Tensor, table: Table | None) -> Tensor:
    """`[B, S, H, D] -> [H, B, S, D]`, rotated if there is a table."""
    batch, rows, heads, width = x.shape
    result = x.new_empty(heads, batch, rows, width)
    place(x, result.permute(1, 2, 0, 3), table)
    return result


def _flat_major(x: Tensor, table: Table | None) -> Tensor:
    """A contiguous copy of a view `[B, S, H, D]`, turned back if there is a table."""
    result = x.new_empty(x.shape)
    place(x, result, table, -1)
    return result

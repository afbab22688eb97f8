"""One transformer block: norms, attention and feed-forward layer around a residual stream.

    a = post_attention(attention(norm(x)));   x1 = x + a
    f = post_mlp(mlp(mlp_norm(m)));           y  = x1 + f,    m = x (parallel) or x1 (sequential)

This is the one description of every family's block. Its four readings interpret it:

    forward          x -> y                          (trunk and branches; `attend_replaced` or
                                                      `attend_ragged`, then `feed`, for branches
                                                      that are mostly like the trunk)
    tangent          x. -> y.                        (probes going up)
    adjoint          y_ -> x_                        (the target's gradient, once)
    adjoint_tangent  (x., y_, y_.) -> x_.            (probes coming down: a Hessian-vector product)

Rows: keys and values are made for positions `[start, stop)`; queries, and with them the residual
stream that leaves the block, for the last `Q` of these only. In all blocks but the last `Q` is all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heat_fast.decoder.attention import (
    Attention,
    AttentionAdjoint,
    AttentionState,
    AttentionTangent,
    Rows,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import FeedForward
from heat_fast.decoder.norm import AnyNorm, Identity, NormAdjoint, NormState, kept
from heat_fast.kernels.branch_attention import RaggedRows


@dataclass(frozen=True)
class Streams:
    """The residual stream of one block, `[Q, d]` each: `middle` is `x1`, `leaving` is `y`."""

    middle: Tensor
    leaving: Tensor


@dataclass(frozen=True)
class BlockState:
    """Primal values of one block for the rows of the trunk.

    `entry [S, d]`: the residual stream entering, normalised for the attention; `mlp_entry [Q, d]`:
    the one entering the feed-forward layer, normalised; `attended`, `fed [Q, d]`: the layers'
    outputs, normalised, where post-norms follow; `streams`: kept where branches are compared
    with them.
    """

    entry: NormState
    attention: AttentionState
    attended: NormState
    mlp_entry: NormState
    mlp: Any
    fed: NormState
    streams: Streams | None = None

    @property
    def bytes(self) -> int:
        """What the kept values occupy."""
        return sum(value.numel() * value.element_size() for value in _tensors(self))

    def rows(self, rows: Rows) -> BlockState:
        """The primal values that a sweep over `rows` meets (the attention's stay whole)."""
        queries = self.attention.queries(rows)
        return BlockState(
            entry=self.entry.rows(slice(rows.start, rows.stop)),
            attention=self.attention,
            attended=self.attended.rows(queries),
            mlp_entry=self.mlp_entry.rows(queries),
            mlp=self.mlp.rows(queries),
            fed=self.fed.rows(queries),
        )


@dataclass(frozen=True)
class BlockTangent:
    """Tangents of one block for a batch of probes, `[B, ., d]`, over `rows`."""

    rows: Rows
    entry: Tensor
    attention: AttentionTangent
    attended: Tensor
    mlp_entry: Tensor
    mlp: Any
    fed: Tensor

    def cut(self, rows: Rows) -> BlockTangent:
        """Tangents of a wider sweep, restricted to `rows` with the same start."""
        if rows == self.rows:
            return self
        first = self.rows.first_query
        keys, queries = slice(0, rows.keys), slice(rows.first_query - first, rows.stop - first)
        return BlockTangent(
            rows=rows,
            entry=self.entry[:, keys],
            attention=self.attention.rows(keys, queries),
            attended=self.attended[:, queries],
            mlp_entry=self.mlp_entry[:, queries],
            mlp=self.mlp.rows(queries),
            fed=self.fed[:, queries],
        )


@dataclass(frozen=True)
class BlockAdjoint:
    """Primal adjoints of one block for one target, wherever a nonlinear step ends.

    `rows`: `start` is 0, queries as in the trunk (in the last block the target's row alone).
    """

    rows: Rows
    norm: NormAdjoint
    attention: AttentionAdjoint
    post_attention: NormAdjoint
    mlp_norm: NormAdjoint
    mlp: Any
    post_mlp: NormAdjoint

    def cut(self, rows: Rows) -> BlockAdjoint:
        """The same adjoints for the rows of a sweep."""
        first = self.rows.first_query
        keys = slice(rows.start, rows.stop)
        queries = slice(rows.first_query - first, rows.stop - first)
        return BlockAdjoint(
            rows=rows,
            norm=self.norm.rows(keys),
            attention=self.attention.rows(keys, queries),
            post_attention=self.post_attention.rows(queries),
            mlp_norm=self.mlp_norm.rows(queries),
            mlp=self.mlp.rows(queries),
            post_mlp=self.post_mlp.rows(queries),
        )


class Block:
    """One block of the user's model."""

    def __init__(
        self,
        norm: AnyNorm,
        attention: Attention,
        mlp_norm: AnyNorm,
        mlp: FeedForward,
        *,
        parallel: bool = False,
        post_attention: AnyNorm | None = None,
        post_mlp: AnyNorm | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.norm = norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.parallel = parallel
        self.post_attention: AnyNorm = post_attention or Identity()
        self.post_mlp: AnyNorm = post_mlp or Identity()
        self.device = device

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All affine submodules."""
        attention = self.attention
        return *attention.projection.linears, attention.output, *self.mlp.linears

    def _here(self, x: Tensor) -> Tensor:
        """Move to this block's device: a device map may spread the blocks over several."""
        return x if self.device is None or x.device == self.device else x.to(self.device)

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        prefix: BlockState | None = None,
        *,
        keep_streams: bool = False,
    ) -> tuple[Tensor, BlockState]:
        """`y [B, Q, d]` from `x [B, S, d]`; without a prefix, the state is a primal for `B = 1`."""
        x = self._here(x)
        keep = prefix is None  # a branch's statistics serve nobody
        normed, entry = self.norm.forward(x, keep=keep)
        attended, attention = self.attention.forward(
            normed, rows, None if prefix is None else prefix.attention
        )
        attended, post_attention = self.post_attention.forward(attended, keep=keep)
        stay = x[:, -rows.queries :]
        middle = attended + stay
        y, mlp_entry, mlp, post_mlp = self.feed(stay, middle, keep=keep)
        return y, BlockState(
            entry=entry.select(0, 0),
            attention=attention,
            attended=post_attention.select(0, 0),
            mlp_entry=mlp_entry.select(0, 0),
            mlp=mlp.first(),
            fed=post_mlp.select(0, 0),
            streams=Streams(middle[0], y[0]) if keep_streams else None,
        )

    def attend_replaced(self, x: Tensor, index: Tensor, rows: Rows, trunk: BlockState) -> Tensor:
        """`x1 [B, S, d]` of branches that enter as the trunk does, save for one row each.

        `x [B, S, d]`; `index [B]`: the row that differs. `feed` takes them on to `y`.
        """
        own = x[torch.arange(len(x), device=x.device), index]
        normed, _ = self.norm.forward(own, keep=False)
        attended = self.attention.forward_replaced(normed, index, rows, trunk.attention)
        return self.post_attention.forward(attended, keep=False)[0] + x

    def attend_ragged(self, x: Tensor, rows: RaggedRows, trunk: BlockState) -> Tensor:
        """`x1 [Q, d]` from the rows `x [R, d]` of several branches that are the trunk elsewhere.

        `feed` takes them on to `y`.
        """
        normed, _ = self.norm.forward(x, keep=False)
        attended = self.attention.forward_ragged(normed, rows, trunk.attention)
        return self.post_attention.forward(attended, keep=False)[0] + x[-rows.queries :]

    def feed(
        self, x: Tensor, middle: Tensor, *, keep: bool = False
    ) -> tuple[Tensor, NormState, Any, NormState]:
        """`y` from `x` and `x1`, `[.., d]`, with the states of the feed-forward layer (`keep`)."""
        normed, mlp_entry = self.mlp_norm.forward(x if self.parallel else middle, keep=keep)
        fed, mlp = self.mlp.forward(normed)
        fed, post_mlp = self.post_mlp.forward(fed, keep=keep)
        return middle + fed, mlp_entry, mlp, post_mlp

    def with_derivatives(self, state: BlockState) -> BlockState:
        """The state with the activation's derivatives kept for many probes."""
        return replace(state, mlp=self.mlp.with_derivatives(state.mlp))

    def tangent(self, state: BlockState, x_dot: Tensor, rows: Rows) -> tuple[Tensor, BlockTangent]:
        """`y. [B, Q, d]` from `x. [B, S, d]`."""
        x_dot = self._here(x_dot)
        state = state.rows(rows)
        attended, attention = self.attention.tangent(
            state.attention, self.norm.tangent(state.entry, x_dot), rows
        )
        stay = x_dot[:, -rows.queries :]
        middle = self.post_attention.tangent(state.attended, attended) + stay
        mlp_entry = stay if self.parallel else middle
        fed, mlp = self.mlp.tangent(state.mlp, self.mlp_norm.tangent(state.mlp_entry, mlp_entry))
        return middle + self.post_mlp.tangent(state.fed, fed), BlockTangent(
            rows=rows,
            entry=x_dot,
            attention=attention,
            attended=kept(self.post_attention, attended),
            mlp_entry=mlp_entry,
            mlp=mlp,
            fed=kept(self.post_mlp, fed),
        )

    def adjoint(self, state: BlockState, y_bar: Tensor, rows: Rows) -> tuple[Tensor, BlockAdjoint]:
        """`x_ [S, d]` from `y_ [Q, d]`; `rows.start` must be 0."""
        y_bar = self._here(y_bar)
        state = state.rows(rows)
        fed, post_mlp = self.post_mlp.adjoint(state.fed, y_bar)
        normed, mlp = self.mlp.adjoint(state.mlp, fed, y_bar.shape[-1])
        mlp_entry, mlp_norm = self.mlp_norm.adjoint(state.mlp_entry, normed)
        middle = y_bar if self.parallel else y_bar + mlp_entry
        attended, post_attention = self.post_attention.adjoint(state.attended, middle)
        normed, attention = self.attention.adjoint(state.attention, attended, rows)
        x_bar, norm = self.norm.adjoint(state.entry, normed)
        x_bar[-rows.queries :] += middle + mlp_entry if self.parallel else middle
        return x_bar, BlockAdjoint(
            rows=rows,
            norm=norm,
            attention=attention,
            post_attention=post_attention,
            mlp_norm=mlp_norm,
            mlp=mlp,
            post_mlp=post_mlp,
        )

    def adjoint_tangent(
        self,
        state: BlockState,
        tangent: BlockTangent,
        bar: BlockAdjoint,
        y_bar_dot: Tensor,
        rows: Rows,
    ) -> Tensor:
        """`x_. [B, S, d]` from `y_. [B, Q, d]`.

        `rows` may end earlier than the tangents' (a target in the middle of the response) and, in
        the last block, hold a single query row; tangents and adjoints are cut to fit.
        """
        y_bar_dot = self._here(y_bar_dot)
        state, tangent, bar = state.rows(rows), tangent.cut(rows), bar.cut(rows)
        width = y_bar_dot.shape[-1]
        fed = self.post_mlp.adjoint_tangent(state.fed, tangent.fed, bar.post_mlp, y_bar_dot)
        normed = self.mlp.adjoint_tangent(state.mlp, tangent.mlp, bar.mlp, fed, width)
        mlp_entry = self.mlp_norm.adjoint_tangent(
            state.mlp_entry, tangent.mlp_entry, bar.mlp_norm, normed
        )
        middle = y_bar_dot if self.parallel else y_bar_dot + mlp_entry
        attended = self.post_attention.adjoint_tangent(
            state.attended, tangent.attended, bar.post_attention, middle
        )
        normed = self.attention.adjoint_tangent(
            state.attention, tangent.attention, bar.attention, attended, rows
        )
        x_bar_dot = self.norm.adjoint_tangent(state.entry, tangent.entry, bar.norm, normed)
        x_bar_dot[:, -rows.queries :] += middle + mlp_entry if self.parallel else middle
        return x_bar_dot


def _tensors(record: object) -> Iterator[Tensor]:
    """All tensors kept in a record of records."""
    for value in vars(record).values():
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)

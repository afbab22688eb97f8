"""One transformer block: norms, attention and feed-forward layer around a residual stream.

    a = post_attention(attention(norm(x)));   x1 = x + a
    f = post_mlp(mlp(mlp_norm(m)));           y  = x1 + f,    m = x (parallel) or x1 (sequential)

This is the one description of every family's block. Its four readings interpret it:

    forward          x -> y                          (trunk and branches)
    tangent          x. -> y.                        (probes going up)
    adjoint          y_ -> x_                        (the target's gradient, once)
    adjoint_tangent  (x., y_, y_.) -> x_.            (probes coming down: a Hessian-vector product)

Rows: keys and values are made for positions `[start, stop)`; queries, and with them the residual
stream that leaves the block, for the last `Q` of these only. In all blocks but the last `Q` is all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heat_fast.decoder.attention import (
    Attention,
    AttentionAdjoint,
    AttentionState,
    AttentionTangent,
    Rows,
)
from heat_fast.decoder.mlp import Mlp, MlpState, MlpTangent
from heat_fast.decoder.norm import Identity, Norm

AnyNorm = Norm | Identity


@dataclass(frozen=True)
class BlockState:
    """Primal values of one block for the rows of the trunk.

    `entry [S, d]`: the residual stream entering; `middle [Q, d]`: after the attention;
    `attended`, `fed [Q, d]`: the layers' outputs before their post-norms (kept only if there is
    such a norm).
    """

    entry: Tensor
    middle: Tensor
    attention: AttentionState
    mlp: MlpState
    attended: Tensor | None
    fed: Tensor | None

    @property
    def bytes(self) -> int:
        """What the kept values occupy."""
        own = (self.entry, self.middle, self.attended, self.fed)
        parts = (vars(self.attention).values(), vars(self.mlp).values())
        tensors = [value for part in (own, *parts) for value in part if isinstance(value, Tensor)]
        return sum(value.numel() * value.element_size() for value in tensors)


@dataclass(frozen=True)
class BlockTangent:
    """Tangents of one block for a batch of probes, `[B, ., d]`, over `rows`."""

    rows: Rows
    entry: Tensor
    middle: Tensor
    attention: AttentionTangent
    mlp: MlpTangent
    attended: Tensor | None
    fed: Tensor | None


@dataclass(frozen=True)
class BlockAdjoint:
    """Primal adjoints of one block for one target, wherever a nonlinear step ends.

    `rows`: `start` is 0, queries as in the trunk (in the last block the target's row alone).
    `normed [S, d]`, `mlp_normed [Q, d]`: at the norms' outputs; `attended`, `fed [Q, d]`: at the
    post-norms' outputs; `hidden [Q, f]`: inside the feed-forward layer.
    """

    rows: Rows
    normed: Tensor
    mlp_normed: Tensor
    attended: Tensor
    fed: Tensor
    hidden: Tensor
    attention: AttentionAdjoint


class Block:
    """One block of the user's model."""

    def __init__(
        self,
        norm: AnyNorm,
        attention: Attention,
        mlp_norm: AnyNorm,
        mlp: Mlp,
        *,
        parallel: bool = False,
        post_attention: Norm | None = None,
        post_mlp: Norm | None = None,
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

    def _here(self, x: Tensor) -> Tensor:
        """Move to this block's device: a device map may spread the blocks over several."""
        return x if self.device is None or x.device == self.device else x.to(self.device)

    def forward(
        self, x: Tensor, rows: Rows, prefix: BlockState | None = None
    ) -> tuple[Tensor, BlockState]:
        """`y [B, Q, d]` from `x [B, S, d]`; the state is a primal for `B = 1`, `start = 0`."""
        x = self._here(x)
        attended, attention_state = self.attention.forward(
            self.norm.forward(x), rows, None if prefix is None else prefix.attention
        )
        entry = x[:, -rows.queries :]
        middle = entry + self.post_attention.forward(attended)
        fed, mlp_state = self.mlp.forward(self.mlp_norm.forward(entry if self.parallel else middle))
        y = middle + self.post_mlp.forward(fed)
        state = BlockState(
            entry=x[0],
            middle=middle[0],
            attention=attention_state,
            mlp=MlpState(mlp_state.gate[0], None if mlp_state.up is None else mlp_state.up[0]),
            attended=attended[0] if isinstance(self.post_attention, Norm) else None,
            fed=fed[0] if isinstance(self.post_mlp, Norm) else None,
        )
        return y, state

    def with_derivatives(self, state: BlockState) -> BlockState:
        """The state with the activation's derivatives kept for many probes."""
        return replace(state, mlp=self.mlp.with_derivatives(state.mlp))

    def _view(self, state: BlockState, rows: Rows) -> _PrimalRows:
        """The primal values that a sweep over `rows` meets."""
        first = state.attention.first_query
        queries = slice(rows.first_query - first, rows.stop - first)
        entry = state.entry[rows.start : rows.stop]
        middle = state.middle[queries]
        return _PrimalRows(
            entry=entry,
            mlp_entry=entry[entry.shape[0] - rows.queries :] if self.parallel else middle,
            mlp=state.mlp.rows(queries),
            attended=middle if state.attended is None else state.attended[queries],
            fed=middle if state.fed is None else state.fed[queries],
        )

    def tangent(self, state: BlockState, x_dot: Tensor, rows: Rows) -> tuple[Tensor, BlockTangent]:
        """`y. [B, Q, d]` from `x. [B, S, d]`."""
        x_dot = self._here(x_dot)
        primal = self._view(state, rows)
        attended, attention_tangent = self.attention.tangent(
            state.attention, self.norm.tangent(primal.entry, x_dot), rows
        )
        entry = x_dot[:, -rows.queries :]
        middle = entry + self.post_attention.tangent(primal.attended, attended)
        fed, mlp_tangent = self.mlp.tangent(
            primal.mlp,
            self.mlp_norm.tangent(primal.mlp_entry, entry if self.parallel else middle),
        )
        y_dot = middle + self.post_mlp.tangent(primal.fed, fed)
        return y_dot, BlockTangent(
            rows=rows,
            entry=x_dot,
            middle=middle,
            attention=attention_tangent,
            mlp=mlp_tangent,
            attended=attended if isinstance(self.post_attention, Norm) else None,
            fed=fed if isinstance(self.post_mlp, Norm) else None,
        )

    def adjoint(self, state: BlockState, y_bar: Tensor, rows: Rows) -> tuple[Tensor, BlockAdjoint]:
        """`x_ [S, d]` from `y_ [Q, d]`; `rows.start` must be 0."""
        y_bar = self._here(y_bar)
        primal = self._view(state, rows)
        mlp_normed, hidden = self.mlp.adjoint(
            primal.mlp, self.post_mlp.adjoint(primal.fed, y_bar), y_bar.shape[-1]
        )
        mlp_entry = self.mlp_norm.adjoint(primal.mlp_entry, mlp_normed)
        middle = y_bar if self.parallel else y_bar + mlp_entry
        normed, attention_bar = self.attention.adjoint(
            state.attention, self.post_attention.adjoint(primal.attended, middle), rows
        )
        x_bar = self.norm.adjoint(primal.entry, normed)
        x_bar[-rows.queries :] += middle + mlp_entry if self.parallel else middle
        return x_bar, BlockAdjoint(
            rows=rows,
            normed=normed,
            mlp_normed=mlp_normed,
            attended=middle,
            fed=y_bar,
            hidden=hidden,
            attention=attention_bar,
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
        the last block, hold a single query row; the stored tangents are cut to fit.
        """
        y_bar_dot = self._here(y_bar_dot)
        primal = self._view(state, rows)
        moved = _cut(tangent, rows)
        width = y_bar_dot.shape[-1]
        keys = slice(rows.start, rows.stop)
        queries = slice(rows.first_query - bar.rows.first_query, rows.stop - bar.rows.first_query)

        fed = moved.fed if moved.fed is not None else y_bar_dot
        pulled = self.post_mlp.adjoint_tangent(primal.fed, fed, bar.fed[queries], y_bar_dot)
        mlp_normed = self.mlp.adjoint_tangent(
            primal.mlp, moved.mlp, bar.hidden[queries], pulled, width
        )
        mlp_moved = moved.entry[:, -rows.queries :] if self.parallel else moved.middle
        mlp_entry = self.mlp_norm.adjoint_tangent(
            primal.mlp_entry, mlp_moved, bar.mlp_normed[queries], mlp_normed
        )
        middle = y_bar_dot if self.parallel else y_bar_dot + mlp_entry
        attended = moved.attended if moved.attended is not None else middle
        pulled = self.post_attention.adjoint_tangent(
            primal.attended, attended, bar.attended[queries], middle
        )
        attention_bar = AttentionAdjoint(
            bar.attention.output[:, :, queries],
            None
            if bar.attention.normed_query is None
            else bar.attention.normed_query[:, :, queries],
            bar.attention.normed_key,
        )
        normed = self.attention.adjoint_tangent(
            state.attention, moved.attention, attention_bar, pulled, rows
        )
        x_bar_dot = self.norm.adjoint_tangent(primal.entry, moved.entry, bar.normed[keys], normed)
        x_bar_dot[:, -rows.queries :] += middle + mlp_entry if self.parallel else middle
        return x_bar_dot


@dataclass(frozen=True)
class _PrimalRows:
    """Primal values over some rows; unused entries alias `middle`."""

    entry: Tensor
    mlp_entry: Tensor
    mlp: MlpState
    attended: Tensor
    fed: Tensor


def _cut(tangent: BlockTangent, rows: Rows) -> BlockTangent:
    """Tangents of a wider sweep, restricted to `rows` (same start)."""
    if rows == tangent.rows:
        return tangent
    keys = slice(0, rows.keys)
    first = tangent.rows.first_query
    queries = slice(rows.first_query - first, rows.stop - first)
    attention = tangent.attention
    heads = replace(
        attention.heads,
        query=attention.heads.query[:, :, :, queries],
        key=attention.heads.key[:, :, keys],
        value=attention.heads.value[:, :, keys],
    )
    raw_query, raw_key = attention.raw_query, attention.raw_key
    return BlockTangent(
        rows=rows,
        entry=tangent.entry[:, keys],
        middle=tangent.middle[:, queries],
        attention=AttentionTangent(
            heads,
            attention.output[:, :, :, queries],
            None if raw_query is None else raw_query[:, :, :, queries],
            None if raw_key is None else raw_key[:, :, keys],
        ),
        mlp=tangent.mlp.rows(queries),
        attended=None if tangent.attended is None else tangent.attended[:, queries],
        fed=None if tangent.fed is None else tangent.fed[:, queries],
    )

"""How queries, keys and values are made of a row: by a linear layer each, by one for all, or by way
of narrow latent rows that are normalised in between.

Features are flat here, `[B, rows, heads, D]`; `attention.py` turns them head-major.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import AnyNorm, NormAdjoint


@dataclass(frozen=True)
class Heads:
    """Query, key and value of some rows; queries may be the last `Q` of the `S` rows only."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class ProjectionSizes:
    """What one row meets in a projection, in numbers.

    `query`, `keys`: features of all query and of all key heads; `weights`: those that it is
    multiplied by; `passed`: what goes into and out of products; both of all rows, and `shared`, of
    those without a query; `normed`: what norms in between make of it.
    """

    query: int
    keys: int
    weights: int
    shared_weights: int
    passed: int
    shared_passed: int
    normed: int = 0


class Projection(Protocol):
    """How a family makes queries, keys and values, in four readings.

    Flat features, `[B, rows, heads, D]` each; queries for the last `queries` rows. Its records have
    `rows(keys, queries)`, and its states `first`.
    """

    head_dim: int

    @property
    def linears(self) -> tuple[Linear, ...]: ...

    def sizes(self, row: Tensor) -> ProjectionSizes: ...

    def forward(self, x: Tensor, queries: int, *, keep: bool = True) -> tuple[Heads, Any]: ...

    def tangent(self, state: Any, x_dot: Tensor, queries: int) -> tuple[Heads, Any]: ...

    def adjoint(self, state: Any, bar: Heads, width: int) -> tuple[Tensor, Any]: ...

    def adjoint_tangent(
        self, state: Any, tangent: Any, bar: Any, bar_dot: Heads, width: int
    ) -> Tensor: ...


@dataclass(frozen=True)
class Nothing:
    """What an affine projection keeps of the primal, of a tangent or of an adjoint."""

    def first(self) -> Nothing:
        """Nothing of the first of a batch."""
        return self

    def rows(self, keys: slice, queries: slice) -> Nothing:
        """Nothing of some rows."""
        return self


_NOTHING = Nothing()


class AffineProjection(ABC):
    """A projection that is its own tangent but for biases, and whose adjoint is its transpose."""

    @abstractmethod
    def _project(self, x: Tensor, queries: int) -> Heads: ...

    @abstractmethod
    def _move(self, x_dot: Tensor, queries: int) -> Heads: ...

    @abstractmethod
    def _pull(self, bar: Heads, width: int) -> Tensor: ...

    def forward(self, x: Tensor, queries: int, *, keep: bool = True) -> tuple[Heads, Nothing]:
        """Project `x [B, S, d]`; queries for its last `queries` rows."""
        return self._project(x, queries), _NOTHING

    def tangent(self, state: Nothing, x_dot: Tensor, queries: int) -> tuple[Heads, Nothing]:
        """The same without biases."""
        return self._move(x_dot, queries), _NOTHING

    def adjoint(self, state: Nothing, bar: Heads, width: int) -> tuple[Tensor, Nothing]:
        """`[B, S, d]` from the three adjoints; rows without a query have none."""
        return self._pull(bar, width), _NOTHING

    def adjoint_tangent(
        self, state: Nothing, tangent: Nothing, bar: Nothing, bar_dot: Heads, width: int
    ) -> Tensor:
        """The same of their tangents."""
        return self._pull(bar_dot, width)


class SeparateProjection(AffineProjection):
    """One linear layer each for queries, keys and values."""

    def __init__(self, query: Linear, key: Linear, value: Linear, head_dim: int) -> None:
        self.query = query
        self.key = key
        self.value = value
        self.head_dim = head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The three layers."""
        return self.query, self.key, self.value

    def sizes(self, row: Tensor) -> ProjectionSizes:
        """What a row meets."""
        width = row.shape[-1]
        query, keys = self.query.out_features(row), self.key.out_features(row)
        return ProjectionSizes(
            query,
            keys,
            weights=(query + 2 * keys) * width,
            shared_weights=2 * keys * width,
            passed=query + 2 * keys + 3 * width,
            shared_passed=2 * (keys + width),
        )

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads

    def _project(self, x: Tensor, queries: int) -> Heads:
        return Heads(
            self._heads(self.query.forward(x[:, -queries:])),
            self._heads(self.key.forward(x)),
            self._heads(self.value.forward(x)),
        )

    def _move(self, x_dot: Tensor, queries: int) -> Heads:
        return Heads(
            self._heads(self.query.tangent(x_dot[:, -queries:])),
            self._heads(self.key.tangent(x_dot)),
            self._heads(self.value.tangent(x_dot)),
        )

    def _pull(self, bar: Heads, width: int) -> Tensor:
        x_bar = self.key.adjoint(bar.key.flatten(-2), width)
        x_bar = x_bar + self.value.adjoint(bar.value.flatten(-2), width)
        queries = bar.query.shape[1]
        x_bar[:, -queries:] += self.query.adjoint(bar.query.flatten(-2), width)
        return x_bar


class FusedProjection(AffineProjection):
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

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The one layer."""
        return (self.linear,)

    def sizes(self, row: Tensor) -> ProjectionSizes:
        """What a row meets; every row meets all."""
        width, heads, key_heads = row.shape[-1], self.heads, self.key_heads
        query, keys = heads * self.head_dim, key_heads * self.head_dim
        weights, passed = (query + 2 * keys) * width, query + 2 * keys + width
        return ProjectionSizes(query, keys, weights, weights, passed, passed)

    def _split(self, features: Tensor, queries: int) -> Heads:
        if self.interleaved:
            per_head = features.unflatten(-1, (self.heads, 3, self.head_dim))
            query, key, value = per_head.unbind(-2)
        else:
            per_head = features.unflatten(-1, (-1, self.head_dim))
            sizes = (self.heads, self.key_heads, self.key_heads)
            query, key, value = per_head.split(sizes, dim=-2)
        return Heads(query[:, -queries:], key, value)

    def _project(self, x: Tensor, queries: int) -> Heads:
        return self._split(self.linear.forward(x), queries)

    def _move(self, x_dot: Tensor, queries: int) -> Heads:
        return self._split(self.linear.tangent(x_dot), queries)

    def _pull(self, bar: Heads, width: int) -> Tensor:
        missing = bar.key.shape[1] - bar.query.shape[1]
        query = torch.nn.functional.pad(bar.query, (0, 0, 0, 0, missing, 0))
        if self.interleaved:
            features = torch.stack((query, bar.key, bar.value), dim=-2).flatten(-3)
        else:
            features = torch.cat((query, bar.key, bar.value), dim=-2).flatten(-2)
        return self.linear.adjoint(features, width)


@dataclass(frozen=True)
class Latent:
    """Of the latent rows: norm states or norm adjoints."""

    query: Any
    key: Any

    def first(self) -> Latent:
        """The states of the first of a batch."""
        return Latent(self.query.select(0, 0), self.key.select(0, 0))

    def rows(self, keys: slice, queries: slice) -> Latent:
        """The same for some rows."""
        return Latent(self.query.rows(queries), self.key.rows(keys))


@dataclass(frozen=True)
class LatentTangent:
    """Tangents `[B, rows, rank]` of the latent rows, before their norms."""

    query: Tensor
    key: Tensor

    def rows(self, keys: slice, queries: slice) -> LatentTangent:
        """The same for some rows."""
        return LatentTangent(self.query[:, queries], self.key[:, keys])


class LatentProjection:
    """Queries, keys and values by way of narrow rows (DeepSeek-V2, multi-head latent attention):

        q = n(x W_qa') W_qb'  or  x W_q',     [c | r] = x W_a',     [k_h | v_h] = n(c) W_b'
        query_h = [q_h,rotary | q_h,rest],    key_h = [r | k_h],    value_h = [v_h | 0]

    The columns that rotary turns, `turned` of them, come first here, last in the model's features;
    all heads share those of the key. Values are `value_dim` wide and filled up with zeros.
    """

    def __init__(
        self,
        query_down: Linear | None,
        query_norm: AnyNorm,
        query: Linear,
        down: Linear,
        norm: AnyNorm,
        up: Linear,
        *,
        head_dim: int,
        turned: int,
        value_dim: int,
    ) -> None:
        self.query_down = query_down
        self.query_norm = query_norm
        self.query = query
        self.down = down
        self.norm = norm
        self.up = up
        self.head_dim = head_dim
        self.turned = turned
        self.value_dim = value_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All affine submodules."""
        query = (self.query,) if self.query_down is None else (self.query_down, self.query)
        return *query, self.down, self.up

    def sizes(self, row: Tensor) -> ProjectionSizes:
        """What a row meets; `keys` with the values' filling."""
        width = row.shape[-1]
        down = self.down.out_features(row)
        latent = down - self.turned
        up = self.up.out_features(row.new_zeros(1, latent))
        heads = up // (self.head_dim - self.turned + self.value_dim)
        query, narrow = heads * self.head_dim, 0
        query_weights, query_passed = query * width, query + width
        if self.query_down is not None:
            narrow = self.query_down.out_features(row)
            query_weights = (width + query) * narrow
            query_passed = width + 2 * narrow + query
        weights, passed = down * width + up * latent, width + down + latent + up
        return ProjectionSizes(
            query,
            query,
            weights=weights + query_weights,
            shared_weights=weights,
            passed=passed + query_passed,
            shared_passed=passed,
            normed=latent + narrow,
        )

    def _queries(self, features: Tensor) -> Tensor:
        """Rotary's columns to the front of every head."""
        heads: Tensor = features.unflatten(-1, (-1, self.head_dim))
        return heads.roll(self.turned, -1)

    def _keys(self, turned: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what all heads share `[B, S, t]` and of their own features."""
        rest = self.head_dim - self.turned
        key, value = features.unflatten(-1, (-1, rest + self.value_dim)).split(
            (rest, self.value_dim), -1
        )
        shared = turned[..., None, :].expand(*key.shape[:-1], -1)
        filling = self.head_dim - self.value_dim
        return torch.cat((shared, key), -1), torch.nn.functional.pad(value, (0, filling))

    def forward(self, x: Tensor, queries: int, *, keep: bool = True) -> tuple[Heads, Latent]:
        """Project `x [B, S, d]`; queries for its last `queries` rows."""
        narrow = x[:, -queries:]
        if self.query_down is not None:
            narrow = self.query_down.forward(narrow)
        narrow, query_state = self.query_norm.forward(narrow, keep=keep)
        latent, turned = self._halves(self.down.forward(x))
        latent, state = self.norm.forward(latent, keep=keep)
        heads = Heads(
            self._queries(self.query.forward(narrow)),
            *self._keys(turned, self.up.forward(latent)),
        )
        return heads, Latent(query_state, state)

    def _halves(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The latent row and rotary's columns; the former is copied, so that rows lie together."""
        latent, turned = features.split((features.shape[-1] - self.turned, self.turned), -1)
        return latent.contiguous(), turned

    def tangent(self, state: Latent, x_dot: Tensor, queries: int) -> tuple[Heads, LatentTangent]:
        """The tangents of the heads, and those of the latent rows."""
        narrow = x_dot[:, -queries:]
        if self.query_down is not None:
            narrow = self.query_down.tangent(narrow)
        latent, turned = self._halves(self.down.tangent(x_dot))
        query = self.query.tangent(self.query_norm.tangent(state.query, narrow))
        features = self.up.tangent(self.norm.tangent(state.key, latent))
        heads = Heads(self._queries(query), *self._keys(turned, features))
        return heads, LatentTangent(narrow, latent)

    def _features(self, bar: Heads) -> tuple[Tensor, Tensor, Tensor]:
        """The transposed maps of `_queries` and `_keys`: of queries, of rotary's columns, of up."""
        query = bar.query.roll(-self.turned, -1).flatten(-2)
        turned, key = bar.key.split((self.turned, self.head_dim - self.turned), -1)
        features = torch.cat((key, bar.value[..., : self.value_dim]), -1).flatten(-2)
        return query, turned.sum(-2), features

    def adjoint(self, state: Latent, bar: Heads, width: int) -> tuple[Tensor, Latent]:
        """`[B, S, d]` from the three adjoints, and the norms' adjoints."""
        query, turned, features = self._features(bar)
        narrow, query_bar = self.query_norm.adjoint(
            state.query, self.query.adjoint(query, self._narrow(state, width))
        )
        latent, norm_bar = self.norm.adjoint(
            state.key, self.up.adjoint(features, state.key.normalised.shape[-1])
        )
        kept = Latent(*(NormAdjoint(b.pulled[0], b.along[0]) for b in (query_bar, norm_bar)))
        return self._pull(narrow, latent, turned, width), kept

    def adjoint_tangent(
        self, state: Latent, tangent: LatentTangent, bar: Latent, bar_dot: Heads, width: int
    ) -> Tensor:
        """`[B, S, d]` from the tangents of the three adjoints and those of the latent rows."""
        query, turned, features = self._features(bar_dot)
        narrow = self.query_norm.adjoint_tangent(
            state.query,
            tangent.query,
            bar.query,
            self.query.adjoint(query, self._narrow(state, width)),
        )
        latent = self.norm.adjoint_tangent(
            state.key,
            tangent.key,
            bar.key,
            self.up.adjoint(features, state.key.normalised.shape[-1]),
        )
        return self._pull(narrow, latent, turned, width)

    def _narrow(self, state: Latent, width: int) -> int:
        """How many columns the queries' layer takes."""
        return width if self.query_down is None else int(state.query.normalised.shape[-1])

    def _pull(self, narrow: Tensor, latent: Tensor, turned: Tensor, width: int) -> Tensor:
        x_bar = self.down.adjoint(torch.cat((latent, turned), -1), width)
        if self.query_down is not None:
            narrow = self.query_down.adjoint(narrow, width)
        x_bar[:, -narrow.shape[1] :] += narrow
        return x_bar

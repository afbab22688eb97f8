"""How queries, keys and values are made of a row: by a linear layer each, or by one for all.

Features are flat here, `[B, rows, heads, D]`; `attention.py` turns them head-major.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from heat_fast.decoder.linear import Linear


@dataclass(frozen=True)
class Heads:
    """Query, key and value of some rows; queries may be the last `Q` of the `S` rows only."""

    query: Tensor
    key: Tensor
    value: Tensor


class Projection(Protocol):
    """How a family makes queries, keys and values; flat features, `[B, rows, heads, D]` each."""

    @property
    def linears(self) -> tuple[Linear, ...]: ...

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

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The three layers."""
        return self.query, self.key, self.value

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

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The one layer."""
        return (self.linear,)

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

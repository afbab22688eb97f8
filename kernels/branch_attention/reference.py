"""Causal attention of many branches over one shared prefix, in plain torch.

A branch is the unmodified context (the trunk) with one token replaced: below the replaced token
its keys and values are the trunk's, so they are read once for all branches and never copied.
The softmax over the two parts is joined by its log-sum-exp:

    lse = logaddexp(lse_prefix, lse_own),   o = sum_parts exp(s_part - lse) V_part

Layout, head-major so that a shared factor is one matrix product per head:
`Hk` key-value heads, `G` query heads per key-value head, `B` branches, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A tile of scores holds at most this many numbers: 4 MB in float32, about a core's share of cache.
TILE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Masking:
    """Which scores count, and how: `s = cap tanh(scale q.k / cap)`, causal, within `window`."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def first_key(self, first_query: int) -> int:
        """The first key position that a query at `first_query` may see."""
        return 0 if self.window is None else max(0, first_query - self.window + 1)

    def hidden(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`[Q, K]`, True where a query (absolute position) must not see a key."""
        hidden = keys[None, :] > queries[:, None]
        if self.window is not None:
            hidden = hidden | (keys[None, :] <= queries[:, None] - self.window)
        return hidden


def shared_right(x: Tensor, y: Tensor) -> Tensor:
    """`x [H, B, m, k] @ y [H, k, n]`: one product per head, `y` read once for all `B`."""
    heads, batch, rows, inner = x.shape
    return (x.reshape(heads, batch * rows, inner) @ y).view(heads, batch, rows, y.shape[-1])


def shared_left(x: Tensor, y: Tensor) -> Tensor:
    """`x [H, m, k] @ y [H, B, k, n]`: one product per head, `x` read once for all `B`."""
    heads, batch, inner, columns = y.shape
    product = x @ y.transpose(1, 2).reshape(heads, inner, batch * columns)
    return product.view(heads, x.shape[1], batch, columns).transpose(1, 2)


def branch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    masking: Masking,
) -> tuple[Tensor, Tensor]:
    """Attend from the last `Q` positions of every branch to the shared prefix and to its own rows.

    `query [Hk, B, G, Q, D]`, `key` and `value [Hk, B, S, D]` at positions `P..P+S-1`,
    `prefix_key` and `prefix_value [Hk, P, D]` at positions `0..P-1`; the queries stand at the last
    `Q` of the `S` positions. Returns the output `[Hk, B, G, Q, D]` in the query's dtype and the
    log-sum-exp `[Hk, B, G, Q]` in at least float32. Works tile by tile: memory is linear in `S`.
    """
    heads, batch, group, queries, _ = query.shape
    start, own = prefix_key.shape[1], key.shape[2]
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = torch.empty_like(query)
    normaliser = torch.empty(heads, batch, group, queries, dtype=sums, device=query.device)

    first = start + own - queries
    rows = max(1, TILE_ELEMENTS // max(1, heads * batch * group * (start + own)))
    for low in range(0, queries, rows):
        high = min(low + rows, queries)
        tile = query[:, :, :, low:high].reshape(heads, batch, group * (high - low), -1)
        positions = torch.arange(first + low, first + high, device=query.device)
        last = first + high - start  # own keys beyond the tile's last query are never visible
        below = min(masking.first_key(first + low), start)
        parts = []
        if below < start:
            scores = shared_right(tile, prefix_key[:, below:].transpose(1, 2))
            keys = torch.arange(below, start, device=query.device)
            parts.append(_finish_scores(scores, positions, keys, group, masking, sums))
        scores = tile @ key[:, :, :last].transpose(2, 3)
        keys = torch.arange(start, start + last, device=query.device)
        parts.append(_finish_scores(scores, positions, keys, group, masking, sums))

        lse = torch.logsumexp(parts[-1], dim=-1)
        if len(parts) == 2:
            lse = torch.logaddexp(lse, torch.logsumexp(parts[0], dim=-1))
        weights = [(part - lse[..., None]).exp_().to(query.dtype) for part in parts]
        total = weights[-1] @ value[:, :, :last]
        if len(parts) == 2:
            total = total + shared_right(weights[0], prefix_value[:, below:])
        output[:, :, :, low:high] = total.view(heads, batch, group, high - low, -1)
        normaliser[:, :, :, low:high] = lse.view(heads, batch, group, high - low)
    return output, normaliser


def _finish_scores(
    products: Tensor,
    positions: Tensor,
    keys: Tensor,
    group: int,
    masking: Masking,
    dtype: torch.dtype,
) -> Tensor:
    """Scale, cap and mask raw products `[Hk, B, G*Q, K]`."""
    scores = products.to(dtype) * masking.scale
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    hidden = masking.hidden(positions, keys)
    if bool(hidden.any()):
        scores.masked_fill_(hidden.repeat(group, 1), float("-inf"))
    return scores

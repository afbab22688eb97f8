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

# A tile of scores holds at most this many numbers: 1 MB in float32, so that it stays in a core's
# second-level cache over the passes of a softmax.
TILE_ELEMENTS = 1 << 18
TILE_ROWS = 48
# On a GPU it holds this many times more: there few launches count, not the size of a cache.
GPU_TILES = 64


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


def tile_shape(heads: int, per_row: int, queries: int, device: torch.device) -> tuple[int, int]:
    """Query rows and key-value heads of a tile, where a row of one head has `per_row` scores.

    Few rows of many heads: the shorter a tile, the more of the keys above its last query are
    skipped. But not fewer than `TILE_ROWS`, or the products get thin.
    """
    most = TILE_ELEMENTS * (1 if device.type == "cpu" else GPU_TILES)
    rows = min(queries, max(TILE_ROWS, most // max(1, heads * per_row)))
    return rows, max(1, min(heads, most // max(1, per_row * rows)))


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
    log-sum-exp `[Hk, B, G, Q]`. All arithmetic is done in at least float32, tile by tile: memory is
    linear in `S`.
    """
    heads, batch, group, queries, _ = query.shape
    start, own = prefix_key.shape[1], key.shape[2]
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = torch.empty_like(query)
    normaliser = torch.empty(heads, batch, group, queries, dtype=sums, device=query.device)

    first = start + own - queries
    rows, step = tile_shape(heads, batch * group * (start + own), queries, query.device)
    for head in range(0, heads, step):
        part = slice(head, min(head + step, heads))
        keys, values = key[part].to(sums), value[part].to(sums)
        below_keys, below_values = prefix_key[part].to(sums), prefix_value[part].to(sums)
        for low in range(0, queries, rows):
            high = min(low + rows, queries)
            tile = query[part, :, :, low:high].flatten(2, 3).to(sums) * masking.scale
            last = first + high - start  # own keys beyond the last query are never visible
            below = min(masking.first_key(first + low), start)
            result, lse = _attend(
                tile,
                (below_keys[:, below:], below_values[:, below:]),
                (keys[:, :, :last], values[:, :, :last]),
                first + low,
                group,
                masking,
            )
            output[part, :, :, low:high] = result.unflatten(2, (group, -1))
            normaliser[part, :, :, low:high] = lse.unflatten(2, (group, -1))
    return output, normaliser


def _attend(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    first: int,
    group: int,
    masking: Masking,
) -> tuple[Tensor, Tensor]:
    """One tile: `query [H, B, G*Q, D]` from position `first` on; output and log-sum-exp.

    `prefix`: keys and values `[H, P, D]` of the positions just below the own ones, `[H, B, S, D]`,
    whose last stands at the tile's last query.
    """
    count = query.shape[2] // group
    start = first + count - own[0].shape[2]
    scores = _cap(query @ own[0].transpose(2, 3), masking)
    _hide(scores, first, start, count, masking)
    peak = scores.detach().amax(-1, keepdim=True)  # the softmax does not depend on it
    below = None
    if prefix[0].shape[1]:
        below = _cap(shared_right(query, prefix[0].transpose(1, 2)), masking)
        if masking.window is not None:
            _hide(below, first, start - prefix[0].shape[1], count, masking)
        peak = torch.maximum(peak, below.detach().amax(-1, keepdim=True))

    # The weights are normalised after the product with the values, in its fewer columns.
    scores = scores.sub_(peak).exp_()
    total = scores.sum(-1, keepdim=True)
    result = scores @ own[1]
    if below is not None:
        below = below.sub_(peak).exp_()
        total = total + below.sum(-1, keepdim=True)
        result = result + shared_right(below, prefix[1])
    return result / total, (peak + total.log()).squeeze(-1)


def _cap(scores: Tensor, masking: Masking) -> Tensor:
    """Scaled scores, soft-capped for some families."""
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    return scores


def _hide(scores: Tensor, first: int, start: int, rows: int, masking: Masking) -> None:
    """Set scores `[H, B, G*Q, K]` that must not count to minus infinity, in place.

    The queries stand at `first .. first + rows - 1`, the keys from `start` on. Without a window
    only the keys from the first query on can be hidden.
    """
    skip = 0 if masking.window is not None else max(0, first - start)
    keys = torch.arange(start + skip, start + scores.shape[3], device=scores.device)
    if len(keys):
        queries = torch.arange(first, first + rows, device=scores.device)
        hidden = masking.hidden(queries, keys).repeat(scores.shape[2] // rows, 1)
        scores[..., skip:].masked_fill_(hidden, float("-inf"))

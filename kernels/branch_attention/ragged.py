"""Causal attention of branches that differ from the trunk at a few rows each, in plain torch.

Where a branch is the trunk it has the trunk's keys and values. A query's softmax therefore runs
over the trunk's keys, read once for all branches, save at the positions where its own branch
differs, and over the keys of these. The rows of all branches lie one after another, unpadded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heat_fast.kernels.branch_attention.reference import Masking, tile_shape


@dataclass(frozen=True)
class RaggedRows:
    """Some rows of several branches, by `branch [R]` (0, 1, ...) and `position [R]`, no pair twice.

    The first `keys` rows have keys and values of their own, those of all other rows are the
    trunk's; the last `queries` rows attend. Every branch has at least one row with its own key.
    """

    branch: Tensor
    position: Tensor
    keys: int
    queries: int


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    trunk_key: Tensor,
    trunk_value: Tensor,
    rows: RaggedRows,
    masking: Masking,
) -> tuple[Tensor, Tensor]:
    """Attend from the last `Q` rows to their branch: its `K` own keys, elsewhere the trunk's.

    `query [Hk, G, Q, D]`, `key` and `value [Hk, K, D]` stand at `rows`; `trunk_key` and
    `trunk_value [Hk, M, D]` at positions `0..M-1`. Returns `[Hk, G, Q, D]` in the query's dtype and
    the rows' log-sum-exp `[Hk, G, Q]`. All arithmetic is done in at least float32, tile by tile of
    the queries. A tile meets the own keys of the branches from its first to its last, so rows are
    best sorted by branch.
    """
    heads, group, queries, _ = query.shape
    length = trunk_key.shape[1]
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    branch, position = rows.branch[-queries:], rows.position[-queries:]
    own_branch, own_position = rows.branch[: rows.keys], rows.position[: rows.keys]
    everywhere = torch.arange(length, device=query.device)
    branches = int(rows.branch.max()) + 1
    replaced = torch.zeros(branches, length, dtype=torch.bool, device=query.device)
    replaced[own_branch, own_position] = True

    output = torch.empty_like(query)
    normaliser = torch.empty(query.shape[:-1], dtype=sums, device=query.device)
    tile, step = tile_shape(heads, 2 * group * length, queries, query.device)
    # The bounds of all tiles at once: on a GPU reading a number waits for all that was launched.
    bounds = torch.stack([torch.stack(each.aminmax()) for each in position.split(tile)]).tolist()
    for low, (nearest, furthest) in zip(range(0, queries, tile), bounds, strict=True):
        at = slice(low, min(low + tile, queries))
        who, where = branch[at], position[at]
        seen = slice(masking.first_key(nearest), furthest + 1)
        trunk_hidden = masking.hidden(where, everywhere[seen]) | replaced[who][:, seen]
        own = ((own_branch >= who.min()) & (own_branch <= who.max())).nonzero()[:, 0]
        own_hidden = masking.hidden(where, own_position[own]) | (who[:, None] != own_branch[own])
        for head in range(0, heads, step):
            part = slice(head, min(head + step, heads))
            scaled = query[part, :, at].flatten(1, 2).to(sums) * masking.scale
            below = _scores(scaled, trunk_key[part, seen].to(sums), trunk_hidden, masking)
            scores = _scores(scaled, key[part][:, own].to(sums), own_hidden, masking)
            # A row sees itself, in one part or the other: the peak is finite.
            peak = torch.maximum(below.amax(-1, keepdim=True), scores.amax(-1, keepdim=True))
            below, scores = below.sub_(peak).exp_(), scores.sub_(peak).exp_()
            total = below.sum(-1, keepdim=True) + scores.sum(-1, keepdim=True)
            result = below @ trunk_value[part, seen].to(sums)
            result += scores @ value[part][:, own].to(sums)
            output[part, :, at] = (result / total).unflatten(1, (group, -1))
            normaliser[part, :, at] = (peak + total.log())[..., 0].unflatten(1, (group, -1))
    return output, normaliser


def _scores(query: Tensor, key: Tensor, hidden: Tensor, masking: Masking) -> Tensor:
    """Scores `[H, G*Q, K]` of scaled `query [H, G*Q, D]`, minus infinity where `hidden [Q, K]`."""
    scores = query @ key.transpose(1, 2)
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    scores.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, float("-inf"))
    return scores

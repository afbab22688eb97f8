"""Means over windows, in plain torch.

Window w holds the tokens `index[w]`. With `W(i)` the windows that hold token i and count it,

    mean_i = 1 / max(1, |W(i)|) * sum_{w} value_w[i]

(paper Algorithm 1 with its count normaliser): 0 for a token that no window holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_mean(rows: Tensor, index: Tensor, tokens: int, counted: Tensor | None) -> Tensor:
    """As `api.window_mean`."""
    total = rows.new_zeros(rows.shape[1], tokens)
    count = rows.new_zeros(tokens)
    weights = rows.new_ones(index.shape) if counted is None else counted.to(rows.dtype)
    for values, weight, own in zip(rows, weights, index, strict=True):
        total.index_add_(1, own, values)
        count.index_add_(0, own, weight)
    return torch.div(total, count.clamp_min(1))

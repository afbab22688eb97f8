"""How near one attribution is to another."""

from __future__ import annotations

from torch import Tensor


def overlap(left: Tensor, right: Tensor, count: int = 10) -> float:
    """Share of the `count` largest entries that are largest in both."""
    both = {*left.topk(count).indices.tolist()} & {*right.topk(count).indices.tolist()}
    return len(both) / count


def relative_error(found: Tensor, exact: Tensor) -> float:
    """`sum |found - exact| / sum |exact|`."""
    return float((found - exact).abs().sum() / exact.abs().sum())

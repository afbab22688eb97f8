"""How far two rankings agree."""

from __future__ import annotations

import torch
from torch import Tensor


def spearman(left: Tensor, right: Tensor) -> float | None:
    """Spearman's rank correlation of two vectors, equal values at the mean of their ranks.

    None where one of them has no order, all its values being equal.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 9.0])), 6)
        1.0
        >>> spearman(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 3.0, 9.0])) is None
        True
    """
    ranks = torch.stack([_ranks(left), _ranks(right)])
    if bool((ranks.std(-1, unbiased=False) == 0).any()):
        return None
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    which: Tensor
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = last - (counts - 1) / 2
    return ranks[which]

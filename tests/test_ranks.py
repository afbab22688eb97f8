"""Rank correlation, held to SciPy's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heat_fast.ranks import spearman

_PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12)


@given(_PAIRS)
def test_spearman_is_that_of_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    left, right = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    found = spearman(left, right)
    if len(left.unique()) == 1 or len(right.unique()) == 1:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(left, right).statistic)

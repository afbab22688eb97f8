"""Low-rank approximation of a symmetric operator; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.low_rank.api import block_norms
from heat_fast.kernels.low_rank.reference import (
    Factors,
    orthonormalise,
    quality,
    single_pass,
    two_pass,
)

__all__ = ["Factors", "block_norms", "orthonormalise", "quality", "single_pass", "two_pass"]

"""Counter-based Rademacher probes; see `reference.py` for the generator."""

from __future__ import annotations

from heat_fast.kernels.rademacher.api import (
    block_probes,
    coded_moments,
    coded_sums,
    dense_probes,
    rademacher,
    row_norms,
)
from heat_fast.kernels.rademacher.reference import counter_words, walsh

__all__ = [
    "block_probes",
    "coded_moments",
    "coded_sums",
    "counter_words",
    "dense_probes",
    "rademacher",
    "row_norms",
    "walsh",
]

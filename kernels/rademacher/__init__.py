"""Counter-based Rademacher probes; see `reference.py` for the generator."""

from __future__ import annotations

from heat_fast.kernels.rademacher.reference import counter_words, rademacher, walsh

__all__ = ["counter_words", "rademacher", "walsh"]

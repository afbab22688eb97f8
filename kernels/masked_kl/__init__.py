"""KL divergence of perturbed next-token distributions; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.masked_kl.api import masked_kl_streamed, serves_streamed
from heat_fast.kernels.masked_kl.reference import masked_kl

__all__ = ["masked_kl", "masked_kl_streamed", "serves_streamed"]

"""Rotary position embedding; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.rotary.api import place
from heat_fast.kernels.rotary.reference import Table, rotate

__all__ = ["Table", "place", "rotate"]

"""Attention of many branches over a shared trunk; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.branch_attention.api import branch_attention
from heat_fast.kernels.branch_attention.ragged import RaggedRows, ragged_attention
from heat_fast.kernels.branch_attention.reference import Masking
from heat_fast.kernels.branch_attention.sinks import sink

__all__ = ["Masking", "RaggedRows", "branch_attention", "ragged_attention", "sink"]

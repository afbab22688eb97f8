"""Attention-value flow and value-output norms; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.value_norm_rollout.api import attention_flow, value_output_norms

__all__ = ["attention_flow", "value_output_norms"]

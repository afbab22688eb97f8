"""Attention's tangent, adjoint and tangent of adjoint; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.second_order_attention.api import (
    attention_adjoint,
    attention_adjoint_tangent,
    attention_tangent,
)
from heat_fast.kernels.second_order_attention.reference import Primal

__all__ = ["Primal", "attention_adjoint", "attention_adjoint_tangent", "attention_tangent"]

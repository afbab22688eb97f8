"""Attention's tangent, adjoint and tangent of adjoint; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.second_order_attention.reference import (
    Primal,
    attention_adjoint,
    attention_adjoint_tangent,
    attention_tangent,
)

__all__ = ["Primal", "attention_adjoint", "attention_adjoint_tangent", "attention_tangent"]

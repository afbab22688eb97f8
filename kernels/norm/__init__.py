"""LayerNorm and RMSNorm in three readings; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.norm.api import norm_adjoint_tangent, norm_forward, norm_tangent
from heat_fast.kernels.norm.reference import Affine, wide

__all__ = ["Affine", "norm_adjoint_tangent", "norm_forward", "norm_tangent", "wide"]

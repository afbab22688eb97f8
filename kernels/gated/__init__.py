"""A gated feed-forward layer between its products; see `reference.py` for the mathematics."""

from __future__ import annotations

from heat_fast.kernels.gated.api import gate_adjoint_tangent, gate_tangent

__all__ = ["gate_adjoint_tangent", "gate_tangent"]

"""Means over the windows of a long context; see `reference.py` for the formula."""

from __future__ import annotations

from heat_fast.kernels.window_mean.api import window_mean

__all__ = ["window_mean"]

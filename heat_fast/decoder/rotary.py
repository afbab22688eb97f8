"""Rotary position embedding: a linear map of each head, so it needs no state of its own.

The formulas are in `kernels/rotary/reference.py`.
"""

from __future__ import annotations

from torch import Tensor

from heat_fast.kernels.rotary import Table, rotate


class Rotary:
    """Tables `cos`, `sin` of shape `[positions, rotary_dim]`, one column per rotated dimension."""

    def __init__(self, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> None:
        # The first of a pair meets -sin, the second sin: partners are swapped and never negated.
        signed = sin.clone()
        first = signed[..., ::2] if interleaved else signed[..., : signed.shape[-1] // 2]
        first.neg_()
        self._whole = Table(cos, signed, interleaved)

    def table(self, start: int, like: Tensor, rows: int) -> Table:
        """The table of positions `start..start+rows-1`, on the device of `like`."""
        part = slice(start, start + rows)
        cos, sin = self._whole.cos[part].to(like.device), self._whole.sin[part].to(like.device)
        return Table(cos, sin, self._whole.interleaved)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Rotate `x [..., S, D]`, whose first row stands at position `start`; also the tangent."""
        return rotate(x, self.table(start, x, x.shape[-2]), 1)

    def adjoint(self, y_bar: Tensor, start: int) -> Tensor:
        """The transposed map: the same angles turned back, the same scale."""
        return rotate(y_bar, self.table(start, y_bar, y_bar.shape[-2]), -1)

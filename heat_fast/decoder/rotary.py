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

    def table(self, at: int | Tensor, like: Tensor, rows: int) -> Table:
        """The table of some positions, on the device of `like`.

        `at`: the first of `rows` positions, or all positions `[rows]`.
        """
        whole = self._whole
        part = at.to(whole.cos.device) if isinstance(at, Tensor) else slice(at, at + rows)
        cos, sin = whole.cos[part].to(like.device), whole.sin[part].to(like.device)
        return Table(cos, sin, whole.interleaved)

    def forward(self, x: Tensor, at: int | Tensor) -> Tensor:
        """Rotate `x [..., S, D]`; also the tangent.

        `at`: the position of the first row, or the positions `[S]` of all.
        """
        return rotate(x, self.table(at, x, x.shape[-2]), 1)

    def adjoint(self, y_bar: Tensor, start: int) -> Tensor:
        """The transposed map: the same angles turned back, the same scale."""
        return rotate(y_bar, self.table(start, y_bar, y_bar.shape[-2]), -1)

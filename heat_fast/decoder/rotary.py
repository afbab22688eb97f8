"""Rotary position embedding: a linear map of each head, so it needs no state of its own.

For a pair `(u, v)` of one head's dimensions at one position, with angle `t` and scale `s`:
`(u, v) -> s (u cos t - v sin t, v cos t + u sin t)`. Pairs are `(j, j + n/2)` ("half", Llama and
kin) or `(2j, 2j + 1)` ("interleaved", GPT-J). Dimensions beyond the table's width pass unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """Tables `cos`, `sin` of shape `[positions, rotary_dim]`, one column per rotated dimension."""

    def __init__(self, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> None:
        self.cos = cos
        self.interleaved = interleaved

        # The first of a pair meets -sin, the second sin: partners are swapped and never negated.
        signed = sin.clone()
        first = signed[..., ::2] if interleaved else signed[..., : signed.shape[-1] // 2]
        first.neg_()
        self.signed_sin = signed

    def _partners(self, x: Tensor) -> Tensor:
        if self.interleaved:
            swapped: Tensor = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
            return swapped
        return x.roll(x.shape[-1] // 2, -1)

    def _turn(self, x: Tensor, at: int | Tensor, sign: int) -> Tensor:
        rows = at.to(self.cos.device) if isinstance(at, Tensor) else slice(at, at + x.shape[-2])
        cos, sin = self.cos[rows].to(x.device), self.signed_sin[rows].to(x.device)
        width = cos.shape[-1]
        turned = x[..., :width]
        turned = torch.addcmul(turned * cos, self._partners(turned), sin, value=sign)
        return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)

    def forward(self, x: Tensor, at: int | Tensor) -> Tensor:
        """Rotate `x [..., S, D]`; also the tangent.

        `at`: the position of the first row, or the positions `[S]` of all.
        """
        return self._turn(x, at, 1)

    def adjoint(self, y_bar: Tensor, start: int) -> Tensor:
        """The transposed map: the same angles turned back, the same scale."""
        return self._turn(y_bar, start, -1)

"""Rotary position embedding as a linear map of each head, in plain torch.

For a pair `(u, v)` of one head's dimensions at one position, with angle `t` and scale `s`:
`(u, v) -> s (u cos t - v sin t, v cos t + u sin t)`. Pairs are `(j, j + n/2)` ("half", Llama and
kin) or `(2j, 2j + 1)` ("interleaved", GPT-J). Dimensions beyond the table's width pass unchanged.
Turning back (`sign = -1`) is the transposed map: the same angles negated, the same scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """`cos`, `sin [S, n]` of some positions; the first of a pair has its sine negated."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def _partners(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        swapped: Tensor = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return swapped
    return x.roll(x.shape[-1] // 2, -1)


def rotate(x: Tensor, table: Table, sign: int) -> Tensor:
    """Rotate `x [..., S, D]`, in float32 where the table is (OLMo); the result has x's dtype."""
    width = table.cos.shape[-1]
    turned = x[..., :width]
    partners = _partners(turned, table.interleaved)
    turned = torch.addcmul(turned * table.cos, partners, table.sin, value=sign).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def place(x: Tensor, target: Tensor, table: Table | None, sign: int) -> None:
    """Write `x [B, S, H, D]`, rotated if there is a table, into `target` of that shape."""
    if table is None:
        target.copy_(x)
    else:
        target.copy_(rotate(x.transpose(1, 2), table, sign).transpose(1, 2))

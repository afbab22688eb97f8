"""Rotation of heads on their way between layouts: one door to its implementations."""

from __future__ import annotations

from torch import Tensor

from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.rotary import native, reference
from heat_fast.kernels.rotary.reference import Table


def place(
    x: Tensor, target: Tensor, table: Table | None, sign: int = 1, *, impl: str | None = None
) -> None:
    """Write `x [B, S, H, D]`, rotated by `table` (None: as it is), into `target` of that shape.

    Both may have any strides, so that one pass changes from the layout of the projections to that
    of the attention, or back (`sign = -1` turns back). `impl`: see `heat_fast.kernels.dispatch`.

    Example:
        >>> import torch
        >>> x, y = torch.ones(1, 2, 3, 4), torch.empty(3, 1, 2, 4)
        >>> place(x, y.permute(1, 2, 0, 3), None)
        >>> bool((y == 1).all())
        True
    """
    tables = () if table is None else (table.cos, table.sin)
    same = all(part.dtype == x.dtype for part in (target, *tables))
    dense = target.stride(-1) == 1 and all(part.stride(-1) == 1 for part in tables)
    offers = ("native",) if same and dense else ()
    if implementation("rotary", impl, x, target, *tables, offers=offers) == "native":
        native.place(x, target, table, sign)
    else:
        reference.place(x, target, table, sign)

"""Products with the model's weights in half precision, on CPUs.

Where there are no instructions for the dtype torch multiplies bfloat16 and float16 matrices number
by number, slowest where a weight is read along its rows, as the adjoint of a layer does. Here the
weight is widened to float32 piece by piece instead, each small enough to stay in the cache, and the
sums are rounded once, at the end (`bench/test_bench_engine.py` measures a run with and without).

Where torch has instructions for that dtype (AVX-512 and what came after, each its own), its
products are taken. Its library compiles one for every number of rows that it meets, 0.6 MB of code
each, and keeps up to 1,024 of them; batches of branches and sweeps have any number. So rows are
filled up to a multiple of `ROWS`: 154 MB instead of 747 for the branches of 512 prompt tokens in a
small model, in the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

#: Rows are filled up to a multiple of this, where torch's own products of halves are taken.
ROWS: Final = 32
_HALVES: Final = (torch.bfloat16, torch.float16)
# Numbers of a weight that are widened at a time, for each thread: 1 MiB in float32.
_PIECE: Final = 1 << 18
# Numbers of the left factor, and of the sums, that are held at a time, 64 MiB each in float32. The
# weight is widened anew for each lot of rows, so even those of a large vocabulary have some.
_LOT: Final = 1 << 24
_LEAST_ROWS: Final = 64
# Fewer rows than these are multiplied no faster than by torch's own dot products.
_DOT_ROWS: Final = 8


def in_half_on_cpu(x: Tensor) -> bool:
    """Whether products of x are this module's concern."""
    return x.device.type == "cpu" and x.dtype in _HALVES


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether torch has products of its own for a half-precision dtype on this CPU."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    # Without the question, as with builds of torch that have no such products, the answer is no.
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return bool(supported is not None and torch.backends.mkldnn.enabled and supported())


def is_widened(x: Tensor, matrix: Tensor) -> bool:
    """Whether `product(x, matrix)` is better taken in float32 than by torch itself."""
    if not in_half_on_cpu(matrix):
        return False
    if matrix.stride(0) == 1 and x.numel() < _DOT_ROWS * x.shape[-1]:
        return False
    return x.dtype == matrix.dtype and not has_instructions(matrix.dtype)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """`x M`, `[..., in] x [in, out] -> [..., out]`, in the dtype of both.

    >>> product(torch.ones(3, 2), torch.ones(2, 5)).shape
    torch.Size([3, 5])
    """
    if is_widened(x, matrix):
        return widened(x, matrix)
    return _filled(x, lambda rows: rows @ matrix)


def affine(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    """`x W' + b`, `weight [out, in]`, `offset [out]`, in the dtype of all three."""
    if is_widened(x, weight.t()):
        return widened(x, weight.t(), offset)
    return _filled(x, lambda rows: functional.linear(rows, weight, offset))


def _filled(x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """What `multiply` makes of x, whose rows are filled up with zeros where that is worth it."""
    rows = x.numel() // max(1, x.shape[-1])
    if not in_half_on_cpu(x) or rows < ROWS or rows % ROWS == 0:
        return multiply(x)
    full = x.new_zeros(-(-rows // ROWS) * ROWS, x.shape[-1])
    full[:rows] = x.reshape(rows, -1)
    return multiply(full)[:rows].view(*x.shape[:-1], -1)


def widened(x: Tensor, matrix: Tensor, offset: Tensor | None = None) -> Tensor:
    """`x M + b` of half-precision factors with float32 sums; `offset [out]`."""
    rows = x.reshape(-1, x.shape[-1])
    result = x.new_empty(rows.shape[0], matrix.shape[1])
    count = max(_LEAST_ROWS, _LOT // max(1, *matrix.shape))
    for low in range(0, rows.shape[0], count):
        lot = slice(low, low + count)
        _multiply(rows[lot].float(), matrix, offset, result[lot])
    return result.view(*x.shape[:-1], matrix.shape[1])


def _multiply(rows: Tensor, matrix: Tensor, offset: Tensor | None, result: Tensor) -> None:
    """Write `rows M + b` to `result`, M in pieces that lie together in memory."""
    columns = matrix.stride(0) == 1
    length, width = matrix.shape if not columns else matrix.shape[::-1]
    step = max(1, _PIECE * torch.get_num_threads() // max(1, width))
    pieces = [slice(low, min(low + step, length)) for low in range(0, length, step)]
    if columns:
        for piece in pieces:
            part = rows @ matrix[:, piece].float()
            result[:, piece] = part if offset is None else part.add_(offset[piece])
        return
    total = rows.new_zeros(result.shape)
    for piece in pieces:
        total.addmm_(rows[:, piece], matrix[piece].float())
    result.copy_(total if offset is None else total.add_(offset))

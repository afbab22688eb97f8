"""Products with the model's weights on CPUs, each taken where it is fastest there.

- **Half precision without instructions for it**: torch multiplies bfloat16 and float16 matrices
  number by number, slowest where a weight is read along its rows, as the adjoint of a layer does.
  Here the weight is widened to float32 piece by piece instead, each small enough to stay in the
  cache, and the sums are rounded once, at the end (`bench/test_bench_engine.py` measures a run with
  and without).
- **Half precision with instructions** (AVX-512 and what came after, each its own): torch's own
  products, which are oneDNN's.
- **float32 on AMD's processors with AVX-512**: torch takes MKL's products, which keep to AVX2
  there. oneDNN's, which are in torch as well, are about twice as fast.
- Anything else: torch's own.

oneDNN compiles a product for every number of rows that it meets, 0.6 MB of code each, and keeps
1,024 of them; batches of branches and sweeps have any number. So rows are filled up to a multiple
of `ROWS`, few to a power of two, which takes no longer. `bench/products.py` measures both.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from heat_fast.kernels import dispatch

#: Rows are filled up to a multiple of this for oneDNN, fewer than half of it to a power of two.
ROWS: Final = 32
_HALVES: Final = (torch.bfloat16, torch.float16)
# Bytes of code, and what is kept with it, of a product that oneDNN compiled.
_COMPILED: Final = 600_000
_CPUINFO: Final = "/proc/cpuinfo"
# The maker, by its own name, of processors with AVX-512 on which MKL was seen not to use it.
_PASSED_OVER: Final = "AuthenticAMD"
# Numbers of a weight that are widened at a time, for each thread: 1 MiB in float32.
_PIECE: Final = 1 << 18
# Numbers of the left factor, and of the sums, that are held at a time, 64 MiB each in float32. The
# weight is widened anew for each lot of rows, so even those of a large vocabulary have some.
_LOT: Final = 1 << 24
_LEAST_ROWS: Final = 64
# Fewer rows than these are multiplied no faster than by torch's own dot products.
_DOT_ROWS: Final = 8


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether torch has products of its own for a half-precision dtype on this CPU."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    # Without the question, as with builds of torch that have no such products, the answer is no.
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return bool(supported is not None and torch.backends.mkldnn.enabled and supported())


@functools.cache
def passed_over_by_mkl() -> bool:
    """Whether this CPU has AVX-512 and MKL does not use it, by the maker's name."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        with open(_CPUINFO, encoding="ascii", errors="replace") as file:
            name = next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        name = platform.processor()
    return _PASSED_OVER in name


def multiplier(x: Tensor, weight: Tensor) -> str:
    """Whose product `x W'` is taken: `"widened"`, `"onednn"` or torch's choice, `"reference"`."""
    if x.device.type != "cpu" or x.dtype != weight.dtype:
        return "reference"
    if x.dtype in _HALVES and not has_instructions(x.dtype):
        few = weight.stride(-1) == 1 and x.numel() < _DOT_ROWS * x.shape[-1]
        return "reference" if few else "widened"
    best = x.dtype in _HALVES or (
        x.dtype == torch.float32
        and not x.requires_grad
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.mkldnn.enabled
        and passed_over_by_mkl()
    )
    return "onednn" if best and dispatch.choice() != "reference" else "reference"


def compiled_bytes(rows: int, weight: Tensor) -> int:
    """What oneDNN holds of a model's products of up to so many rows: four for each multiple."""
    weight = weight.detach()
    serves = multiplier(weight[:1].expand(ROWS, -1), weight) == "onednn"
    return 4 * _COMPILED * (rows // ROWS) if serves else 0


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """`x M`, `[..., in] x [in, out] -> [..., out]`, in the dtype of both.

    >>> product(torch.ones(3, 2), torch.ones(2, 5)).shape
    torch.Size([3, 5])
    """
    return affine(x, matrix.t(), None)


def affine(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    """`x W' + b`, `weight [out, in]`, `offset [out]`, in the dtype of all three."""
    better = better_affine(x, weight, offset)
    return functional.linear(x, weight, offset) if better is None else better


def better_affine(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor | None:
    """The same, or None where torch's own layer is as good."""
    chosen = multiplier(x, weight)
    dispatch.note("product", chosen)
    if chosen == "widened":
        return widened(x, weight.t(), offset)
    if chosen == "onednn":
        return _filled(x, lambda rows: _onednn(rows, weight, offset))
    return None


def filled_rows(rows: int) -> int:
    """How many rows oneDNN is given: a multiple of `ROWS`, or few as a power of two.

    >>> [filled_rows(rows) for rows in (0, 1, 5, 17, 33)]
    [0, 1, 8, 32, 64]
    """
    if rows <= ROWS // 2:
        return 1 << (rows - 1).bit_length() if rows else 0
    return -(-rows // ROWS) * ROWS


def _onednn(rows: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    if rows.dtype != torch.float32:  # torch's own choice
        return functional.linear(rows, weight, offset)
    # The layer that torch's compiler takes, with nothing after it.
    linear = torch.ops.mkldnn._linear_pointwise.default
    result: Tensor = linear(rows, weight, offset, "none", [], "")
    return result


def _filled(x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """What `multiply` makes of x, whose rows are filled up with zeros."""
    rows = x.numel() // max(1, x.shape[-1])
    wanted = filled_rows(rows)
    if rows == wanted:
        return multiply(x)
    full = x.new_zeros(wanted, x.shape[-1])
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

"""Probes and the reductions of their products on a GPU; `reference.py` has the mathematics.

Signs are made where they are needed from the same 32-bit words as the reference's: no table of them
is read, and they are the same for every tile size. All kernels here are bound by memory: each
number of a probe is written once, each number of a product read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.rademacher.reference import seed_word


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a program's tile."""

    rows: int
    columns: int
    warps: int


# By architecture.
_TILES = {80: Tile(4, 512, 4), 100: Tile(4, 1024, 8)}


@triton.jit
def mix(x):
    """The "lowbias32" finaliser on words of uint32."""
    x = x + 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def signs_of(key, samples, tokens, dimensions):
    """Signs +1.0 or -1.0 of counters (of any integer type) that broadcast to one shape.

    `key`: a seed's word, as int32.
    """
    word = mix(key.to(tl.uint32, bitcast=True) ^ samples.to(tl.uint32))
    word = mix(word ^ tokens.to(tl.uint32))
    word = mix(word ^ (dimensions // 32).to(tl.uint32))
    bit = (word >> (dimensions % 32).to(tl.uint32)) & 1
    return 1.0 - 2.0 * bit.to(tl.float32)


@triton.jit
def walsh_of(rows, columns):
    """`(-1)^popcount(row & column)` as float32, of int32."""
    both = rows & columns
    both = both ^ (both >> 16)
    both = both ^ (both >> 8)
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    return 1.0 - 2.0 * (both & 1).to(tl.float32)


@triton.jit(do_not_specialize=["key"])
def signs_kernel(
    result, samples, tokens, key, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """`result[row]`: the signs of (samples[row], tokens[row])."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sample = tl.load(samples + rows, mask=rows < count, other=0)[:, None]
    token = tl.load(tokens + rows, mask=rows < count, other=0)[:, None]
    values = signs_of(key, sample, token, columns[None, :])
    place = result + rows[:, None].to(tl.int64) * width + columns[None, :]
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    tl.store(place, values.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key", "start"])
def block_probes_kernel(
    result, samples, tokens, key, start, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """`result[b]`: zeros, and in one row its signs."""
    blocks = tl.cdiv(length, ROWS)
    probe = tl.program_id(0) // blocks
    low = tl.program_id(0) % blocks * ROWS
    rows = low + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(tokens + probe).to(tl.int32)
    at = token - start
    values = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if (at >= low) & (at < low + ROWS):
        sample = tl.load(samples + probe).to(tl.int32)
        own = signs_of(key, sample, token, columns[None, :])
        values = tl.where((rows == at)[:, None], own, values)
    result += probe.to(tl.int64) * length * width
    place = result + rows[:, None].to(tl.int64) * width + columns[None, :]
    inside = (rows < length)[:, None] & (columns < width)[None, :]
    tl.store(place, values.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key"])
def dense_probes_kernel(
    result,
    samples,
    codes,
    key,
    length,
    width,
    count,
    CODED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`result[b]`: the signs of sample b, times its code, in rows below `count`; zeros above."""
    blocks = tl.cdiv(length, ROWS)
    probe = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sample = tl.load(samples + probe).to(tl.int32)
    values = signs_of(key, sample, rows[:, None], columns[None, :])
    if CODED:
        values *= walsh_of(tl.load(codes + probe).to(tl.int32), rows)[:, None]
    values = tl.where((rows < count)[:, None], values, 0.0)
    result += probe.to(tl.int64) * length * width
    place = result + rows[:, None].to(tl.int64) * width + columns[None, :]
    inside = (rows < length)[:, None] & (columns < width)[None, :]
    tl.store(place, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def row_norms_kernel(
    rows_of,
    norms,
    batch_stride,
    row_stride,
    length,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`norms[b, p] = |x[b, p]|_1`."""
    blocks = tl.cdiv(length, ROWS)
    batch = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    rows_of += batch.to(tl.int64) * batch_stride
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for low in range(0, width, COLUMNS):
        inside = (rows < length)[:, None] & (low + columns < width)[None, :]
        place = rows_of + rows[:, None].to(tl.int64) * row_stride + (low + columns)[None, :]
        total += tl.abs(tl.load(place, mask=inside, other=0.0).to(tl.float32))
    tl.store(norms + batch.to(tl.int64) * length + rows, tl.sum(total, 1), mask=rows < length)


@triton.jit
def coded_sums_kernel(
    products,
    codes,
    total,
    squares,
    batch_stride,
    row_stride,
    count,
    tokens,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over k of `z_k = walsh(codes[k], i) x_k` and of its square."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    products += rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    of_squares = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for k in range(0, count):
        x = tl.load(products, mask=inside, other=0.0).to(tl.float32)
        sums += walsh_of(tl.load(codes + k).to(tl.int32), rows)[:, None] * x
        of_squares += x * x
        products += batch_stride.to(tl.int64)
    place = rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(total + place, sums, mask=inside)
    tl.store(squares + place, of_squares, mask=inside)


@triton.jit
def coded_moments_kernel(
    total,
    squares,
    results,
    codes,
    share,
    count,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`results[:, row]`: the norm of the mean over codes, its noise and its energy."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    norm = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    noise = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    energy = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    number = codes.to(tl.float32)
    for low in range(0, width, COLUMNS):
        inside = (rows < count)[:, None] & (low + columns < width)[None, :]
        place = rows[:, None].to(tl.int64) * width + (low + columns)[None, :]
        mean = tl.load(total + place, mask=inside, other=0.0) / number
        square = mean * mean
        spread = tl.load(squares + place, mask=inside, other=0.0) - number * square
        norm += tl.abs(mean)
        noise += tl.maximum(spread, 0.0)
        energy += square
    tl.store(results + rows, tl.sum(norm, 1), mask=rows < count)
    tl.store(results + count + rows, tl.sum(noise, 1) * share, mask=rows < count)
    tl.store(results + 2 * count + rows, tl.sum(energy, 1), mask=rows < count)


def key_of(seed: int) -> int:
    """A seed's word as the int32 that the kernels take."""
    word = seed_word(seed)
    return word - (1 << 32) if word >> 31 else word


def _launch(tensor: Tensor) -> tuple[Tile, dict[str, Any]]:
    tile = gpu.for_architecture(_TILES, tensor.device)
    return tile, {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps}


def rademacher(
    seed: int,
    samples: Tensor,
    tokens: Tensor,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `reference.rademacher`."""
    device = tokens.device
    samples, tokens = torch.broadcast_tensors(samples.to(device), tokens)
    result = torch.empty(*samples.shape, width, dtype=dtype, device=device)
    if result.numel() == 0:
        return result
    tile, sizes = _launch(result)
    grid = triton.cdiv(samples.numel(), tile.rows), triton.cdiv(width, tile.columns)
    with gpu.on(result):
        signs_kernel[grid](
            result,
            samples.contiguous(),
            tokens.contiguous(),
            key_of(seed),
            samples.numel(),
            width,
            **sizes,
        )
    return result


def block_probes(
    seed: int,
    samples: Tensor,
    tokens: Tensor,
    span: tuple[int, int],
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `reference.block_probes`."""
    start, stop = span
    count, length = len(tokens), stop - start
    result = torch.empty(count, length, width, dtype=dtype, device=tokens.device)
    if result.numel() == 0:
        return result
    tile, sizes = _launch(result)
    grid = count * triton.cdiv(length, tile.rows), triton.cdiv(width, tile.columns)
    with gpu.on(result):
        block_probes_kernel[grid](
            result,
            samples.contiguous(),
            tokens.contiguous(),
            key_of(seed),
            start,
            length,
            width,
            **sizes,
        )
    return result


def dense_probes(
    seed: int,
    samples: Tensor,
    tokens: int,
    length: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    codes: Tensor | None = None,
) -> Tensor:
    """See `reference.dense_probes`."""
    if codes is not None:
        samples = samples.expand(len(codes))
    result = torch.empty(len(samples), length, width, dtype=dtype, device=samples.device)
    if result.numel() == 0:
        return result
    tile, sizes = _launch(result)
    grid = len(samples) * triton.cdiv(length, tile.rows), triton.cdiv(width, tile.columns)
    with gpu.on(result):
        dense_probes_kernel[grid](
            result,
            samples.contiguous(),
            samples if codes is None else codes.contiguous(),
            key_of(seed),
            length,
            width,
            tokens,
            CODED=codes is not None,
            **sizes,
        )
    return result


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def row_norms(rows: Tensor) -> Tensor:
    """See `reference.row_norms`."""
    flat = _dense(rows if rows.dim() == 3 else rows.reshape(1, -1, rows.shape[-1]))
    batch, length, width = flat.shape
    norms = torch.empty(batch, length, dtype=torch.float32, device=rows.device)
    if norms.numel():
        tile, sizes = _launch(flat)
        with gpu.on(flat):
            row_norms_kernel[(batch * triton.cdiv(length, tile.rows),)](
                flat, norms, flat.stride(0), flat.stride(1), length, width, **sizes
            )
    return norms.view(rows.shape[:-1])


def coded_sums(rows: Tensor, codes: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """See `reference.coded_sums`."""
    rows = _dense(rows)
    count, _, width = rows.shape
    total = torch.empty(tokens, width, dtype=torch.float32, device=rows.device)
    squares = torch.empty_like(total)
    tile, sizes = _launch(rows)
    grid = triton.cdiv(tokens, tile.rows), triton.cdiv(width, tile.columns)
    with gpu.on(rows):
        coded_sums_kernel[grid](
            rows,
            codes.contiguous(),
            total,
            squares,
            rows.stride(0),
            rows.stride(1),
            count,
            tokens,
            width,
            **sizes,
        )
    return total, squares


def coded_moments(
    total: Tensor, squares: Tensor, codes: int, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.coded_moments`."""
    shape, width = total.shape[:-1], total.shape[-1]
    count = shape.numel()
    results = torch.empty(3, count, dtype=torch.float32, device=total.device)
    share = (1 - codes / order) / codes / max(1, codes - 1)
    tile, sizes = _launch(total)
    with gpu.on(total):
        coded_moments_kernel[(triton.cdiv(count, tile.rows),)](
            total.contiguous(), squares.contiguous(), results, codes, share, count, width, **sizes
        )
    norm, noise, energy = (each.view(shape) for each in results)
    return norm, noise, energy


def variants(capability: int) -> Iterator[Variant]:
    """Every configuration that is shipped for an architecture."""
    tile = gpu.for_architecture(_TILES, capability)
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    counters = {"samples": "*i64", "tokens": "*i64"}
    for kind in ("fp16", "bf16", "fp32"):
        many: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
            (
                signs_kernel,
                {"result": f"*{kind}", **counters, "key": "i32", "count": "i32", "width": "i32:16"},
                {},
            ),
            (
                block_probes_kernel,
                {
                    "result": f"*{kind}",
                    **counters,
                    **dict.fromkeys(("key", "start", "length"), "i32"),
                    "width": "i32:16",
                },
                {},
            ),
            (
                dense_probes_kernel,
                {
                    "result": f"*{kind}",
                    "samples": "*i64",
                    "codes": "*i64",
                    **dict.fromkeys(("key", "length"), "i32"),
                    "width": "i32:16",
                    "count": "i32",
                },
                {"CODED": True},
            ),
            (
                row_norms_kernel,
                {
                    "rows_of": f"*{kind}",
                    "norms": "*fp32",
                    **dict.fromkeys(("batch_stride", "row_stride"), "i32:16"),
                    "length": "i32",
                    "width": "i32:16",
                },
                {},
            ),
            (
                coded_sums_kernel,
                {
                    "products": f"*{kind}",
                    "codes": "*i64",
                    "total": "*fp32",
                    "squares": "*fp32",
                    **dict.fromkeys(("batch_stride", "row_stride"), "i32:16"),
                    **dict.fromkeys(("count", "tokens"), "i32"),
                    "width": "i32:16",
                },
                {},
            ),
        ]
        for kernel, types, constants in many:
            yield Variant(kernel, kind, types, {**constants, **sizes}, tile.warps)
    yield Variant(
        coded_moments_kernel,
        "fp32",
        {
            **dict.fromkeys(("total", "squares", "results"), "*fp32"),
            "codes": "i32",
            "share": "fp32",
            "count": "i32",
            "width": "i32:16",
        },
        sizes,
        tile.warps,
    )

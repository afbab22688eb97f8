"""`|V W_O|_1` on a GPU: a program owns a block of tokens of one query head and walks over features.

A tile of the product lives in registers until its absolute values are summed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.value_norm_rollout import tiles

#: Where there are fewer programs, the output features are shared out: two for each multiprocessor.
PROGRAMS = 256


@triton.jit
def value_norms_kernel(
    value,
    weight,
    norms,
    value_head,
    value_row,
    weight_row,
    weight_column,
    norms_split,
    length,
    outputs,
    outputs_each,
    group,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`norms[split, head, i] = sum over a split's n of |sum_k value[i, k] weight[n, head, k]|`."""
    head = tl.program_id(1)
    split = tl.program_id(2)
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, INNER)
    start = split * outputs_each
    stop = tl.minimum(start + outputs_each, outputs)

    value += (head // group).to(tl.int64) * value_head
    v_tile = value + tokens[:, None].to(tl.int64) * value_row + inner[None, :]
    own = (tokens < length)[:, None]
    if INNER == PADDED:
        v = tl.load(v_tile, mask=own & (inner < WIDTH)[None, :], other=0.0)
    columns = tl.arange(0, COLUMNS)
    weight += start.to(tl.int64) * weight_row + head.to(tl.int64) * WIDTH * weight_column
    tile = (
        weight
        + columns[:, None].to(tl.int64) * weight_row
        + inner[None, :].to(tl.int64) * weight_column
    )
    total = tl.zeros([ROWS], dtype=tl.float32)
    for low in range(start, stop, COLUMNS):
        some = (low + columns < stop)[:, None]
        if INNER == PADDED:
            w = tl.load(tile, mask=some & (inner < WIDTH)[None, :], other=0.0)
            moved = tl.dot(v, tl.trans(w), input_precision=PRECISION)
        else:
            moved = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for part in range(0, PADDED, INNER):
                inside = (part + inner < WIDTH)[None, :]
                v = tl.load(v_tile + part, mask=own & inside, other=0.0)
                w = tl.load(
                    tile + part * tl.cast(weight_column, tl.int64), mask=some & inside, other=0.0
                )
                moved = tl.dot(v, tl.trans(w), moved, input_precision=PRECISION)
        total += tl.sum(tl.abs(moved), 1)
        tile += COLUMNS * tl.cast(weight_row, tl.int64)
    norms += split.to(tl.int64) * norms_split + head.to(tl.int64) * length
    tl.store(norms + tokens, total, mask=tokens < length)


def value_output_norms(value: Tensor, output_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.value_output_norms`; summed in float32."""
    heads, length, width = value.shape
    outputs = output_weight.shape[0]
    count = output_weight.shape[1] // width
    if value.stride(-1) != 1:
        value = value.contiguous()
    tile = tiles.of(tiles.NORMS, value)
    blocks = triton.cdiv(length, tile.rows)
    # Few tokens make few programs: then the output features are shared out.
    splits, each = tiles.shared_out(outputs, PROGRAMS // (blocks * count), tile, least=8)
    norms = torch.empty(splits, count, length, dtype=torch.float32, device=value.device)
    with gpu.on(value):
        value_norms_kernel[blocks, count, splits](
            value,
            output_weight,
            norms,
            value.stride(0),
            value.stride(1),
            output_weight.stride(0),
            output_weight.stride(1),
            norms.stride(0),
            length,
            outputs,
            each,
            count // heads,
            **tiles.constants(tile, width),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    total = norms[0] if splits == 1 else norms.sum(0)
    return total.view(heads, count // heads, length).to(dtype)


def variants(capability: int) -> Iterator[Variant]:
    """Every configuration that is shipped for an architecture."""
    for kind, size in tiles.TYPES.items():
        for padded in (64, 128, 256):
            tile = gpu.for_architecture(tiles.NORMS, capability)[size, padded]
            strides = "value_head value_row weight_row".split()
            numbers = "norms_split length outputs outputs_each group".split()
            yield Variant(
                value_norms_kernel,
                f"{kind} width {padded}",
                {
                    "value": f"*{kind}",
                    "weight": f"*{kind}",
                    "norms": "*fp32",
                    **dict.fromkeys(strides, "i32:16"),
                    **dict.fromkeys(numbers, "i32"),
                },
                {"weight_column": 1, **tiles.constants(tile, padded)},
                tile.warps,
                tile.stages,
            )

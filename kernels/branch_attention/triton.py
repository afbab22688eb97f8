"""Attention of many branches over a shared prefix on a GPU; `reference.py` has the mathematics.

A program owns a tile of the rows of `[B, Q, G]` of one key-value head, all branches flattened: a
tile of the prefix's keys is read once for every row in it, whichever branches they belong to. Then
come the own keys of each of these branches. Both parts run through one online softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.branch_attention.native import heads_like
from heat_fast.kernels.branch_attention.reference import Masking
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.device import soft_cap

#: Products of float32: three passes of the tensor cores, near full precision. See the README.
PRECISION = "tf32x3"
#: Registers of a thread. Left to itself, the assembler takes half as many and spills.
REGISTERS = 255
#: Rows of a tile where the branches have few: most of a larger one would wait for other branches.
FEW_ROWS = 16


@dataclass(frozen=True)
class Tile:
    """Query `rows` that a program owns, key `columns` that it takes at a time.

    `inner`: the part of a head's width over which scores are multiplied at once. If that is all of
    it, a program reads its queries once; else with every tile of keys, as they would fill all
    registers.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    inner: int = 256


# By architecture, then by (bytes of an input number, padded head width).
_TILES = {
    80: {
        (2, 64): Tile(128, 64, 8, 2),
        (2, 128): Tile(64, 32, 8, 2),
        (2, 256): Tile(32, 32, 8, 1),
        (4, 64): Tile(32, 32, 4, 1),
        (4, 128): Tile(32, 32, 8, 1),
        (4, 256): Tile(16, 16, 8, 1, 64),
    },
}
_TILES[90] = _TILES[80] | {(2, 128): Tile(128, 64, 8, 2)}
_TILES[100] = _TILES[80]


@triton.jit
def offsets_of(indices, stride):
    """`indices * stride`, which may pass 2^31."""
    return indices.to(tl.int64) * stride


@triton.jit
def tile_of(pointer, offsets, inside, part, WIDTH: tl.constexpr, INNER: tl.constexpr):
    """Columns `part .. part + INNER - 1` of the rows at `offsets [R]`.

    Zero where a row is not `inside`, and from column `WIDTH` on.
    """
    inner = part + tl.arange(0, INNER)
    return tl.load(
        pointer + offsets[:, None] + inner[None, :],
        mask=inside[:, None] & (inner < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _scores(
    q,
    query,
    query_rows,
    inside,
    key,
    key_rows,
    some,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`q k'`, from `q` where it holds whole rows, else from the queries at `query_rows`."""
    if INNER == PADDED:
        k = tile_of(key, key_rows, some, 0, WIDTH, PADDED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        scores = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        # As many steps as are known at run time alone are not unrolled: that would spill.
        for part in range(0, width, INNER):
            x = tile_of(query, query_rows, inside, part, WIDTH, INNER)
            y = tile_of(key, key_rows, some, part, WIDTH, INNER)
            scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _attend(
    scores,
    v,
    seen,
    peak,
    total,
    result,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax in base 2: peak, sum of weights, weighted values."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if CAPPED:
        scores = soft_cap(scores * scale, softcap) * LOG2_E
    else:
        scores = scores * (scale * LOG2_E)
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen no key yet has no peak to subtract.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - shift[:, None])
    faded = tl.exp2(peak - shift)
    total = total * faded + tl.sum(weights, 1)
    result = tl.dot(weights.to(v.dtype), v, result * faded[:, None], input_precision=PRECISION)
    return higher, total, result


@triton.jit
def branch_attention_kernel(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    output,
    normaliser,
    query_head,
    query_branch,
    query_member,
    query_row,
    key_head,
    key_branch,
    key_row,
    value_head,
    value_branch,
    value_row,
    prefix_key_head,
    prefix_key_row,
    prefix_value_head,
    prefix_value_row,
    output_head,
    output_branch,
    output_member,
    output_row,
    heads,
    batch,
    group,
    queries,
    start,
    own,
    window,
    width,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of a tile of rows `(branch, query, member of the group)`."""
    LN_2: tl.constexpr = 0.6931471805599453
    # Late queries see the most keys: their programs come first, for every head.
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads
    branch_rows = queries * group
    first_row = tile * ROWS
    last_row = tl.minimum(first_row + ROWS, branch_rows * batch) - 1
    rows = first_row + tl.arange(0, ROWS)
    inside = rows <= last_row
    branch = rows // branch_rows
    place = (rows // group) % queries
    member = rows % group
    position = start + own - queries + place
    columns = tl.arange(0, COLUMNS)
    first_branch = first_row // branch_rows
    last_branch = last_row // branch_rows

    query += head * query_head
    query_rows = (
        offsets_of(branch, query_branch)
        + offsets_of(member, query_member)
        + offsets_of(place, query_row)
    )
    q = 0
    if INNER == PADDED:
        q = tile_of(query, query_rows, inside, 0, WIDTH, PADDED)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    result = tl.zeros([ROWS, PADDED], dtype=tl.float32)

    low = 0
    if WINDOWED:
        earliest = tl.min(tl.where(inside, position, start + own))
        low = tl.maximum(0, earliest - window + 1)
    prefix_key += head * prefix_key_head
    prefix_value += head * prefix_value_head
    for at in range(low, start, COLUMNS):
        keys = at + columns
        some = keys < start
        seen = inside[:, None] & some[None, :]
        if WINDOWED:
            seen = seen & (keys[None, :] > position[:, None] - window)
        scores = _scores(
            q,
            query,
            query_rows,
            inside,
            prefix_key,
            offsets_of(keys, prefix_key_row),
            some,
            width,
            ROWS,
            COLUMNS,
            WIDTH,
            PADDED,
            INNER,
            PRECISION,
        )
        v = tile_of(prefix_value, offsets_of(keys, prefix_value_row), some, 0, WIDTH, PADDED)
        peak, total, result = _attend(
            scores, v, seen, peak, total, result, scale, softcap, CAPPED, PRECISION
        )

    key += head * key_head
    value += head * value_head
    for each in range(first_branch, last_branch + 1):
        base = each * branch_rows
        # The branch's first and last query in this tile, as places among its own rows.
        early = (tl.maximum(first_row, base) - base) // group + own - queries
        late = (tl.minimum(last_row, base + branch_rows - 1) - base) // group + own - queries
        low = 0
        if WINDOWED:
            low = tl.maximum(0, early - window + 1)
        mine = inside & (branch == each)
        own_key = key + tl.cast(each, tl.int64) * key_branch
        own_value = value + tl.cast(each, tl.int64) * value_branch
        for at in range(low, late + 1, COLUMNS):
            keys = at + columns
            some = keys <= late
            seen = mine[:, None] & (start + keys[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (start + keys[None, :] > position[:, None] - window)
            scores = _scores(
                q,
                query,
                query_rows,
                inside,
                own_key,
                offsets_of(keys, key_row),
                some,
                width,
                ROWS,
                COLUMNS,
                WIDTH,
                PADDED,
                INNER,
                PRECISION,
            )
            v = tile_of(own_value, offsets_of(keys, value_row), some, 0, WIDTH, PADDED)
            peak, total, result = _attend(
                scores, v, seen, peak, total, result, scale, softcap, CAPPED, PRECISION
            )

    inner = tl.arange(0, PADDED)
    offsets = (
        offsets_of(branch, output_branch)
        + offsets_of(member, output_member)
        + offsets_of(place, output_row)
    )
    tl.store(
        output + head * output_head + offsets[:, None] + inner[None, :],
        (result / total[:, None]).to(output.dtype.element_ty),
        mask=inside[:, None] & (inner < WIDTH)[None, :],
    )
    offsets = ((head * batch + branch) * group + member) * queries + place
    tl.store(normaliser + offsets, peak * LN_2 + tl.log(total), mask=inside)


def padded(width: int) -> int:
    """The head widths of the tables' tiles: masked above the head's own."""
    return max(64, int(triton.next_power_of_2(width)))


def rowwise(x: Tensor) -> Tensor:
    """`x` with the numbers of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(tile: Tile, branch_rows: int) -> int:
    return FEW_ROWS if branch_rows <= FEW_ROWS else tile.rows


def branch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    masking: Masking,
) -> tuple[Tensor, Tensor]:
    """As the reference; summed in float32."""
    heads, batch, group, queries, width = query.shape
    start, own = prefix_key.shape[1], key.shape[2]
    tensors = [rowwise(x) for x in (query, key, value, prefix_key, prefix_value)]
    output = heads_like(query, width)
    normaliser = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    tile = gpu.for_architecture(_TILES, query.device)[query.element_size(), padded(width)]
    rows = _rows(tile, group * queries)
    with gpu.on(query):
        branch_attention_kernel[(heads * triton.cdiv(batch * group * queries, rows),)](
            *tensors,
            output,
            normaliser,
            *(stride for x in (*tensors, output) for stride in x.stride()[:-1]),
            heads,
            batch,
            group,
            queries,
            start,
            own,
            masking.window or 0,
            width,
            masking.scale,
            masking.softcap or 0.0,
            WIDTH=width,
            PADDED=padded(width),
            INNER=min(tile.inner, padded(width)),
            ROWS=rows,
            COLUMNS=tile.columns,
            WINDOWED=masking.window is not None,
            CAPPED=masking.softcap is not None,
            PRECISION=PRECISION,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=REGISTERS,
        )
    return output, normaliser


_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def compiled_options() -> Iterator[tuple[str, int, bool]]:
    """The dtypes, head widths and masks (window and soft-cap, or neither) that `variants` has.

    Every tile in every dtype with all masks, whose code contains that without. Both are compiled in
    bfloat16; float16's code is the same but for the type. Widths of 80 and 96 run in the tiles of
    128 with more of a row masked: one of them in bfloat16.
    """
    for dtype in _BYTES:
        yield from ((dtype, width, True) for width in (64, 128, 256))
    yield from (("bf16", width, False) for width in (64, 128, 256))
    yield from (("bf16", width, True) for width in (80, 96))


def variants(capability: int) -> Iterator[Variant]:
    """Every kernel as it is launched on an architecture."""
    table = gpu.for_architecture(_TILES, capability)
    names = branch_attention_kernel.arg_names
    integers = names[names.index("heads") : names.index("scale")]
    for dtype, width, masked in compiled_options():
        tile = table[_BYTES[dtype], padded(width)]
        for rows in sorted({FEW_ROWS, tile.rows}):
            yield Variant(
                branch_attention_kernel,
                f"{dtype} D {width}, {rows} rows{', masked' if masked else ''}",
                {
                    **dict.fromkeys(names[:6], f"*{dtype}"),
                    "normaliser": "*fp32",
                    **dict.fromkeys(names[7 : names.index("heads")], "i32:16"),
                    **dict.fromkeys(integers, "i32"),
                    "scale": "fp32",
                    "softcap": "fp32",
                },
                {
                    "WIDTH": width,
                    "PADDED": padded(width),
                    "INNER": min(tile.inner, padded(width)),
                    "ROWS": rows,
                    "COLUMNS": tile.columns,
                    "WINDOWED": masked,
                    "CAPPED": masked,
                    "PRECISION": PRECISION,
                },
                tile.warps,
                tile.stages,
                {"maxnreg": REGISTERS},
            )

"""The two halves of the attention-value gate on a GPU; `reference.py` has the mathematics.

Value-output norms: a program owns a block of tokens of one query head and walks over output
features; a tile of the product lives in registers until its absolute values are summed.

Column sweep: a program owns a block of key positions of one query head, with its keys, and walks
over the query rows at or after them. It alone writes its part of the flow: no atomics, and the same
result in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.branch_attention.reference import Masking
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.device import soft_cap

#: Products of float32: three passes of the tensor cores, near full precision. See the README.
PRECISION = "tf32x3"
#: Targets that a program serves at once where there are several: the columns of a matrix product.
MANY_TARGETS = 16
#: Where an operation makes fewer programs, its sum is shared out: four for each of the H200's 132
#: multiprocessors.
PROGRAMS = 528


@dataclass(frozen=True)
class Tile:
    """`rows`: what a program owns (tokens or keys); `columns`: what it takes at a time.

    `inner`: the part of a head's width that is multiplied at once. If that is all of it, a
    program's own rows are read once and kept.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By architecture, then by (bytes of an input number, padded head width).
_NORMS = {
    80: {
        (2, 64): Tile(128, 128, 64, 8, 3),
        (2, 128): Tile(128, 64, 128, 8, 3),
        (2, 256): Tile(128, 64, 256, 8, 2),
        (4, 64): Tile(64, 32, 32, 4, 2),
        (4, 128): Tile(64, 32, 32, 4, 2),
        (4, 256): Tile(64, 32, 32, 4, 2),
    },
    90: {
        (2, 64): Tile(128, 128, 64, 8, 3),
        (2, 128): Tile(128, 128, 128, 8, 2),
        (2, 256): Tile(128, 128, 256, 8, 2),
        (4, 64): Tile(64, 32, 64, 4, 2),
        (4, 128): Tile(64, 32, 64, 4, 2),
        (4, 256): Tile(64, 32, 64, 4, 2),
    },
}
# One target: a tile of scores is queries by keys, and a matrix unit takes 64 queries at a time.
_FLOW = {
    80: {
        (2, 64): Tile(128, 64, 64, 8, 3),
        (2, 128): Tile(128, 64, 128, 8, 2),
        (2, 256): Tile(64, 64, 256, 8, 2),
        (4, 64): Tile(64, 32, 32, 4, 2),
        (4, 128): Tile(64, 32, 32, 4, 2),
        (4, 256): Tile(64, 32, 32, 4, 2),
    },
    90: {
        (2, 64): Tile(128, 64, 64, 8, 3),
        (2, 128): Tile(128, 64, 128, 8, 3),
        (2, 256): Tile(64, 64, 256, 4, 2),
        (4, 64): Tile(64, 64, 32, 4, 2),
        (4, 128): Tile(64, 64, 32, 4, 2),
        (4, 256): Tile(64, 64, 32, 4, 2),
    },
}
# Many targets: a tile of scores is keys by queries, the left factor of the product with `rho`.
_FLOW_OF_MANY = {
    80: {
        (2, 64): Tile(128, 64, 64, 8, 3),
        (2, 128): Tile(128, 64, 128, 8, 2),
        (2, 256): Tile(128, 32, 256, 8, 2),
        (4, 64): Tile(64, 32, 32, 4, 2),
        (4, 128): Tile(64, 32, 32, 8, 2),
        (4, 256): Tile(64, 32, 32, 8, 2),
    },
    90: {
        (2, 64): Tile(128, 64, 64, 8, 3),
        (2, 128): Tile(128, 64, 128, 8, 3),
        (2, 256): Tile(128, 32, 256, 8, 2),
        (4, 64): Tile(64, 32, 32, 4, 2),
        (4, 128): Tile(64, 32, 32, 4, 2),
        (4, 256): Tile(64, 32, 32, 4, 2),
    },
}


def _sizes(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner}


def _padded(width: int) -> int:
    """The widths of the tables' tiles: masked above the head's own."""
    return max(64, int(triton.next_power_of_2(width)))


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
    v_tile = value + tokens[:, None] * value_row + inner[None, :]
    own = (tokens < length)[:, None]
    if INNER == PADDED:
        v = tl.load(v_tile, mask=own & (inner < WIDTH)[None, :], other=0.0)
    columns = tl.arange(0, COLUMNS)
    weight += start.to(tl.int64) * weight_row + head.to(tl.int64) * WIDTH * weight_column
    tile = weight + columns[:, None] * weight_row + inner[None, :] * weight_column
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
                w = tl.load(tile + part * weight_column, mask=some & inside, other=0.0)
                moved = tl.dot(v, tl.trans(w), moved, input_precision=PRECISION)
        total += tl.sum(tl.abs(moved), 1)
        tile += COLUMNS * tl.cast(weight_row, tl.int64)
    norms += split.to(tl.int64) * norms_split + head.to(tl.int64) * length
    tl.store(norms + tokens, total, mask=tokens < length)


@triton.jit
def flow_of_tile(
    total,
    q_tile,
    k_tile,
    k,
    normaliser,
    rho,
    rows,
    keys,
    inner,
    several,
    rho_target,
    length,
    queries,
    targets,
    window,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    EDGE: tl.constexpr,
    TARGETS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total` and what a tile of query rows adds to it.

    Of a tile that is not an `EDGE` every row is a query that sees every key: nothing is compared.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    present = rows < queries
    if EDGE:
        lse = tl.load(normaliser + rows, mask=present, other=float("inf"))
    else:
        lse = tl.load(normaliser + rows)
    if TARGETS == 1:
        if EDGE:
            shares = tl.load(rho + rows, mask=present, other=0.0)
        else:
            shares = tl.load(rho + rows)
    else:
        served = (several < targets)[None, :]
        if EDGE:
            served = served & present[:, None]
        places = rho + several[None, :] * rho_target + rows[:, None]
        shares = tl.load(places, mask=served, other=0.0)
    if INNER == PADDED:
        inside = (inner < WIDTH)[None, :]
        if EDGE:
            q = tl.load(q_tile, mask=present[:, None] & inside, other=0.0)
        elif WIDTH == PADDED:
            q = tl.load(q_tile)
        else:
            q = tl.load(q_tile, mask=inside, other=0.0)
        if TARGETS == 1:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    else:
        if TARGETS == 1:
            scores = tl.zeros([rows.shape[0], keys.shape[0]], dtype=tl.float32)
        else:
            scores = tl.zeros([keys.shape[0], rows.shape[0]], dtype=tl.float32)
        for part in range(0, PADDED, INNER):
            inside = (part + inner < WIDTH)[None, :]
            k = tl.load(k_tile + part, mask=(keys < length)[:, None] & inside, other=0.0)
            q = tl.load(q_tile + part, mask=present[:, None] & inside, other=0.0)
            if TARGETS == 1:
                scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            else:
                scores = tl.dot(k, tl.trans(q), scores, input_precision=PRECISION)
    if CAPPED:
        scores = soft_cap(scores * scale, softcap) * LOG2_E
    else:
        scores = scores * (scale * LOG2_E)
    along: tl.constexpr = 1 if TARGETS == 1 else 0
    weights = tl.exp2(scores - tl.expand_dims(lse * LOG2_E, along))
    if EDGE:
        positions = tl.expand_dims(rows + length - queries, along)
        places = tl.expand_dims(keys, 1 - along)
        seen = tl.expand_dims(present, along) & (positions >= places)
        if WINDOWED:
            seen = seen & (places > positions - window)
        weights = tl.where(seen, weights, 0.0)
    if TARGETS == 1:
        total += weights * shares[:, None]
    else:
        total += tl.dot(weights, shares, input_precision=PRECISION)
    return total


@triton.jit
def attention_flow_kernel(
    query,
    key,
    normaliser,
    rho,
    flow,
    query_head,
    query_member,
    query_row,
    key_head,
    key_row,
    normaliser_head,
    normaliser_member,
    rho_head,
    rho_member,
    rho_target,
    flow_split,
    length,
    queries,
    queries_each,
    targets,
    group,
    window,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TARGETS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`flow[split, head, r, i] = sum over a split's j of rho[r, j] A[head, j, i]`.

    For a block of keys i and of targets r. A split is `queries_each` rows, a multiple of `COLUMNS`.
    """
    # Early keys are seen by the most queries: their programs come first, for every head.
    head = tl.program_id(0).to(tl.int64)
    low_key = tl.program_id(1) * ROWS
    blocks = tl.cdiv(targets, TARGETS)
    first_target = tl.program_id(2) % blocks * TARGETS
    split = tl.program_id(2) // blocks
    keys = low_key + tl.arange(0, ROWS)
    inner = tl.arange(0, INNER)
    columns = tl.arange(0, COLUMNS)
    several = first_target + tl.arange(0, TARGETS)
    offset = length - queries

    query += head // group * query_head + head % group * query_member
    key += head // group * key_head
    normaliser += head // group * normaliser_head + head % group * normaliser_member
    rho += head // group * rho_head + head % group * rho_member
    flow += split.to(tl.int64) * flow_split + head * targets * length
    if TARGETS == 1:
        rho += first_target * rho_target
        total = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    else:
        total = tl.zeros([ROWS, TARGETS], dtype=tl.float32)

    k_tile = key + keys[:, None] * key_row + inner[None, :]
    k = tl.zeros([ROWS, INNER], dtype=key.dtype.element_ty)
    if INNER == PADDED:
        k = tl.load(k_tile, mask=(keys < length)[:, None] & (inner < WIDTH)[None, :], other=0.0)

    # Rows `first .. stop` see some key of the block, rows `whole .. end` of them all of it.
    begin = split * queries_each
    stop = tl.minimum(queries, begin + queries_each)
    end = stop
    if WINDOWED:
        stop = tl.minimum(stop, low_key + ROWS - 1 + window - offset)
        end = tl.minimum(end, low_key + window - offset)
    first = tl.maximum(begin, tl.maximum(low_key - offset, 0) // COLUMNS * COLUMNS)
    above = tl.maximum(low_key + ROWS - 1 - offset, 0)
    whole = tl.minimum(tl.maximum(first, tl.cdiv(above, COLUMNS) * COLUMNS), stop)
    end = whole + tl.maximum(end - whole, 0) // COLUMNS * COLUMNS

    q_tile = query + (whole + columns)[:, None].to(tl.int64) * query_row + inner[None, :]
    for low in range(whole, end, COLUMNS):
        total = flow_of_tile(
            total,
            q_tile,
            k_tile,
            k,
            normaliser,
            rho,
            low + columns,
            keys,
            inner,
            several,
            rho_target,
            length,
            queries,
            targets,
            window,
            scale,
            softcap,
            WIDTH,
            PADDED,
            INNER,
            False,
            TARGETS,
            WINDOWED,
            CAPPED,
            PRECISION,
        )
        q_tile += COLUMNS * tl.cast(query_row, tl.int64)
    before = tl.cdiv(tl.maximum(whole - first, 0), COLUMNS)
    after = tl.cdiv(tl.maximum(stop - end, 0), COLUMNS)
    for edge in range(0, before + after):
        low = tl.where(edge < before, first, end - before * COLUMNS) + edge * COLUMNS
        rows = low + columns
        total = flow_of_tile(
            total,
            query + rows[:, None].to(tl.int64) * query_row + inner[None, :],
            k_tile,
            k,
            normaliser,
            rho,
            rows,
            keys,
            inner,
            several,
            rho_target,
            length,
            queries,
            targets,
            window,
            scale,
            softcap,
            WIDTH,
            PADDED,
            INNER,
            True,
            TARGETS,
            WINDOWED,
            CAPPED,
            PRECISION,
        )
    if TARGETS == 1:
        tl.store(flow + first_target * length + keys, tl.sum(total, 0), mask=keys < length)
    else:
        tl.store(
            flow + several[None, :] * length + keys[:, None],
            total,
            mask=(several < targets)[None, :] & (keys < length)[:, None],
        )


def value_output_norms(value: Tensor, output_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.value_output_norms`; summed in float32."""
    heads, length, width = value.shape
    outputs = output_weight.shape[0]
    count = output_weight.shape[1] // width
    if value.stride(-1) != 1:
        value = value.contiguous()
    tile = gpu.for_architecture(_NORMS, value.device)[value.element_size(), _padded(width)]
    blocks = triton.cdiv(length, tile.rows)
    # Few tokens make few programs: then the output features are shared out.
    splits = max(1, min(256 // (blocks * count), triton.cdiv(outputs, 8 * tile.columns)))
    each = triton.cdiv(triton.cdiv(outputs, splits), tile.columns) * tile.columns
    splits = triton.cdiv(outputs, each)
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
            WIDTH=width,
            PADDED=_padded(width),
            **_sizes(tile),
            PRECISION=PRECISION,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    total = norms[0] if splits == 1 else norms.sum(0)
    return total.view(heads, count // heads, length).to(dtype)


def attention_flow(
    query: Tensor, key: Tensor, normaliser: Tensor, rho: Tensor, masking: Masking
) -> Tensor:
    """See `reference.attention_flow`; `rho` and the flow are float32."""
    heads, group, queries, width = query.shape
    length = key.shape[1]
    rho = rho.expand(heads, group, *rho.shape[-2:])
    query, key, normaliser, rho = (
        part if part.stride(-1) == 1 else part.contiguous()
        for part in (query, key, normaliser, rho)
    )
    targets = rho.shape[2]
    block, table = (1, _FLOW) if targets == 1 else (MANY_TARGETS, _FLOW_OF_MANY)
    tile = gpu.for_architecture(table, query.device)[query.element_size(), _padded(width)]
    blocks, target_blocks = triton.cdiv(length, tile.rows), triton.cdiv(targets, block)
    # Few heads make few programs, of unequal length: then the queries are shared out.
    programs = heads * group * blocks * target_blocks
    splits = max(1, min(PROGRAMS // programs, triton.cdiv(queries, 4 * tile.columns)))
    each = triton.cdiv(triton.cdiv(queries, splits), tile.columns) * tile.columns
    splits = triton.cdiv(queries, each)
    shape = splits, heads, group, targets, length
    flow = torch.empty(shape, dtype=torch.float32, device=query.device)
    with gpu.on(query):
        attention_flow_kernel[heads * group, blocks, target_blocks * splits](
            query,
            key,
            normaliser,
            rho,
            flow,
            *query.stride()[:3],
            *key.stride()[:2],
            *normaliser.stride()[:2],
            *rho.stride()[:3],
            flow.stride(0),
            length,
            queries,
            each,
            targets,
            group,
            masking.window or 0,
            masking.scale,
            masking.softcap or 0.0,
            WIDTH=width,
            PADDED=_padded(width),
            **_sizes(tile),
            TARGETS=block,
            WINDOWED=masking.window is not None,
            CAPPED=masking.softcap is not None,
            PRECISION=PRECISION,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return flow[0] if splits == 1 else flow.sum(0)


_TYPES = {"fp16": 2, "bf16": 2, "fp32": 4}


def variants(capability: int) -> Iterator[Variant]:
    """Every configuration that is shipped for an architecture."""
    for kind, size in _TYPES.items():
        for padded in (64, 128, 256):
            tile = gpu.for_architecture(_NORMS, capability)[size, padded]
            common = {"WIDTH": padded, "PADDED": padded, "PRECISION": PRECISION}
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
                {**common, "weight_column": 1, **_sizes(tile)},
                tile.warps,
                tile.stages,
            )
            for targets, masked, table in (
                (1, False, _FLOW),
                (1, True, _FLOW),
                (MANY_TARGETS, False, _FLOW_OF_MANY),
                (MANY_TARGETS, True, _FLOW_OF_MANY),
            ):
                tile = gpu.for_architecture(table, capability)[size, padded]
                strides = "query_head query_member query_row key_head key_row".split()
                numbers = (
                    "normaliser_head normaliser_member rho_head rho_member rho_target flow_split "
                    "length queries queries_each targets group window"
                ).split()
                yield Variant(
                    attention_flow_kernel,
                    f"{kind} width {padded} targets {targets}" + " window softcap" * masked,
                    {
                        "query": f"*{kind}",
                        "key": f"*{kind}",
                        "normaliser": "*fp32",
                        "rho": "*fp32",
                        "flow": "*fp32",
                        **dict.fromkeys(strides, "i32:16"),
                        **dict.fromkeys(numbers, "i32"),
                        "scale": "fp32",
                        "softcap": "fp32",
                    },
                    {
                        **common,
                        **_sizes(tile),
                        "TARGETS": targets,
                        "WINDOWED": masked,
                        "CAPPED": masked,
                    },
                    tile.warps,
                    tile.stages,
                )

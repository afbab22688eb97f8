"""Attention's flow on a GPU: a program owns a block of keys and walks over the queries after them.

It alone writes its part of the flow: no atomics, and the same result in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.branch_attention.reference import Masking
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.device import soft_cap
from heat_fast.kernels.value_norm_rollout import tiles

#: Targets that a program serves at once where there are several: the columns of a matrix product.
MANY_TARGETS = 16
#: Where there are fewer programs, queries are shared out: four for each of the H200's 132
#: multiprocessors.
PROGRAMS = 528


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
        places = rho + several[None, :].to(tl.int64) * rho_target + rows[:, None]
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
        rho += first_target.to(tl.int64) * rho_target
        total = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    else:
        total = tl.zeros([ROWS, TARGETS], dtype=tl.float32)

    k_tile = key + keys[:, None].to(tl.int64) * key_row + inner[None, :]
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
        tl.store(
            flow + first_target.to(tl.int64) * length + keys, tl.sum(total, 0), mask=keys < length
        )
    else:
        tl.store(
            flow + several[None, :].to(tl.int64) * length + keys[:, None],
            total,
            mask=(several < targets)[None, :] & (keys < length)[:, None],
        )


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
    block, table = (1, tiles.FLOW) if targets == 1 else (MANY_TARGETS, tiles.FLOW_OF_MANY)
    tile = tiles.of(table, query)
    blocks, target_blocks = triton.cdiv(length, tile.rows), triton.cdiv(targets, block)
    # Few heads make few programs, of unequal length: then the queries are shared out.
    wanted = PROGRAMS // (heads * group * blocks * target_blocks)
    splits, each = tiles.shared_out(queries, wanted, tile, least=4)
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
            **tiles.constants(tile, width),
            TARGETS=block,
            WINDOWED=masking.window is not None,
            CAPPED=masking.softcap is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return flow[0] if splits == 1 else flow.sum(0)


def variants(capability: int) -> Iterator[Variant]:
    """Every configuration that is shipped for an architecture."""
    for kind, size in tiles.TYPES.items():
        for padded in (64, 128, 256):
            for targets, masked, table in (
                (1, False, tiles.FLOW),
                (1, True, tiles.FLOW),
                (MANY_TARGETS, False, tiles.FLOW_OF_MANY),
                (MANY_TARGETS, True, tiles.FLOW_OF_MANY),
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
                        **tiles.constants(tile, padded),
                        "TARGETS": targets,
                        "WINDOWED": masked,
                        "CAPPED": masked,
                    },
                    tile.warps,
                    tile.stages,
                )

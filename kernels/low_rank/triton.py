"""Block norms of a low-rank operator on a GPU; see `reference.block_norms`.

A program owns a token and up to 16 probes. It walks over the token's rows of U twice: once for
`diag(w) U' r`, whose signs are made on the way, once for the norms of `U` times that. The second
walk finds the rows in the second-level cache. Products are full float32 (`ieee`): curvature is a
difference of large terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.rademacher.triton import key_of, signs_of

#: Products of float32 keep all their digits.
PRECISION = "ieee"
#: Probes of a program: the fewest rows that a matrix product takes.
PROBES = 16


@dataclass(frozen=True)
class Tile:
    """Rows of U that a program takes at a time."""

    rows: int
    warps: int


# By architecture.
_TILES = {80: Tile(64, 4), 100: Tile(32, 4)}


@triton.jit(do_not_specialize=["key"])
def block_norms_kernel(
    vectors,
    values,
    samples,
    norms,
    values_batch,
    values_token,
    key,
    tokens,
    width,
    count,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PROBES: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`norms[batch, i, m] = |U_i diag(w) U_i' r_m|_1`."""
    token = tl.program_id(0) % tokens
    batch = tl.program_id(0) // tokens
    probes = tl.program_id(1) * PROBES + tl.arange(0, PROBES)
    rank = tl.arange(0, PADDED)
    rows = tl.arange(0, ROWS)
    vectors += tl.program_id(0).to(tl.int64) * width * RANK
    sample = tl.load(samples + probes, mask=probes < count, other=0).to(tl.int32)
    inner = tl.zeros([PROBES, PADDED], dtype=tl.float32)
    for low in range(0, width, ROWS):
        own = low + rows
        inside = (own < width)[:, None] & (rank < RANK)[None, :]
        u = tl.load(vectors + own[:, None] * RANK + rank[None, :], mask=inside, other=0.0)
        signs = signs_of(key, sample[:, None], token, own[None, :])
        inner = tl.dot(signs, u, inner, input_precision=PRECISION)
    place = values + batch.to(tl.int64) * values_batch + token.to(tl.int64) * values_token + rank
    inner *= tl.load(place, mask=rank < RANK, other=0.0)[None, :]
    total = tl.zeros([PROBES], dtype=tl.float32)
    for low in range(0, width, ROWS):
        own = low + rows
        inside = (own < width)[:, None] & (rank < RANK)[None, :]
        u = tl.load(vectors + own[:, None] * RANK + rank[None, :], mask=inside, other=0.0)
        image = tl.dot(inner, tl.trans(u), input_precision=PRECISION)
        total += tl.sum(tl.abs(image), 1)
    norms += tl.program_id(0).to(tl.int64) * count
    tl.store(norms + probes, total, mask=probes < count)


def block_norms(vectors: Tensor, values: Tensor, seed: int, samples: Tensor) -> Tensor:
    """See `reference.block_norms`."""
    *lead, tokens, width, rank = vectors.shape
    vectors = vectors.contiguous()
    values = values.to(vectors.dtype).expand(*lead, tokens, rank).reshape(-1, tokens, rank)
    samples = samples.to(vectors.device)
    count = len(samples)
    norms = torch.empty(*lead, tokens, count, dtype=vectors.dtype, device=vectors.device)
    if norms.numel() == 0:
        return norms
    tile = gpu.for_architecture(_TILES, vectors.device)
    grid = norms.numel() // count, triton.cdiv(count, PROBES)
    with gpu.on(vectors):
        block_norms_kernel[grid](
            vectors,
            values,
            samples,
            norms,
            values.stride(0),
            values.stride(1),
            key_of(seed),
            tokens,
            width,
            count,
            RANK=rank,
            PADDED=max(16, int(triton.next_power_of_2(rank))),
            PROBES=PROBES,
            ROWS=tile.rows,
            PRECISION=PRECISION,
            num_warps=tile.warps,
        )
    return norms


def variants(capability: int) -> Iterator[Variant]:
    """Every configuration that is shipped for an architecture."""
    tile = gpu.for_architecture(_TILES, capability)
    for rank in (16, 64, 128):
        yield Variant(
            block_norms_kernel,
            f"fp32 rank {rank}",
            {
                **dict.fromkeys(("vectors", "values"), "*fp32"),
                "samples": "*i64",
                "norms": "*fp32",
                **dict.fromkeys(("values_batch", "values_token", "key", "tokens"), "i32"),
                "width": "i32:16",
                "count": "i32",
            },
            {
                "RANK": rank,
                "PADDED": rank,
                "PROBES": PROBES,
                "ROWS": tile.rows,
                "PRECISION": PRECISION,
            },
            tile.warps,
        )

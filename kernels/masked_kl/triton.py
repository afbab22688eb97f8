"""Divergences from chunks of raw logits on a GPU; `reference.py` has the mathematics.

The products with the vocabulary are cuBLAS's. Everything after them is one kernel that reads each
raw logit once, in the model's dtype: a program sums the terms of a few branches of one target over
a slice of the chunk. Its five partial sums are its own (no atomics) and are added up in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.device import soft_cap
from heat_fast.kernels.masked_kl.reference import of_sums


@dataclass(frozen=True)
class Tile:
    """Branches of a program, the vocabulary it takes at a time and in all."""

    rows: int
    columns: int
    slice: int
    warps: int


# By architecture. The trunk's probabilities are made once for a program's branches.
_TILES = {80: Tile(4, 256, 4096, 4)}


@triton.jit
def masked_kl_kernel(
    logits,
    log_probs,
    normaliser,
    target,
    sums,
    logits_branch,
    logits_target,
    log_probs_target,
    branches,
    first,
    width,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """`sums[slice, :, b, t]`: E, F, T, D and the target's logit, shifted, of a slice of a chunk."""
    number = tl.program_id(1)
    part = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    shift = tl.load(normaliser + number)
    chosen = tl.load(target + number) - first
    log_probs += number.to(tl.int64) * log_probs_target + first
    logits += rows[:, None].to(tl.int64) * logits_branch + number.to(tl.int64) * logits_target

    excess = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    divergence = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    distance = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    own = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for low in range(part * SLICE, tl.minimum((part + 1) * SLICE, width), COLUMNS):
        at = low + columns
        inside = (at < width)[None, :] & (rows < branches)[:, None]
        log_p = tl.load(log_probs + at, mask=at < width, other=0.0)[None, :]
        p = tl.exp(log_p)
        z = tl.load(logits + at[None, :], mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            z = soft_cap(z, softcap)
        shifted = z - shift
        t = log_p - shifted
        # t + expm1(-t) as a series where it would cancel; the next term is under 3e-9 of it.
        series = 1 / 720 + t * (-1 / 5040 + t * (1 / 40320 + t * (-1 / 362880)))
        series = 1 / 2 + t * (-1 / 6 + t * (1 / 24 + t * (-1 / 120 + t * series)))
        bend = t * t * series
        near = tl.abs(t) < 0.5
        mass = tl.exp(shifted)
        surplus = tl.where(near, p * (bend - t), mass - p)
        gap = tl.where(p > 0, p * t, 0.0)
        total += tl.where(inside, mass, 0.0)
        distance += tl.where(inside, gap, 0.0)
        excess += tl.where(inside, surplus, 0.0)
        divergence += tl.where(inside, tl.where(near, p * bend, gap + surplus), 0.0)
        own += tl.where(inside & (at[None, :] == chosen), shifted, 0.0)
    targets = tl.num_programs(1)
    each = tl.cast(branches, tl.int64) * targets
    sums += part * 5 * each + rows.to(tl.int64) * targets + number
    tl.store(sums, tl.sum(excess, 1), mask=rows < branches)
    tl.store(sums + each, tl.sum(divergence, 1), mask=rows < branches)
    tl.store(sums + 2 * each, tl.sum(total, 1), mask=rows < branches)
    tl.store(sums + 3 * each, tl.sum(distance, 1), mask=rows < branches)
    tl.store(sums + 4 * each, tl.sum(own, 1), mask=rows < branches)


def masked_kl_streamed(
    log_probs: Tensor,
    normaliser: Tensor,
    chunks: Iterable[tuple[slice, Tensor]],
    target: Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.masked_kl_streamed`."""
    if log_probs.stride(-1) != 1:
        log_probs = log_probs.contiguous()
    tile = gpu.for_architecture(_TILES, log_probs.device)
    partial = []
    for part, raw in chunks:
        raw = raw if raw.stride(-1) == 1 else raw.contiguous()
        branches, targets, width = raw.shape
        slices = triton.cdiv(width, tile.slice)
        sums = torch.empty(
            slices, 5, branches, targets, dtype=torch.float32, device=log_probs.device
        )
        with gpu.on(log_probs):
            masked_kl_kernel[triton.cdiv(branches, tile.rows), targets, slices](
                raw,
                log_probs,
                normaliser,
                target,
                sums,
                raw.stride(0),
                raw.stride(1),
                log_probs.stride(0),
                branches,
                part.start,
                width,
                softcap or 0.0,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                SLICE=tile.slice,
                CAPPED=softcap is not None,
                num_warps=tile.warps,
            )
        partial.append(sums)
    kl, drop = of_sums(torch.cat(partial).sum(0, dtype=torch.float64), log_probs, target)
    return kl.to(log_probs.dtype), drop.to(log_probs.dtype)


def variants(capability: int) -> Iterator[Variant]:
    """Every configuration that is shipped for an architecture."""
    tile = gpu.for_architecture(_TILES, capability)
    for kind in ("fp16", "bf16", "fp32"):
        for capped in (False, True):
            yield Variant(
                masked_kl_kernel,
                kind + " softcap" * capped,
                {
                    "logits": f"*{kind}",
                    "log_probs": "*fp32",
                    "normaliser": "*fp32",
                    "target": "*i64",
                    "sums": "*fp32",
                    **dict.fromkeys(("logits_branch", "logits_target"), "i32:16"),
                    "log_probs_target": "i32:16",
                    "branches": "i32",
                    **dict.fromkeys(("first", "width"), "i32:16"),
                    "softcap": "fp32",
                },
                {
                    "ROWS": tile.rows,
                    "COLUMNS": tile.columns,
                    "SLICE": tile.slice,
                    "CAPPED": capped,
                },
                tile.warps,
            )

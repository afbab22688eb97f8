"""Divergences from chunks of raw logits on a GPU; `reference.py` has the mathematics.

The products with the vocabulary are cuBLAS's. Everything after them is one kernel that reads each
raw logit once, in the model's dtype: a program sums the terms of a few branches of one target over
a slice of the chunk. Its four partial sums are its own (no atomics) and are added up in float64.
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
_TILES = {80: Tile(4, 512, 4096, 4)}


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
    """`sums[slice, :, b, t]`: F, D, T and the target's logit, shifted, of a slice of a chunk."""
    number = tl.program_id(1)
    part = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    shift = tl.load(normaliser + number)
    chosen = tl.load(target + number) - first
    log_probs += number.to(tl.int64) * log_probs_target + first
    logits += rows[:, None].to(tl.int64) * logits_branch + number.to(tl.int64) * logits_target

    divergence = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    distance = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    last = tl.minimum((part + 1) * SLICE, width)
    for low in range(part * SLICE, last, COLUMNS):
        at = low + columns
        inside = (at < width)[None, :]
        # A probability of 0 on both sides adds nothing.
        log_p = tl.load(log_probs + at, mask=at < width, other=float("-inf"))[None, :]
        here = inside & (rows < branches)[:, None]
        z = tl.load(logits + at[None, :], mask=here, other=float("-inf")).to(tl.float32)
        if CAPPED:
            z = tl.where(inside, soft_cap(z, softcap), float("-inf"))
        p = tl.exp(log_p)
        shifted = z - shift
        t = log_p - shifted
        # t + expm1(-t) as a series where it would cancel; the next term is under 3e-9 of it.
        series = 1 / 720 + t * (-1 / 5040 + t * (1 / 40320 + t * (-1 / 362880)))
        series = 1 / 2 + t * (-1 / 6 + t * (1 / 24 + t * (-1 / 120 + t * series)))
        mass = tl.exp(shifted)
        gap = tl.where(p > 0, p * t, 0.0)
        divergence += tl.where(tl.abs(t) < 0.5, p * (t * t * series), gap + (mass - p))
        distance += gap
        total += mass
    held = (chosen >= part * SLICE) & (chosen < last)
    own = tl.load(logits + chosen, mask=held & (rows < branches)[:, None], other=0.0).to(tl.float32)
    if CAPPED:
        own = soft_cap(own, softcap)
    own = tl.where(held, own - shift, 0.0)
    targets = tl.num_programs(1)
    each = tl.cast(branches, tl.int64) * targets
    sums += part * 4 * each + rows.to(tl.int64) * targets + number
    tl.store(sums, tl.sum(divergence, 1), mask=rows < branches)
    tl.store(sums + each, tl.sum(distance, 1), mask=rows < branches)
    tl.store(sums + 2 * each, tl.sum(total, 1), mask=rows < branches)
    tl.store(sums + 3 * each, tl.sum(own, 1), mask=rows < branches)


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
            slices, 4, branches, targets, dtype=torch.float32, device=log_probs.device
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

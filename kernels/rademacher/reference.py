"""Rademacher signs from a counter, in plain torch.

A sign is a pure function of (seed, sample, token, dimension), so the probes do not depend on tile
size, batch order, number of threads or device, and a GPU kernel can make the same ones. One 32-bit
word serves 32 neighbouring dimensions:

    word = mix(mix(mix(mix(seed) ^ sample) ^ token) ^ dimension // 32)
    sign = 1 - 2 * ((word >> dimension % 32) & 1)

`mix` adds the golden-ratio constant and applies the "lowbias32" integer finaliser (C. Wellons,
"Prospecting for hash functions", 2018): multiplications and shifts modulo 2^32. The arithmetic runs
in int64 with the low 32 bits kept; a wrapped product has the right low bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    x = (x + 0x9E3779B9) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def counter_words(seed: int, *counters: Tensor) -> Tensor:
    """Uniform 32-bit words (as int64) for integer counters that broadcast to one shape.

    `seed` is any Python integer; its low 64 bits count.
    """
    device = counters[0].device
    key = _mix(torch.tensor(seed & _LOW, dtype=torch.int64, device=device))
    key = _mix(key ^ ((seed >> 32) & _LOW))
    for counter in counters:
        key = _mix(key ^ counter.to(device, torch.int64))
    return key


def rademacher(
    seed: int,
    samples: Tensor,
    tokens: Tensor,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Signs `[*shape, width]`, each +1 or -1, for integer tensors that broadcast to `shape`.

    Example:
        >>> signs = rademacher(0, torch.tensor([[0]]), torch.arange(4), 8)
        >>> signs.shape, signs.abs().unique().tolist()
        (torch.Size([1, 4, 8]), [1.0])
    """
    blocks = torch.arange((width + 31) // 32, device=tokens.device)
    words = counter_words(seed, samples[..., None], tokens[..., None], blocks)
    bits = (words[..., None] >> torch.arange(32, device=tokens.device)) & 1
    return (1 - 2 * bits.flatten(-2)[..., :width]).to(dtype)


def walsh(rows: Tensor, columns: Tensor) -> Tensor:
    """Entries +1 or -1 of the Sylvester-Hadamard matrix, `(-1)^popcount(row & column)`, int64."""
    both = rows & columns
    for shift in (32, 16, 8, 4, 2, 1):
        both = both ^ (both >> shift)
    return 1 - 2 * (both & 1)

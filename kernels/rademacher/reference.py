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

from typing import TypeVar

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


Word = TypeVar("Word", int, Tensor)


def _mix(x: Word) -> Word:
    x = (x + 0x9E3779B9) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def seed_word(seed: int) -> int:
    """The 32-bit word that a seed's counters are mixed into."""
    return _mix(_mix(seed & _LOW) ^ ((seed >> 32) & _LOW))


def counter_words(seed: int, *counters: Tensor) -> Tensor:
    """Uniform 32-bit words (as int64) for integer counters that broadcast to one shape.

    `seed` is any Python integer; its low 64 bits count.
    """
    device = counters[0].device
    key = torch.tensor(seed_word(seed), dtype=torch.int64, device=device)
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


def block_probes(
    seed: int,
    samples: Tensor,
    tokens: Tensor,
    span: tuple[int, int],
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`[B, stop - start, width]`: in row `tokens[b]` the signs of (samples[b], tokens[b]), else 0.

    `span = (start, stop)`: the positions of the rows.
    """
    start, stop = span
    batch = torch.arange(len(tokens), device=tokens.device)
    result = torch.zeros(len(tokens), stop - start, width, dtype=dtype, device=tokens.device)
    result[batch, tokens - start] = rademacher(seed, samples, tokens, width, dtype)
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
    """`[B, length, width]`: the signs of (samples[b], i) in rows `i < tokens`, else 0.

    With `codes [B]`, a row's signs are multiplied by `walsh(codes[b], i)`; one sample `[1]` then
    serves all of them.
    """
    count = len(samples) if codes is None else len(codes)
    positions = torch.arange(tokens, device=samples.device)
    result = torch.zeros(count, length, width, dtype=dtype, device=samples.device)
    signs = rademacher(seed, samples[:, None], positions, width, dtype)
    if codes is not None:
        signs = signs * walsh(codes[:, None], positions)[..., None].to(dtype)
    result[:, :tokens] = signs
    return result


def row_norms(rows: Tensor) -> Tensor:
    """`|x|_1` of rows `[..., d]`, summed in at least float32."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.to(dtype).abs().sum(-1)


def coded_sums(rows: Tensor, codes: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """`sum_k z_k` and `sum_k z_k^2`, `[N, d]`, of un-signed rows `z_k = walsh(codes[k], i) x_k`.

    `rows [K, P, d]`, `P >= N = tokens`; summed in at least float32.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    positions = torch.arange(tokens, device=rows.device)
    signs = walsh(codes[:, None], positions)[..., None].to(dtype)
    decoded = rows[:, :tokens].to(dtype) * signs
    return decoded.sum(0), decoded.square().sum(0)


def coded_moments(
    total: Tensor, squares: Tensor, codes: int, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`|z-|_1`, the noise `sum v` and the energy `sum z-^2`, `[...]`, of rows `[..., d]`.

    `z- = total / K` is the mean over `K = codes` of `order` codes drawn without replacement,
    `v = (1 - K / order) / K * var_k z_k` its variance.
    """
    mean = total / codes
    spread = (squares - codes * mean.square()).clamp_min(0) / max(1, codes - 1)
    noise = spread.sum(-1) * ((1 - codes / order) / codes)
    return mean.abs().sum(-1), noise, mean.square().sum(-1)

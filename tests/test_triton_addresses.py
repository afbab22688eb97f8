"""Tensors so large that 32 bits cannot count their numbers.

Parts of an input are laid so far apart that the last begins 2^31 numbers after the first. A kernel
that counted in 32 bits would read elsewhere: outside, which is met here, or another number, and
then the result would not be the same, bit by bit, as that of the input laid close.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heat_fast.kernels.branch_attention import Masking, branch_attention
from heat_fast.kernels.low_rank import block_norms
from heat_fast.kernels.masked_kl import masked_kl_streamed
from heat_fast.kernels.rademacher import coded_sums, row_norms
from heat_fast.kernels.value_norm_rollout import attention_flow, value_output_norms

#: Linux's flag for memory that is only promised; Python 3.11 does not name it.
NORESERVE = 0x4000
MASKING = Masking(0.3, window=9)


def far_apart(close: Tensor, dim: int) -> Tensor:
    """The same numbers, of which those along `dim` span 2^31 places; pages unmet take no memory."""
    inner = torch.empty_like(close.select(dim, 0))
    stride = -(-(2**31) // (close.shape[dim] - 1) // 16) * 16
    count = stride * (close.shape[dim] - 1) + inner.numel()
    if close.is_cuda:
        memory = torch.empty(count, dtype=close.dtype, device=close.device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        pages = mmap.mmap(-1, count * close.element_size(), flags=flags)
        memory = torch.frombuffer(pages, dtype=close.dtype)
    strides = list(inner.stride())
    strides.insert(dim % close.dim(), stride)
    return memory.as_strided(close.shape, strides).copy_(close)


def flow(query: Tensor, key: Tensor, normaliser: Tensor, rho: Tensor) -> Tensor:
    return attention_flow(query, key, normaliser, rho, MASKING, impl="triton")


def norms(value: Tensor, weight: Tensor) -> Tensor:
    return value_output_norms(value, weight, torch.float32, impl="triton")


def branches(*tensors: Tensor) -> Tensor:
    return branch_attention(*tensors, MASKING, impl="triton")[0]


def divergence(log_probs: Tensor, raw: Tensor) -> Tensor:
    normaliser, target = log_probs.logsumexp(-1), torch.zeros(len(log_probs), dtype=torch.int64)
    chunks = [(slice(0, raw.shape[-1]), raw)]
    target = target.to(raw.device)
    return masked_kl_streamed(log_probs, normaliser, chunks, target, impl="triton")[0]


def absolute(rows: Tensor) -> Tensor:
    return row_norms(rows, impl="triton")


def decoded(rows: Tensor) -> Tensor:
    codes = torch.arange(len(rows), device=rows.device)
    return coded_sums(rows, codes, rows.shape[1], impl="triton")[0]


def low_rank(vectors: Tensor, values: Tensor) -> Tensor:
    return block_norms(vectors, values, 3, torch.arange(4), impl="triton")


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (flow, [(2, 2, 20, 16), (2, 20, 16), (2, 2, 20), (2, 2, 3, 20)]),
        (norms, [(2, 20, 16), (70, 64)]),
        (branches, [(2, 3, 2, 9, 16), (2, 3, 9, 16), (2, 3, 9, 16), (2, 5, 16), (2, 5, 16)]),
        (divergence, [(2, 70), (3, 2, 70)]),
        (absolute, [(2, 20, 70)]),
        (decoded, [(3, 20, 70)]),
        (low_rank, [(2, 5, 20, 8), (2, 5, 8)]),
    ],
)
def test_far_apart(
    op: Callable[..., Tensor], shapes: list[tuple[int, ...]], triton_device: torch.device
) -> None:
    # Half precision where the kernel takes it, as it halves the addresses' span.
    dtype = torch.float32 if op is low_rank else torch.float16
    inputs = [torch.randn(shape).to(triton_device, dtype) for shape in shapes]
    if op is flow:
        inputs[2:] = [part.float() for part in inputs[2:]]
    if op is divergence:
        inputs[0] = inputs[0].float().log_softmax(-1)
    wanted = op(*inputs)
    for number, close in enumerate(inputs):
        for dim in range(close.dim() - 1):  # numbers of a row lie side by side
            moved = [*inputs[:number], far_apart(close, dim), *inputs[number + 1 :]]
            assert torch.equal(op(*moved), wanted), f"input {number}, dimension {dim}"

"""Rademacher probes and the reductions of their products: one door to their implementations.

Signs are the same whichever implementation makes them. `impl`: see `heat_fast.kernels.dispatch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.rademacher import reference

_TRITON = ("triton",)


def _makes(operation: str, impl: str | None, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the GPU kernels make a result of that dtype on that device."""
    like = torch.empty(0, dtype=dtype, device=device)
    return implementation(operation, impl, like, offers=_TRITON) == "triton"


def rademacher(
    seed: int,
    samples: Tensor,
    tokens: Tensor,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str | None = None,
) -> Tensor:
    """Signs `[*shape, width]`, each +1 or -1, for integer tensors that broadcast to `shape`.

    A pure function of (seed, sample, token, dimension): the same on every device.

    Example:
        >>> signs = rademacher(0, torch.tensor([[0]]), torch.arange(4), 8)
        >>> signs.shape, signs.abs().unique().tolist()
        (torch.Size([1, 4, 8]), [1.0])
    """
    if _makes("rademacher", impl, dtype, tokens.device):
        from heat_fast.kernels.rademacher import triton

        return triton.rademacher(seed, samples, tokens, width, dtype)
    return reference.rademacher(seed, samples, tokens, width, dtype)


def block_probes(
    seed: int,
    samples: Tensor,
    tokens: Tensor,
    span: tuple[int, int],
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str | None = None,
) -> Tensor:
    """Probes of one token each, `[B, stop - start, width]`, at the positions of a span.

    Row `tokens[b]` holds the signs of (samples[b], tokens[b]), the others 0. `samples` and `tokens`
    are `[B]`, `span = (start, stop)`.

    Example:
        >>> probes = block_probes(0, torch.tensor([3]), torch.tensor([5]), (4, 7), 2)
        >>> probes.abs().sum(-1).tolist()
        [[0.0, 2.0, 0.0]]
    """
    if _makes("block_probes", impl, dtype, tokens.device):
        from heat_fast.kernels.rademacher import triton

        return triton.block_probes(seed, samples, tokens, span, width, dtype)
    return reference.block_probes(seed, samples, tokens, span, width, dtype)


def dense_probes(
    seed: int,
    samples: Tensor,
    tokens: int,
    length: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    codes: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Probes of the first `tokens` positions, `[B, length, width]`; 0 at the others.

    Row i holds the signs of (samples[b], i), times `walsh(codes[b], i)` where there are codes
    `[B]`; one sample `[1]` then serves all of them.

    Example:
        >>> dense_probes(0, torch.tensor([3]), 2, 3, 4).abs().sum(-1).tolist()
        [[4.0, 4.0, 0.0]]
    """
    if _makes("dense_probes", impl, dtype, samples.device):
        from heat_fast.kernels.rademacher import triton

        return triton.dense_probes(seed, samples, tokens, length, width, dtype, codes)
    return reference.dense_probes(seed, samples, tokens, length, width, dtype, codes)


def row_norms(rows: Tensor, *, impl: str | None = None) -> Tensor:
    """`|x|_1` of rows `[..., d]`, summed in at least float32.

    Example:
        >>> row_norms(torch.tensor([[1.0, -2.0]])).tolist()
        [3.0]
    """
    if implementation("row_norms", impl, rows, offers=_TRITON) == "triton":
        from heat_fast.kernels.rademacher import triton

        return triton.row_norms(rows)
    return reference.row_norms(rows)


def coded_sums(
    rows: Tensor, codes: Tensor, tokens: int, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """`sum_k z_k` and `sum_k z_k^2`, `[N, d]`, of un-signed rows `z_k = walsh(codes[k], i) x_k`.

    `rows [K, P, d]` with `P >= N = tokens`, read once; `codes [K]`; sums in at least float32.

    Example:
        >>> total, squares = coded_sums(torch.ones(2, 2, 1), torch.tensor([0, 1]), 2)
        >>> total.tolist(), squares.tolist()
        ([[2.0], [0.0]], [[2.0], [2.0]])
    """
    if implementation("coded_sums", impl, rows, offers=_TRITON) == "triton":
        from heat_fast.kernels.rademacher import triton

        return triton.coded_sums(rows, codes, tokens)
    return reference.coded_sums(rows, codes, tokens)


def coded_moments(
    total: Tensor, squares: Tensor, codes: int, order: int, *, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`|z-|_1`, the noise `sum v` and the energy `sum z-^2`, `[...]`, from sums `[..., d]`.

    `z- = total / K` is the mean over `K = codes` of `order` codes drawn without replacement,
    `v = (1 - K / order) / K * var_k z_k` its variance.

    Example:
        >>> total, squares = torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 2.0]])
        >>> [part.tolist() for part in coded_moments(total, squares, 2, 4)]
        [[1.0], [0.5], [1.0]]
    """
    offers = _TRITON if total.dtype == squares.dtype == torch.float32 else ()
    if implementation("coded_moments", impl, total, squares, offers=offers) == "triton":
        from heat_fast.kernels.rademacher import triton

        return triton.coded_moments(total, squares, codes, order)
    return reference.coded_moments(total, squares, codes, order)

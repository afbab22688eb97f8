"""Divergence of perturbed next-token distributions: one door to its implementations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.masked_kl import reference


def serves_streamed(log_probs: Tensor, normaliser: Tensor, impl: str | None = None) -> bool:
    """Whether `masked_kl_streamed` runs the GPU kernel for these, and chunks should be large."""
    offers = ("triton",) if log_probs.dtype == normaliser.dtype == torch.float32 else ()
    return implementation("masked_kl", impl, log_probs, normaliser, offers=offers) == "triton"


def masked_kl_streamed(
    log_probs: Tensor,
    normaliser: Tensor,
    chunks: Iterable[tuple[slice, Tensor]],
    target: Tensor,
    softcap: float | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`(KL(P || Q_b), log P(target) - log Q_b(target))` in nats, `[B, T]` each, and no `[B, V]`.

    `log_probs [T, V]` and `normaliser [T]` (log-sum-exp of the logits) are the trunk's, `target
    [T]` holds ids. `chunks` yields `(slice, raw [B, T, C])`, the branches' projections on a part of
    the vocabulary before the soft-cap, in any dtype; a chunk is not needed after the next one is
    asked for. A branch whose logits rise so far above the trunk's that `exp` overflows comes out
    infinite: `masked_kl` serves it. `impl`: see `heat_fast.kernels.dispatch`; the GPU kernel takes
    `log_probs` of float32.

    Example:
        >>> import torch
        >>> trunk, moved = torch.zeros(1, 4), torch.tensor([[[0.0, 0.0, 0.0, 1.0]]])
        >>> halves = [(slice(0, 2), moved[..., :2]), (slice(2, 4), moved[..., 2:])]
        >>> lse, ids = trunk.logsumexp(-1), torch.tensor([3])
        >>> kl, drop = masked_kl_streamed(trunk.log_softmax(-1), lse, halves, ids)
        >>> round(kl.item(), 4), round(drop.item(), 4)
        (0.1074, -0.6426)
    """
    if serves_streamed(log_probs, normaliser, impl):
        from heat_fast.kernels.masked_kl import triton

        return triton.masked_kl_streamed(log_probs, normaliser, chunks, target, softcap)
    return reference.masked_kl_streamed(log_probs, normaliser, chunks, target, softcap)

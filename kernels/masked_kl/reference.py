"""KL divergence of perturbed next-token distributions from the trunk's, in plain torch.

For the trunk's log-probabilities `a = log P` and a branch's logits `z`, with `b = z - lse(z)`:

    KL(P || Q) = sum_v P_v (a_v - b_v) = sum_v [ P_v (a_v - b_v) + Q_v - P_v ]

The second form adds `sum Q - sum P = 0` and makes every term non-negative, so that a divergence of
1e-7 nats keeps its leading digits in float32 where the first form would drown them in cancellation.
With `t = a - b` a term is `P (t + expm1(-t))`.

Over a large vocabulary the logits come in chunks and none is kept. The branch's normaliser is then
not known beforehand; the trunk's, `s`, stands in for it. With `t' = a - z + s`, sums over chunks

    F = sum_v [ P_v t'_v + exp(z_v - s) - P_v ],   D = sum_v P_v t'_v,   T = sum_v exp(z_v - s)

give `lse(z) = s + log T` and `KL = D + log T`. Near the trunk's normaliser log T would have the
rounding of a sum to 1; there it is `log1p(F - D)`, for `F - D = T - 1`, and the terms of F are
small and non-negative again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Numbers above the smallest by so much keep their digits.
_HEADROOM = 2.0**24


def masked_kl(log_probs: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`(KL, drop)` in nats, `[B, T]` each.

    `log_probs [T, V]` are the trunk's; `logits [B, T, V]` the branches'; `target [T]` holds ids.
    `drop = log P(target) - log Q(target)`: positive when the replacement hurts the target.
    Both inputs are in at least float32 (`logits` is overwritten).
    """
    branch = logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))
    difference = log_probs - branch
    index = target.expand(branch.shape[0], -1)[..., None]
    drop = difference.gather(-1, index)[..., 0]
    # A large negative difference means Q >> P: P expm1(-t) is then Q - P, without overflow. Written
    # over what is there already: with a large vocabulary every copy counts.
    moderate = difference > -1.0
    probabilities = log_probs.exp()
    terms = difference.clamp_min(-1.0).neg_().expm1_().add_(difference).mul_(probabilities)
    distant = difference.sub_(1).mul_(probabilities).add_(branch.exp_())
    return torch.where(moderate, terms, distant, out=terms).sum(-1), drop


def masked_kl_streamed(
    log_probs: Tensor,
    normaliser: Tensor,
    chunks: Iterable[tuple[slice, Tensor]],
    target: Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`(KL, drop)` as `masked_kl`, from chunks of the vocabulary: `(slice, raw [B, T, C])`.

    The logits are `cap tanh(raw / cap)` where there is a soft-cap, else the raw values; chunks may
    be of lower precision than `log_probs`. `normaliser [T]` is the trunk's log-sum-exp of logits. A
    branch whose logits lie so far from the trunk's that `exp` overflows, or underflows throughout,
    comes out infinite or as not a number; `masked_kl` serves it.
    """
    sums: Tensor | None = None
    for part, raw in chunks:
        logits = raw.to(log_probs.dtype)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        probabilities = log_probs[:, part].exp()
        shifted = logits - normaliser[:, None]
        gap = log_probs[:, part] - shifted
        mass, part_of_gap = shifted.exp(), probabilities * gap
        terms = torch.where(
            gap > -1.0,
            probabilities * (gap + torch.expm1(-gap.clamp_min(-1.0))),
            part_of_gap + (mass - probabilities),
        )
        inside = (target >= part.start) & (target < part.stop)
        index = (target - part.start).clamp(0, logits.shape[-1] - 1).expand(logits.shape[0], -1)
        picked = torch.where(inside, shifted.gather(-1, index[..., None])[..., 0], 0.0)
        found = torch.stack((*(each.sum(-1) for each in (terms, part_of_gap, mass)), picked))
        sums = found if sums is None else sums + found
    assert sums is not None
    return of_sums(sums, log_probs, target)


def of_sums(sums: Tensor, log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`(KL, drop)` from `F, D, T` and the target's shifted logit, `[4, B, n]`."""
    divergence, distance, mass, own = sums
    excess = divergence - distance
    # What is left of exponentials that underflow has few digits.
    mass = mass.where(mass > torch.finfo(log_probs.dtype).tiny * _HEADROOM, float("nan"))
    normal = torch.log1p(excess).where(excess.abs() < 0.5, mass.log())
    log_prob = log_probs.gather(-1, target[:, None])[:, 0]
    return distance + normal, log_prob - (own - normal)

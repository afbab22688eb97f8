"""KL divergence of perturbed next-token distributions from the trunk's, in plain torch.

For the trunk's log-probabilities `a = log P` and a branch's logits `z`, with `b = z - lse(z)`:

    KL(P || Q) = sum_v P_v (a_v - b_v) = sum_v [ P_v (a_v - b_v) + Q_v - P_v ]

The second form adds `sum Q - sum P = 0` and makes every term non-negative, so that a divergence of
1e-7 nats keeps its leading digits in float32 where the first form would drown them in cancellation.
With `t = a - b` a term is `P (t + expm1(-t))`.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    # A large negative difference means Q >> P: P expm1(-t) is then Q - P, without overflow.
    terms = torch.where(
        difference > -1.0,
        log_probs.exp() * (difference + torch.expm1(-difference.clamp_min(-1.0))),
        log_probs.exp() * (difference - 1) + branch.exp(),
    )
    return terms.sum(-1), drop

"""When more probes would no longer change the ranking (`probes="auto"`).

The norms of the probes taken so far are resampled with replacement (bootstrap, Efron 1979); each
resample gives scores and with them an order of the `top_k` tokens that lead at present. The ranking
is settled when that order agrees with the present one, Spearman's rank correlation at least
`AGREEMENT`, in a share of the resamples of at least `confidence`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from heat_fast.combine import Components, aggregate, combine
from heat_fast.config import HeatConfig

RESAMPLES = 200
AGREEMENT = 0.9


def agreement(parts: Components, samples: Tensor, config: HeatConfig) -> float:
    """Share of the resamples whose order of the leading tokens agrees, 0 to 1.

    `parts`: the other components, `[T, N]`; `samples [T, N, m]`: curvature norms per probe.
    Deterministic: the resamples are drawn with the configuration's seed.
    """
    probes = samples.shape[-1]
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randint(probes, (RESAMPLES, probes), generator=generator)
    weights = torch.nn.functional.one_hot(drawn, probes).sum(1).to(samples.dtype) / probes

    def scores(curvature: Tensor) -> Tensor:
        score, _ = combine(replace(parts, curvature=curvature), config)
        return aggregate(score, config.aggregate)

    present = scores(samples.mean(-1))
    leading = present.argsort(descending=True, stable=True)[: config.top_k]
    count = len(leading)
    if count < 2:
        return 1.0
    resampled = scores((samples @ weights.t()).permute(2, 0, 1))[:, leading]
    # Ranks within the leading tokens; without ties 1 - 6 sum d^2 / (n^3 - n) is Spearman's rho.
    ranks = resampled.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    moved = (ranks - torch.arange(count)).square().sum(-1).to(samples.dtype)
    rho = 1 - 6 * moved / (count**3 - count)
    return float((rho >= AGREEMENT).to(samples.dtype).mean())


def settled(parts: Components, samples: Tensor, config: HeatConfig) -> bool:
    """Whether the ranking is settled with the configuration's confidence."""
    return agreement(parts, samples, config) >= config.confidence

"""Attribution by optimisation: a mask learned for one prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heat_fast.baselines.base import Baseline, Replacement, register
from heat_fast.baselines.case import Case
from heat_fast.fields import integer, one_of, positive, setting
from heat_fast.information import replacement


@register("faml")
@dataclass(frozen=True, kw_only=True)
class LearnedMask(Baseline):
    """A mask learned to keep the prediction, its complement to break it (Barkan et al. 2024).

        score[i] = m_i = sigmoid(theta_i)
        theta = argmin  -log P(target | m X + (1 - m) B)
                        - complement * log(1 - P(target | (1 - m) X + m B))
                        + sparsity * mean(m)

    The paper's AML trains an attribution network on a corpus for these two aims, and fAML tunes it
    further on the instance. Here there is no corpus and no network: the mask of the instance is
    optimised itself, from m = 1/2, by Adam with `steps` steps of `rate`. The paper also optimises
    for the metric that it reports, which is left out. `masking` is what a masked embedding becomes,
    B: `"zero"` or `"mean"`, as in `HeatConfig`. Every target has a mask of its own; earlier target
    tokens stay. From 0 to 1. Draws nothing at random. Cost: 2 T `steps` forwards and backwards.
    """

    steps: int = setting(100, integer(minimum=1))
    rate: float = setting(0.2, positive(0.2))
    complement: float = setting(1.0, positive(1.0))
    sparsity: float = setting(2.0, positive(2.0))
    masking: Replacement = setting("zero", one_of(Replacement))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        # Graphs and logits of both contexts of every target of a batch are held at once.
        size = case.batch(4 * len(case.embeddings), 2 * len(case.targets), len(case.targets))
        parts = [
            self._masks(case, range(first, min(first + size, len(case.targets))))
            for first in range(0, len(case.targets), size)
        ]
        return torch.cat(parts)

    def _masks(self, case: Case, targets: range) -> Tensor:
        x, count = case.embeddings, case.tokens
        embed = case.model.get_input_embeddings()
        other = replacement(embed, self.masking, None, x)
        rows = torch.arange(len(targets), device=x.device)
        chosen = case.target_ids[targets.start : targets.stop, None]
        dtype = torch.promote_types(x.dtype, torch.float32)
        theta = torch.zeros(len(targets), count, device=x.device, dtype=dtype, requires_grad=True)
        adam = torch.optim.Adam([theta], lr=self.rate)
        for _ in range(self.steps):
            with torch.enable_grad():
                m = torch.sigmoid(theta)
                both = torch.cat((m, 1 - m)).to(x.dtype)[..., None]
                masked = both * x[:count] + (1 - both) * other
                later = x[count:].expand(len(masked), -1, -1)
                found = case.forward(torch.cat((masked, later), 1), len(case.targets))
                kept, lost = (part[rows, rows + targets.start] for part in found.chunk(2))
                held = kept.gather(-1, chosen)[:, 0]
                # log(1 - P) of all other tokens: finite, with a gradient, where P rounds to 1.
                broken = lost.scatter(-1, chosen, -math.inf).logsumexp(-1)
                loss = -held - self.complement * broken + self.sparsity * m.mean(-1)
                (theta.grad,) = torch.autograd.grad(loss.sum(), theta)
            case.counts["backward"] += len(masked)
            adam.step()
        return torch.sigmoid(theta.detach())

"""Attribution from first derivatives of the target's log-probability `g(X)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from heat_fast.baselines.base import Baseline, Replacement, register
from heat_fast.baselines.case import Case
from heat_fast.fields import integer, one_of, setting
from heat_fast.information import replacement

Norm = Literal["l2", "l1"]


@register("token_gradients")
@dataclass(frozen=True, kw_only=True)
class TokenGradients(Baseline):
    """Norm of the gradient at each token's embedding (Simonyan et al. 2014; Li et al. 2016).

        score[i] = | d g / d X_i |_norm

    `norm`: `"l2"` or `"l1"`; papers use either. Cost: 1 forward, T backwards.
    """

    norm: Norm = setting("l2", one_of(Norm))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        _, gradients = case.gradients(case.embeddings[None])
        norms: Tensor = torch.linalg.vector_norm(
            gradients[0], 2 if self.norm == "l2" else 1, dim=-1
        )
        return norms


@register("input_x_gradient")
@dataclass(frozen=True, kw_only=True)
class InputXGradient(Baseline):
    """Embedding times gradient (Shrikumar, Greenside and Kundaje 2017).

        score[i] = X_i . d g / d X_i

    Signed: the change of g that a first-order expansion expects when `X_i` goes to zero. Of a
    linear g it is exact. Cost: 1 forward, T backwards.
    """

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        values = case.embeddings[: case.tokens]
        _, gradients = case.gradients(case.embeddings[None])
        return (gradients[0] * values).sum(-1)


@register("integrated_gradients")
@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(Baseline):
    """Gradients along the straight path from a baseline (Sundararajan, Taly and Yan 2017).

        score[i] = (X_i - B_i) . integral_0^1 d g / d X_i (B + a (X - B)) da

    Signed; sums to `g(X) - g(B)` (completeness), up to the error of the sum that stands for the
    integral: `metadata["completeness_gap"]` holds it for each target, nats. A model whose first
    operation is a norm hardly knows the length of its embeddings, so that from the zero baseline g
    changes almost wholly within the first steps and the gap may stay at nats; `"mean"` is milder.
    The integral is taken
    by Gauss-Legendre quadrature with `steps` points, as Captum does. `baseline`, which the paper
    leaves open: `"zero"` or `"mean"`, the mean embedding of the vocabulary. Earlier target tokens
    are context and stay as they are. Cost: `steps` + 2 forwards, `steps` T backwards.
    """

    steps: int = setting(50, integer(minimum=1))
    baseline: Replacement = setting("zero", one_of(Replacement))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        x = case.embeddings
        start = x.clone()
        embed = case.model.get_input_embeddings()
        start[: case.tokens] = replacement(embed, self.baseline, None, x)
        points, weights = np.polynomial.legendre.leggauss(self.steps)
        total = torch.zeros((), device=x.device)
        # As many points at a time as a batch holds: the gradients of all would be too many.
        size = case.budget.batch(2 * len(x), self.steps)
        for first in range(0, self.steps, size):
            part = slice(first, first + size)
            alpha = torch.tensor((points[part] + 1) / 2).to(x)[:, None, None]
            _, gradients = case.gradients(start + alpha * (x - start))
            weight = torch.tensor(weights[part] / 2).to(gradients)
            total = total + torch.einsum("b,btnd->tnd", weight, gradients)
        scores = (total * (x - start)[: case.tokens]).sum(-1)
        ends = case.pick(case.log_probs(torch.stack((x, start))))
        gap = scores.sum(-1) - (ends[0] - ends[1])
        case.notes["completeness_gap"] = [round(float(each), 9) for each in gap]
        return scores

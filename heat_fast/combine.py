"""From components to scores (paper Eq. 5, with the optional first-order term of Eq. 22).

    score    = gate * (beta S + gamma I + alpha |grad g|_1)
    envelope = gate * (beta S + gamma max(0, drop))

With `normalize="sum"`, S, I (and the gradient norm and the positive drop) are each divided by their
own sum over the prompt's tokens before they are mixed: S grows with the width of the model and with
the inverse square of the embedding scale, I is in nats. Where screening left tokens out, these sums
take in what they are estimated to hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heat_fast.config import HeatConfig


@dataclass(frozen=True)
class Components:
    """The measured parts of an attribution, `[n, N]` each.

    `skipped`: estimated sums `[n, 1]` of the information and of the positive drop over the tokens
    whose own entries are 0 because screening left them out.
    """

    gate: Tensor
    curvature: Tensor
    information: Tensor
    log_prob_drop: Tensor
    gradient_norm: Tensor
    skipped: tuple[Tensor, Tensor] | None = None

    def rows(self, rows: slice) -> Components:
        """The components of some of the targets."""
        skipped = self.skipped
        return replace(
            self,
            gate=self.gate[rows],
            curvature=self.curvature[rows],
            information=self.information[rows],
            log_prob_drop=self.log_prob_drop[rows],
            gradient_norm=self.gradient_norm[rows],
            skipped=None if skipped is None else (skipped[0][rows], skipped[1][rows]),
        )


def combine(parts: Components, config: HeatConfig) -> tuple[Tensor, Tensor]:
    """`(score, envelope)`, `[n, N]` each, in the components' dtype.

    Example:
        >>> row = torch.tensor([[0.5, 0.5]])
        >>> parts = Components(row, row, row, -row, row)
        >>> [values.tolist() for values in combine(parts, HeatConfig())]
        [[[0.25, 0.25]], [[0.125, 0.125]]]
    """

    def scaled(values: Tensor, skipped: Tensor | float = 0.0) -> Tensor:
        if config.normalize is None:
            return values
        total = values.sum(-1, keepdim=True) + skipped
        return torch.where(total > 0, values / total, torch.zeros_like(values))

    skipped_information, skipped_drop = parts.skipped or (0.0, 0.0)
    curvature = config.beta * scaled(parts.curvature)
    information = config.gamma * scaled(parts.information, skipped_information)
    drop = config.gamma * scaled(parts.log_prob_drop.clamp_min(0), skipped_drop)
    score = parts.gate * (curvature + information + config.alpha * scaled(parts.gradient_norm))
    return score, parts.gate * (curvature + drop)


#: How several targets can become one.
AGGREGATES = ("mean", "max", "sum")


def aggregate(values: Tensor, how: str) -> Tensor:
    """Rows of several targets as one, `[.., T, N] -> [.., N]`, by one of `AGGREGATES` (Eq. 23)."""
    if how == "max":
        return values.amax(dim=-2)
    return values.sum(dim=-2) if how == "sum" else values.mean(dim=-2)

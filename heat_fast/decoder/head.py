"""The end of the model: final norm, vocabulary projection, optional soft-cap, log-softmax.

z = W n(x),  l = cap tanh(z / cap) or z,  g = l[y] - logsumexp(l),  p = softmax(l)
l_ = e_y - p,   l_. = -(p o l. - p (p . l.))                       (one row, one target y)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import AnyNorm, NormAdjoint, NormState, wide
from heat_fast.decoder.product import affine


@dataclass(frozen=True)
class HeadAdjoint:
    """What the second derivative of one row's `scale * g` needs of the primal, for all probes.

    `scale` is the power of two that brings the largest `l_` near 1: `1 - p` of a confident
    prediction is below the smallest float16, and everything downstream is linear in it.

    `state`, `bar`: the final norm's statistics and adjoint; `probabilities [1, V]`: p; `slope`,
    `bend [1, V]`: the soft-cap's `w` and `w' o l_` (None without a cap). `curvature [d, d]` is the
    Hessian of g with respect to the normed row, formed where so many probes follow that this is
    cheaper than two products with the vocabulary for each.
    """

    target: int
    scale: float
    state: NormState
    bar: NormAdjoint
    probabilities: Tensor
    slope: Tensor | None
    bend: Tensor | None
    curvature: Tensor | None


class Head:
    """Final norm and vocabulary projection of the user's model."""

    def __init__(
        self,
        norm: AnyNorm,
        projection: Linear,
        softcap: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.norm = norm
        self.projection = projection
        self.softcap = softcap
        self.device = device

    def _here(self, x: Tensor) -> Tensor:
        return x if self.device is None or x.device == self.device else x.to(self.device)

    def _logits(self, x: Tensor) -> tuple[Tensor, NormState]:
        normed, state = self.norm.forward(x)
        raw = self.projection.forward(normed)
        raw = raw.to(wide(raw.dtype))
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw, state

    def logits(self, x: Tensor) -> Tensor:
        """Logits `[..., V]` of residual rows `x [..., d]`, in at least float32."""
        return self._logits(self._here(x))[0]

    def logit_chunks(self, x: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
        """The same before the soft-cap and in the model's dtype, `size` of the vocabulary at a
        time; plain projections only."""
        x = self._here(x)
        weight = self.projection.weight
        assert weight is not None
        bias = self.projection.bias
        normed, _ = self.norm.forward(x)
        for low in range(0, weight.shape[0], size):
            part = slice(low, min(low + size, weight.shape[0]))
            yield part, affine(normed, weight[part], bias if bias is None else bias[part])

    def adjoint(self, x: Tensor, logits_bar: Tensor) -> Tensor:
        """`x_ [..., d]` from an adjoint of the logits `[..., V]`, for rows `x [..., d]`."""
        x = self._here(x)
        logits, state = self._logits(x)
        if self.softcap is not None:
            logits_bar = logits_bar * (1 - (logits / self.softcap).square())
        normed = self.projection.adjoint(logits_bar.to(x.dtype), x.shape[-1])
        return self.norm.adjoint(state, normed)[0]

    def gradient(self, x: Tensor, target: int, probes: int) -> tuple[Tensor, HeadAdjoint]:
        """`scale * d g / d x`, `[1, d]`, of one row `x [1, d]`, and what `probes` sweeps need."""
        x = self._here(x)
        logits, state = self._logits(x)
        probabilities = torch.softmax(logits, dim=-1)
        # 1 - p_y as the sum of the others: for a confident prediction the difference would cancel.
        logits_bar = -probabilities
        logits_bar[..., target] = 0
        logits_bar[..., target] = -logits_bar.sum(-1)
        largest = float(logits_bar.abs().max())
        scale = 2.0 ** -round(math.log2(largest)) if largest > 0 else 1.0
        logits_bar = logits_bar * scale
        slope = bend = None
        if self.softcap is not None:
            ratio = logits / self.softcap
            slope = 1 - ratio.square()
            bend = (-2 / self.softcap) * ratio * slope * logits_bar
            logits_bar = logits_bar * slope
        width = x.shape[-1]
        normed = self.projection.adjoint(logits_bar.to(x.dtype), width)
        x_bar, bar = self.norm.adjoint(state, normed)
        result = HeadAdjoint(target, scale, state, bar, probabilities, slope, bend, None)
        if shares_curvature(probes, width):
            unit = torch.eye(width, dtype=x.dtype, device=x.device)
            parts = [self._curve(result, unit[part]) for part in _unit_rows(width)]
            result = replace(result, curvature=torch.cat(parts))
        return x_bar, result

    def _curve(self, bar: HeadAdjoint, normed_dot: Tensor) -> Tensor:
        """Hessian of `scale * g` with respect to the normed row, times directions `[..., d]`.

        `W' [w o (-(diag p - p p')) (w o z.) + w' o l_ o z.]`, `z. = W n.`.
        """
        raw_dot = self.projection.tangent(normed_dot).to(bar.probabilities.dtype)
        moved = raw_dot if bar.slope is None else raw_dot * bar.slope
        # Relative to the target's own, lest a confident prediction's differences cancel.
        moved = moved - moved[..., bar.target : bar.target + 1]
        mean = (bar.probabilities * moved).sum(-1, keepdim=True)
        pulled = (mean - moved).mul_(bar.probabilities).mul_(bar.scale)
        if bar.slope is not None and bar.bend is not None:
            pulled = pulled.mul_(bar.slope).addcmul_(bar.bend, raw_dot)
        return self.projection.adjoint(pulled.to(normed_dot.dtype), normed_dot.shape[-1])

    def adjoint_tangent(self, bar: HeadAdjoint, x_dot: Tensor) -> Tensor:
        """`x_. [B, 1, d]`: the tangent of one row's `d g / d x` along `x_dot [B, 1, d]`."""
        x_dot = self._here(x_dot)
        normed_dot = self.norm.tangent(bar.state, x_dot)
        if bar.curvature is None:
            curved = self._curve(bar, normed_dot)
        else:
            curved = normed_dot @ bar.curvature
        return self.norm.adjoint_tangent(bar.state, x_dot, bar.bar, curved)


def shares_curvature(probes: int, width: int) -> bool:
    """Whether the head's Hessian is formed once, by d products with `[V, d]`, for all probes.

    Each probe takes two of them otherwise; those of the Hessian are batched better.
    """
    return 2 * probes > width


def _unit_rows(width: int) -> list[slice]:
    """Slices of at most 64 rows: what is multiplied by the vocabulary at once."""
    return [slice(low, min(low + 64, width)) for low in range(0, width, 64)]

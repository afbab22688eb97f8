"""The end of the model: final norm, vocabulary projection, optional soft-cap, log-softmax.

z = W n(x),  l = cap tanh(z / cap) or z,  g = l[y] - logsumexp(l),  p = softmax(l)
l_ = e_y - p,   l_. = -(p o l. - p (p . l.))                       (one row, one target y)
"""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import Identity, Norm, wide


class Head:
    """Final norm and vocabulary projection of the user's model."""

    def __init__(
        self,
        norm: Norm | Identity,
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

    def logits(self, x: Tensor) -> Tensor:
        """Logits `[..., V]` of residual rows `x [..., d]`, in at least float32."""
        raw = self.projection.forward(self.norm.forward(self._here(x)))
        raw = raw.to(wide(raw.dtype))
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def _slopes(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Probabilities `p`, and the cap's first and second derivative (None without a cap)."""
        logits = self.logits(x)
        if self.softcap is None:
            return torch.softmax(logits, dim=-1), None, None
        ratio = logits / self.softcap
        slope = 1 - ratio.square()
        return torch.softmax(logits, dim=-1), slope, (-2 / self.softcap) * ratio * slope

    def adjoint(self, x: Tensor, logits_bar: Tensor) -> Tensor:
        """`x_ [..., d]` from an adjoint of the logits `[..., V]`, for rows `x [..., d]`."""
        x = self._here(x)
        _, slope, _ = self._slopes(x)
        pulled = logits_bar if slope is None else logits_bar * slope
        return self.norm.adjoint(x, self.projection.adjoint(pulled.to(x.dtype), x.shape[-1]))

    def gradient(self, x: Tensor, target: int) -> Tensor:
        """`d g / d x`, `[1, d]`, for one row `x [1, d]`."""
        x = self._here(x)
        probabilities, _, _ = self._slopes(x)
        logits_bar = -probabilities
        logits_bar[..., target] += 1
        return self.adjoint(x, logits_bar)

    def tangent(self, x: Tensor, x_dot: Tensor) -> Tensor:
        """`l. [B, 1, V]` for one row `x [1, d]`, in at least float32."""
        x, x_dot = self._here(x), self._here(x_dot)
        _, slope, _ = self._slopes(x)
        moved = self.projection.tangent(self.norm.tangent(x, x_dot))
        moved = moved.to(wide(moved.dtype))
        return moved if slope is None else moved * slope

    def adjoint_tangent(self, x: Tensor, x_dot: Tensor, target: int) -> Tensor:
        """`x_. [B, 1, d]` of one row's `d g / d x` along `x_dot [B, 1, d]`."""
        x, x_dot = self._here(x), self._here(x_dot)
        width = x.shape[-1]
        probabilities, slope, bend = self._slopes(x)
        raw_dot = self.projection.tangent(self.norm.tangent(x, x_dot)).to(probabilities.dtype)
        moved = raw_dot if slope is None else raw_dot * slope
        mean = (probabilities * moved).sum(-1, keepdim=True)
        pulled_dot = probabilities * (mean - moved)
        pulled = -probabilities
        pulled[..., target] += 1
        if slope is not None and bend is not None:
            pulled_dot = pulled_dot * slope + pulled * bend * raw_dot
            pulled = pulled * slope
        return self.norm.adjoint_tangent(
            x,
            x_dot,
            self.projection.adjoint(pulled.to(x.dtype), width),
            self.projection.adjoint(pulled_dot.to(x.dtype), width),
        )

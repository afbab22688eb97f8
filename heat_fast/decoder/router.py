"""Which of its experts a layer sends a row to, and what each of them counts, in four readings.

    z = x W_r' + b,   s = softmax(z) or sigmoid(z)
    T = the k experts of the largest s + c,   w = a s_T or a s_T / sum s_T

with a correction `c` and a scale `a` where the model has them; experts may lie in groups, of which
those alone are open whose two best sum to most. Which experts a row goes to is piecewise constant:
derivatives are those of the piece that the trunk is on, a branch chooses for itself. With `l = log
s`, up to what all experts of a row share, all kinds of weights move alike:

    l. = z. (softmax) or (1 - s) o z. (sigmoid),   w_e. = w_e (l_e. - <q, l.>)
    q = w / a on T, 0 elsewhere (sum to a), else s (softmax) or 0 (sigmoid)
    q. = q o (l. - <q, l.>),   (1 - s). = -s o l.

The adjoints of the weights arrive as `a_ = w_ o w`, row by row, `[.., S, E]`, zero off T:

    l_ = a_ - q sum a_,   z_ = l_ or (1 - s) o l_,   x_ = z_ W_r
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from heat_fast.decoder.norm import wide
from heat_fast.decoder.product import affine, product


@dataclass(frozen=True)
class Routing:
    """The primal: `share` (q) and `slack` (1 - s; None for a softmax), `[S, E]`."""

    share: Tensor
    slack: Tensor | None = None

    def rows(self, rows: slice) -> Routing:
        """The same for some rows."""
        return Routing(self.share[rows], None if self.slack is None else self.slack[rows])


@dataclass(frozen=True)
class RoutingTangent:
    """Tangents of both, `[B, S, E]`."""

    share: Tensor
    slack: Tensor | None = None

    def rows(self, rows: slice) -> RoutingTangent:
        """The same for some rows."""
        slack = None if self.slack is None else self.slack[:, rows]
        return RoutingTangent(self.share[:, rows], slack)


class Router:
    """A router, whose weights are the model's own.

    `weight [E, d]`; `bias [E]`; `top`: k; `renormalised`: whether the weights of a row's experts
    sum to `scale` (a); `correction [E]`: c; `groups`: how many, and how many of them are open;
    `widened`: whether the model multiplies in float32 here, whatever the dtype of its rows.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        top: int,
        renormalised: bool,
        bias: Tensor | None = None,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        correction: Tensor | None = None,
        groups: tuple[int, int] = (1, 1),
        scale: float = 1.0,
        widened: bool = False,
    ) -> None:
        self.weight = weight.detach()
        self.dtype = wide(weight.dtype) if widened else weight.dtype
        self.bias = None if bias is None else bias.detach()
        self.top = top
        self.renormalised = renormalised
        self.scores = scores
        self.correction = None if correction is None else correction.detach()
        self.groups = groups
        self.scale = scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """The chosen experts `[S, k]`, all experts' weights `[S, E]`, zero off T, the primal."""
        logits = affine(x.to(self.dtype), self._weight(), self.bias)
        logits = logits.to(wide(logits.dtype))
        sigmoid = self.scores == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        chosen = self._choose(scores)
        weight = scores.gather(-1, chosen)
        if self.renormalised:
            weight = weight / weight.sum(-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter_(-1, chosen, weight)
        share = weights
        if not self.renormalised:
            share = torch.zeros_like(scores) if sigmoid else scores
        slack = torch.sigmoid(-logits) if sigmoid else None
        return chosen, self.scale * weights, Routing(share, slack)

    def _weight(self) -> Tensor:
        """In the dtype of the product; widened for it alone, as wide copies of all would add up."""
        return self.weight.to(self.dtype)

    def _choose(self, scores: Tensor) -> Tensor:
        if self.correction is not None:
            scores = scores + self.correction
        count, kept = self.groups
        if kept < count:
            grouped = scores.unflatten(-1, (count, -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(kept, -1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        return scores.topk(self.top, -1).indices

    def tangent(self, state: Routing, x_dot: Tensor) -> tuple[Tensor, RoutingTangent]:
        """How the weights move in relation to themselves, `w. / w [B, S, E]`."""
        moved = product(x_dot.to(self.dtype), self._weight().t()).to(state.share.dtype)
        if state.slack is not None:
            moved = moved * state.slack
        relative = moved - (state.share * moved).sum(-1, keepdim=True)
        slack = None if state.slack is None else moved * (state.slack - 1)
        return relative, RoutingTangent(state.share * relative, slack)

    def adjoint(self, state: Routing, along: Tensor) -> Tensor:
        """`x_ [S, d]` for `along` (a_) `[S, E]`."""
        logs = self._of_logs(state, along)
        return self._pull(logs if state.slack is None else logs * state.slack)

    def adjoint_tangent(
        self, state: Routing, tangent: RoutingTangent, along: Tensor, along_dot: Tensor
    ) -> Tensor:
        """`x_. [B, S, d]`, with

        l_. = a_. - q sum a_. - q. sum a_,   z_. = l_. or (1 - s) o l_. + (1 - s). o l_.
        """
        logs_dot = self._of_logs(state, along_dot)
        logs_dot = logs_dot - tangent.share * along.sum(-1, keepdim=True)
        if state.slack is not None and tangent.slack is not None:
            logs_dot = logs_dot * state.slack + self._of_logs(state, along) * tangent.slack
        return self._pull(logs_dot)

    @staticmethod
    def _of_logs(state: Routing, along: Tensor) -> Tensor:
        """`l_`, and what of `l_.` is made alike."""
        return along - state.share * along.sum(-1, keepdim=True)

    def _pull(self, logits: Tensor) -> Tensor:
        return product(logits.to(self.dtype), self._weight())

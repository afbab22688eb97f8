"""Plain formulas that several test files hold the engine against, and the seam to its float64.

Nothing here calls a rule, a kernel or a sweep of the engine, except `measure`, which runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import heat_fast
from heat_fast.combine import Components, combine
from heat_fast.kernels.rademacher import rademacher

COMPONENTS = ("gate", "curvature", "information", "log_prob_drop", "gradient_norm")


@dataclass(frozen=True)
class Readings:
    """A map's value and derivatives at one point, for `B` directions.

    `adjoint`: one tensor per input; `tangent [B, ...]`; `adjoint_tangent`: `[B, ...]` per input.
    """

    value: Tensor
    adjoint: tuple[Tensor, ...]
    tangent: Tensor
    adjoint_tangent: tuple[Tensor, ...]


def double_backward(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    moved: Sequence[Tensor],
    bar: Tensor,
    bar_moved: Tensor,
) -> Readings:
    """The four readings of `y = function(*inputs)` by reverse mode alone.

    With `a(x, u) = J(x)' u`: the adjoint is `a(x, bar)`; the tangent `J x.` is the gradient of
    `<a, x.>` by `u`; the adjoint's tangent is the gradient of `<a, x.>` by `x` (a Hessian is
    symmetric) plus `J' u.`. `moved` [B, ...] per input and `bar_moved` [B, ...] are directions.
    """
    with torch.enable_grad():
        leaves = [value.detach().clone().requires_grad_() for value in inputs]
        weight = bar.detach().clone().requires_grad_()
        value = function(*leaves)
        adjoint = torch.autograd.grad(value, leaves, weight, create_graph=True)
        tangents, adjoint_tangents = [], []
        for index in range(len(bar_moved)):
            along = sum((a * m[index]).sum() for a, m in zip(adjoint, moved, strict=True))
            tangent, *bent = torch.autograd.grad(
                along,
                [weight, *leaves],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            pulled = torch.autograd.grad(value, leaves, bar_moved[index], retain_graph=True)
            tangents.append(tangent)
            adjoint_tangents.append([b + p for b, p in zip(bent, pulled, strict=True)])
    return Readings(
        value.detach(),
        tuple(a.detach() for a in adjoint),
        torch.stack(tangents),
        tuple(torch.stack(parts) for parts in zip(*adjoint_tangents, strict=True)),
    )


def softmax_weights(
    query: Tensor,
    key: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`A [Hk, G, Q, T]` of `query [Hk, G, Q, D]` at the last Q of T positions, `key [Hk, T, D]`.

    `sinks [Hk, G]`: logits of a further column, which is left out of the result.
    """
    scores = scale * torch.einsum("hgqd,htd->hgqt", query, key)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = key.shape[1]
    back = torch.arange(length)[:, None] - torch.arange(length)
    visible = (back >= 0) & (back < (length if window is None else window))
    scores = scores.masked_fill(~visible[-query.shape[2] :], float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    column = sinks[..., None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *masking: Any) -> Tensor:
    """`A V [Hk, G, Q, D]`; the arguments of `softmax_weights`, with `value [Hk, T, D]`."""
    return torch.einsum("hgqt,htd->hgqd", softmax_weights(query, key, *masking), value)


def probe_signs(model: nn.Module, samples: int, tokens: int, seed: int = 0) -> Tensor:
    """The engine's probes `[samples, tokens, d]`, for the reference to use the same ones."""
    width = model.get_input_embeddings().weight.shape[-1]
    index = torch.arange(samples)[:, None]
    return rademacher(seed, index, torch.arange(tokens), width, torch.float64)


@dataclass(frozen=True)
class Measured:
    """A result, and its components `[T, N]` before they are stored as float32."""

    result: heat_fast.Attribution
    parts: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]


def measure(model: Any, prompt: Any, target: Any = None, **settings: Any) -> Measured:
    """`heat_fast.attribute` with ids, and what `combine` received and returned on the way.

    Results hold float32; the components arrive at `combine` in the precision they were computed
    in, so that is where a float64 comparison listens.
    """
    parts: dict[str, Tensor] = {}

    def listen(components: Components, config: heat_fast.HeatConfig) -> tuple[Tensor, Tensor]:
        score, envelope = combine(components, config)
        parts.update({name: getattr(components, name) for name in COMPONENTS})
        parts.update(target_scores=score, envelope=envelope)
        return score, envelope

    with mock.patch("heat_fast.attributor.combine", listen):
        result = heat_fast.attribute(model, None, prompt, target, **settings)
    return Measured(result, parts)

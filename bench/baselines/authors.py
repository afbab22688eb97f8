"""The HEAT authors' algorithm as published with the paper, re-implemented as a yardstick.

What makes it slow is kept on purpose: one Python-level double backward through the whole model for
every probe of every token, one full forward with logits at every position for every masked token.
The gate follows their reading (`rollout="input_path"`). Written from the description of the
algorithm; no line of theirs is used. Plain multi-head attention and grouped queries both work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AuthorsResult:
    """The three components and the score, `[N]` each."""

    gate: Tensor
    curvature: Tensor
    information: Tensor
    scores: Tensor


def curvature(
    model: Any,
    embeddings: Tensor,
    target: int,
    probes: Tensor,
    tokens: range | None = None,
) -> Tensor:
    """`S_i = mean_k | H_ii r_k |_1`: a double backward per token and probe; probes `[m, N, d]`.

    `tokens` (from 0 on) restricts it to a sample, for timing.
    """
    tokens = range(embeddings.shape[0]) if tokens is None else tokens
    result = torch.zeros(len(tokens), device=embeddings.device)
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for token in tokens:
            for probe in probes:
                leaf = embeddings.clone().requires_grad_(True)
                logits = model(inputs_embeds=leaf[None]).logits[0, -1]
                log_prob = torch.log_softmax(logits, dim=-1)[target]
                (gradient,) = torch.autograd.grad(log_prob, leaf, create_graph=True)
                direction = torch.zeros_like(leaf)
                direction[token] = probe[token]
                (product,) = torch.autograd.grad((gradient * direction).sum(), leaf)
                result[token] += product[token].abs().sum() / len(probes)
    return result


@torch.no_grad()
def information(model: Any, embeddings: Tensor, tokens: range | None = None) -> Tensor:
    """`KL(P || P without i)`, one full forward with all logits per token.

    `tokens` (from 0 on) restricts it to a sample, for timing.
    """
    tokens = range(embeddings.shape[0]) if tokens is None else tokens
    original = torch.log_softmax(model(inputs_embeds=embeddings[None]).logits[0, -1], dim=-1)
    result = torch.zeros(len(tokens), device=embeddings.device)
    for token in tokens:
        masked = embeddings.clone()
        masked[token] = 0
        logits = model(inputs_embeds=masked[None]).logits[0, -1]
        difference = original - torch.log_softmax(logits, dim=-1)
        result[token] = (original.exp() * difference).sum()
    return result


@torch.no_grad()
def gate(model: Any, embeddings: Tensor) -> Tensor:
    """Per-head rollout from the input with `(I + A) / 2`, times `|V W_O|_1`, normalised.

    Llama-like models only: the value and output projections are found by their names.
    """
    values: list[Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda *call: values.append(call[2][0]))
        for layer in model.model.layers
    ]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(inputs_embeds=embeddings[None], output_attentions=True).attentions
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(implementation)
    identity = torch.eye(embeddings.shape[0])
    rollout: Tensor | None = None
    total = torch.zeros(embeddings.shape[0])
    for layer, maps, value in zip(model.model.layers, attentions, values, strict=True):
        step = (identity + maps[0]) / 2  # [H, N, N]
        rollout = step if rollout is None else step @ rollout
        heads, width = step.shape[0], layer.self_attn.head_dim
        per_head = value.unflatten(-1, (-1, width)).repeat_interleave(
            layer.self_attn.num_key_value_groups, dim=1
        )
        slices = layer.self_attn.o_proj.weight.t().unflatten(0, (heads, width))
        norms = torch.einsum("nhw,hwd->hnd", per_head, slices).abs().sum(-1)
        total += (rollout[:, -1] * norms).sum(0)
    return total / total.sum()


def attribute(model: Any, ids: list[int], target: int, probes: Tensor) -> AuthorsResult:
    """`gate * (S + I) / 2` of one target; probes `[m, N, d]`."""
    embeddings = model.get_input_embeddings()(torch.tensor(ids)).detach()
    flow = gate(model, embeddings)
    curved = curvature(model, embeddings, target, probes)
    lost = information(model, embeddings)
    return AuthorsResult(flow, curved, lost, flow * (curved + lost) / 2)

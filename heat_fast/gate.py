"""The gate: attention-value flow that ends at the target position (paper Eq. 2).

    gate[i] = normalise( sum_{l,h} Phi[l,h,i] * | V[l,h,i] W_O[l,h] |_1 )

Two readings of `Phi`, for target position p:

`value_path` (default): the value that head (l, h) moves from token i, followed up to the target,

    Phi[l,h,i] = (e_p' A~_L ... A~_{l+1} A[l,h])_i,    A~ = (I + mean_h A) / 2

`input_path`: each head's own rollout from the input up to layer l,

    Phi[l,h,i] = (e_p' A^_l ... A^_1)_i,               A^ = (I + A[l,h]) / 2

Both are row-vector products taken from the top block down; no `T x T` map is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.decoder.norm import wide
from heat_fast.errors import NumericalError
from heat_fast.kernels.value_norm_rollout import attention_flow, value_output_norms
from heat_fast.progress import Step
from heat_fast.trunk import Trunk


def gate(trunk: Trunk, rollout: str, step: Step) -> Tensor:
    """The gate `[n, N]` of every target over the prompt tokens, in at least float32.

    A target's row is normalised over its whole context (the prompt and the targets before it) and
    then cut to the prompt, so it sums to 1 exactly when the context is the prompt alone.
    """
    flow = _value_path(trunk, step) if rollout == "value_path" else _input_path(trunk, step)
    total = flow.sum(-1, keepdim=True)
    if not bool((total > 0).all() & torch.isfinite(total).all()):
        raise NumericalError(
            f"the attention-value flow into a target sums to {float(total.min()):g}: expected a "
            "finite positive number. The values or output projections of all blocks are zero or "
            "broken; check the checkpoint."
        )
    return (flow / total)[:, : trunk.prompt_length]


def _targets(trunk: Trunk, dtype: torch.dtype) -> Tensor:
    """Unit rows `e_p`, `[n, M]`, one per target position."""
    first = trunk.prompt_length - 1
    return torch.eye(trunk.length, dtype=dtype, device=trunk.embeddings.device)[first:]


def _norms(trunk: Trunk, layer: int, dtype: torch.dtype) -> Tensor:
    """`| V[h,i] W_O^h |_1`, `[Hk, G, M]`."""
    state = trunk.states[layer].attention
    heads, group, _, width = state.query.shape
    output = trunk.decoder.blocks[layer].attention.output
    weight = output.matrix(heads * group * width, state.value)
    return value_output_norms(state.value, weight, dtype)


def _flow(trunk: Trunk, layer: int, rho: Tensor) -> Tensor:
    """`rho A[l,h]`, `[Hk, G, R, M]`, for weights over all positions `[.., R, M]`."""
    state = trunk.states[layer].attention
    masking = trunk.decoder.blocks[layer].attention.masking
    rho = rho[..., state.first_query :].to(state.query.device)
    return attention_flow(state.query, state.key, state.normaliser, rho, masking)


def _value_path(trunk: Trunk, step: Step) -> Tensor:
    dtype = wide(trunk.embeddings.dtype)
    rho = _targets(trunk, dtype)
    total = torch.zeros_like(rho)
    for layer in reversed(range(len(trunk.states))):
        flow = _flow(trunk, layer, rho)
        norms = _norms(trunk, layer, dtype)
        total += (flow * norms[:, :, None]).sum((0, 1)).to(total.device)
        rho = (rho + flow.mean((0, 1)).to(rho.device)) / 2
        step(1)
    return total


def _input_path(trunk: Trunk, step: Step) -> Tensor:
    dtype = wide(trunk.embeddings.dtype)
    start = _targets(trunk, dtype)
    count = len(trunk.states)
    heads, group = trunk.states[0].attention.query.shape[:2]
    # Rows of a block's rollout are appended when the walk down reaches it, so that one pass serves
    # all blocks: [Hk, G, (blocks so far) * n, M].
    rho = start.new_zeros(heads, group, 0, trunk.length)
    norms = []
    for layer in reversed(range(count)):
        rho = torch.cat((rho, start.expand(heads, group, -1, -1)), dim=2)
        rho = (rho + _flow(trunk, layer, rho).to(rho.device)) / 2
        norms.append(_norms(trunk, layer, dtype).to(rho.device))
        step(1)
    rows = rho.unflatten(2, (count, -1))
    weights = torch.stack(norms, dim=2)
    return torch.einsum("hglni,hgli->ni", rows, weights)

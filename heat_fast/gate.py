"""The gate: attention-value flow that ends at the target (the paper's semantic transition).

    gate[i] = normalise( sum_{l,h} Phi[l,h,i] * | V[l,h,i] W_O[l,h] |_1 )

Two readings of `Phi`, for target position p:

`value_path` (default): the value that head (l, h) moves from token i, followed up to the target,

    Phi[l,h,i] = (e_p' A~_L ... A~_{l+1} A[l,h])_i,    A~ = (I + mean_h A) / 2

`input_path`: each head's own rollout from the input up to layer l,

    Phi[l,h,i] = (e_p' A^_l ... A^_1)_i,               A^ = (I + A[l,h]) / 2

What a sink takes of a row of A (gpt-oss) goes to no token.

Both are row-vector products taken from the top block down; no `T x T` map is kept. The first keeps
one row per target, the second one per target, block and head, for a few heads at a time. With
`layers` set, both sums and products are over the last blocks alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.decoder.norm import wide
from heat_fast.errors import NumericalError
from heat_fast.kernels.value_norm_rollout import attention_flow, value_output_norms
from heat_fast.planner import slices
from heat_fast.progress import Step
from heat_fast.trunk import Trunk

# The rows of `input_path`, one for each head, block and target, that are kept at once: 64 MB.
ROLLOUT_ELEMENTS = 1 << 24
_ALL = slice(None)


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


def target_rows(trunk: Trunk, dtype: torch.dtype) -> Tensor:
    """Unit rows `e_p`, `[n, M]`, one per target: p is the position that predicts it."""
    eye = torch.eye(trunk.length, dtype=dtype, device=trunk.embeddings.device)
    return eye[trunk.first_row :]


def _norms(trunk: Trunk, layer: int, dtype: torch.dtype, heads: slice = _ALL) -> Tensor:
    """`| V[h,i] W_O^h |_1`, `[Hk, G, M]`, of some key-value heads."""
    state = trunk.states[layer].attention
    count, group = state.query.shape[:2]
    attention = trunk.decoder.blocks[layer].attention
    values = state.value[..., : attention.value_dim]
    features = count * group * values.shape[-1]
    weight = attention.output.matrix(features, values).unflatten(1, (count, -1))
    return value_output_norms(values[heads], weight[:, heads].flatten(1), dtype)


def head_flows(trunk: Trunk, layer: int, rho: Tensor, heads: slice = _ALL) -> Tensor:
    """What each head of a block takes from every position: `rho A[l,h]`, `[Hk, G, R, M]`.

    `rho [.., R, M]`: R rows of weights over all positions. `heads`: which key-value heads.
    """
    state = trunk.states[layer].attention
    masking = trunk.decoder.blocks[layer].attention.masking
    rho = rho[..., state.first_query :].to(state.query.device)
    return attention_flow(
        state.query[heads], state.key[heads], state.normaliser[heads], rho, masking
    )


def _value_path(trunk: Trunk, step: Step) -> Tensor:
    dtype = wide(trunk.embeddings.dtype)
    rho = target_rows(trunk, dtype)
    total = torch.zeros_like(rho)
    layers = reversed(trunk.layers)
    for layer, work in zip(layers, trunk.work.gate("value_path"), strict=True):
        flow = head_flows(trunk, layer, rho)
        norms = _norms(trunk, layer, dtype)
        total += (flow * norms[:, :, None]).sum((0, 1)).to(total.device)
        rho = (rho + flow.mean((0, 1)).to(rho.device)) / 2
        step(work)
    return total


def _input_path(trunk: Trunk, step: Step) -> Tensor:
    dtype = wide(trunk.embeddings.dtype)
    start = target_rows(trunk, dtype)
    count = len(trunk.layers)
    heads, group = trunk.states[0].attention.query.shape[:2]
    # Every head's rollout is its own, so heads are taken a few at a time.
    few = max(1, ROLLOUT_ELEMENTS // (group * count * start.numel()))
    work = [each // heads for each in trunk.work.gate("input_path")]
    total = torch.zeros_like(start)
    for part in slices(heads, few):
        size = part.stop - part.start
        # Rows of a block's rollout are appended when the walk down reaches it, so that one pass
        # serves all blocks: [heads, G, (blocks so far) * n, M].
        rho = start.new_zeros(size, group, 0, trunk.length)
        norms = []
        for visited, layer in enumerate(reversed(trunk.layers)):
            rho = torch.cat((rho, start.expand(size, group, -1, -1)), dim=2)
            rho = (rho + head_flows(trunk, layer, rho, part).to(rho.device)) / 2
            norms.append(_norms(trunk, layer, dtype, part).to(rho.device))
            step(size * work[visited])
        rows = rho.unflatten(2, (count, -1))
        total += torch.einsum("hglni,hgli->ni", rows, torch.stack(norms, dim=2))
    return total

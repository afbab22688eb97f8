"""Second-order and branch attention beside torch's math path, at the shapes of real models."""

from __future__ import annotations

import torch
from cases import SHARING, Case, Inputs, Model
from torch import Tensor

from heat_fast.kernels.branch_attention import Masking, branch_attention
from heat_fast.kernels.branch_attention import reference as branch_reference
from heat_fast.kernels.second_order_attention import (
    Primal,
    attention_adjoint_tangent,
    attention_tangent,
)

#: The math path keeps about this many matrices of scores for a head; it is given this much memory.
MATRICES, BUDGET = 60, 24 << 30


def math_path(primal: Primal, dots: list[Tensor], bar: Tensor, bar_dot: Tensor) -> list[Tensor]:
    """`O.`, `Q_.`, `K_.`, `V_.` of every probe by double backward through attention written out.

    A probe's tangent of the output is the gradient of the gradient's product with a dummy adjoint.
    The primal graph is built once and shared by all probes, as the kernels share theirs.
    """
    length, masking = primal.key.shape[1], primal.masking
    inputs = [x.detach().requires_grad_() for x in (primal.query, primal.key, primal.value)]
    adjoint = bar.detach().requires_grad_()
    hidden = torch.ones(length, length, dtype=torch.bool, device=bar.device).triu(1)
    scores = inputs[0] @ inputs[1][:, None].mT * masking.scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    output = weights @ inputs[2][:, None]
    pulled = torch.autograd.grad(output, inputs, adjoint, create_graph=True)
    results: list[tuple[Tensor, ...]] = []
    for probe in range(dots[0].shape[1]):
        # <pulled, dot> + <output, bar_dot>: its gradient in the adjoint is O., in the inputs X_.
        found = torch.autograd.grad(
            [*pulled, output],
            [adjoint, *inputs],
            [*(dot[:, probe] for dot in dots), bar_dot[:, probe]],
            retain_graph=True,
        )
        results.append(found)
    return [torch.stack(parts, 1) for parts in zip(*results, strict=True)]


def fitting(key_heads: int, each: int) -> int:
    """The most heads, a divisor of `key_heads`, whose math path fits into its memory."""
    most = max(1, min(key_heads, BUDGET // each))
    return next(count for count in range(most, 0, -1) if key_heads % count == 0)


def second_order(model: Model, length: int, inputs: Inputs) -> Case:
    """Tangent and tangent of the adjoint together, as one Hessian-vector product takes them."""
    heads, group, width, batch = model.key_heads, model.group, model.head, SHARING
    query, bar = (inputs.normal(heads, group, length, width) for _ in range(2))
    key, value = (inputs.normal(heads, length, width) for _ in range(2))
    masking, none = Masking(width**-0.5), key[:, :0]
    output, normaliser = branch_attention(
        query[:, None], key[:, None], value[:, None], none, none, masking
    )
    output, normaliser = output[:, 0], normaliser[:, 0]
    dots = [
        inputs.normal(heads, batch, group, length, width),
        inputs.normal(heads, batch, length, width),
        inputs.normal(heads, batch, length, width),
    ]
    bar_dot = inputs.normal(heads, batch, group, length, width)

    def primal(count: int) -> Primal:
        parts = (x[:count] for x in (query, key, value, normaliser, output))
        return Primal(*parts, 0, masking)

    def kernel() -> tuple[Tensor, ...]:
        moved = attention_tangent(primal(heads), *dots, impl="triton")
        pulled = attention_adjoint_tangent(primal(heads), *dots, moved, bar, bar_dot, impl="triton")
        return moved, *pulled

    timed = fitting(heads, MATRICES * group * length * length * inputs.dtype.itemsize)

    def eager() -> tuple[Tensor, ...]:
        some = [x[:timed] for x in (*dots, bar, bar_dot)]
        return tuple(math_path(primal(timed), some[:3], *some[3:]))

    pairs = model.heads * length * (length + 1) / 2
    flops = 2 * width * pairs * (3 + 14 * batch)
    read = [query, key, value, output, bar, bar_dot, *dots]
    # The output's tangent is written and read again, the other tangents are read by both halves.
    moved = sum(x.nbytes for x in (*read, *dots, *dots, bar_dot, bar_dot))
    return Case(kernel, eager, moved, flops, 5e-2, share=heads // timed)


def branches(model: Model, length: int, inputs: Inputs) -> Case:
    """Branches that share the first half of the context; torch takes whole matrices of scores."""
    heads, own = model.key_heads, length // 2
    query = inputs.normal(heads, SHARING, model.group, own, model.head)
    pair = [inputs.normal(heads, SHARING, own, model.head) for _ in range(2)]
    below = [inputs.normal(heads, length - own, model.head) for _ in range(2)]

    def call(impl: str) -> tuple[Tensor, Tensor]:
        return branch_attention(query, *pair, *below, Masking(model.head**-0.5), impl=impl)

    def whole() -> tuple[Tensor, Tensor]:
        before = branch_reference.TILE_ELEMENTS
        branch_reference.TILE_ELEMENTS = 1 << 60
        try:
            return call("reference")
        finally:
            branch_reference.TILE_ELEMENTS = before

    seen = own * (length - own) + own * (own + 1) / 2
    flops = 4.0 * model.heads * SHARING * model.head * seen
    moved = sum(x.nbytes for x in (query, query, *pair, *below))
    return Case(lambda: call("triton"), whole, moved, flops, 2e-2)

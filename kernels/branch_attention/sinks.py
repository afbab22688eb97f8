"""A sink in every head: a learned logit that takes its share of a softmax row and has no value.

With the sink `z` of a head beside a row's scores, whose log-sum-exp is `lse`,

    lse' = log(exp lse + exp z),   o' = exp(lse - lse') o,   sunk = exp(z - lse')

so that attention as it is without one need not know of it (gpt-oss).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sink(output: Tensor, normaliser: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`o'`, `lse'` and `sunk` of `output [Hk, .., G, Q, D]` and `normaliser [Hk, .., G, Q]`.

    `logits`: z, `[Hk, G]`. The output keeps its dtype, the others have the normaliser's.
    """
    heads, group = logits.shape
    z = logits.to(normaliser).view(heads, *[1] * (normaliser.dim() - 3), group, 1)
    total = torch.logaddexp(normaliser, z)
    kept = torch.exp(normaliser - total)[..., None]
    return (output * kept).to(output.dtype), total, torch.exp(z - total)

"""Causal attention of many branches over one shared prefix: one door to its implementations."""

from __future__ import annotations

from torch import Tensor

from heat_fast.kernels.branch_attention import native, reference
from heat_fast.kernels.branch_attention.reference import Masking
from heat_fast.kernels.dispatch import HALF, implementation

#: The widest head that the GPU kernels serve.
WIDEST = 256


def branch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    masking: Masking,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from the last `Q` positions of every branch to the shared prefix and to its own rows.

        o = softmax(mask(cap(scale Q [K_prefix K_own]'))) [V_prefix V_own]

    `query [Hk, B, G, Q, D]`, `key` and `value [Hk, B, S, D]` at positions `P..P+S-1`,
    `prefix_key` and `prefix_value [Hk, P, D]` at positions `0..P-1`; the queries stand at the last
    `Q` of the `S` positions. Returns the output `[Hk, B, G, Q, D]` in the query's dtype and the
    log-sum-exp `[Hk, B, G, Q]` in at least float32. Memory is linear in the context. `impl`: see
    `heat_fast.kernels.dispatch`.

    Example:
        >>> import torch
        >>> q, kv, below = torch.zeros(1, 3, 1, 2, 8), torch.ones(1, 3, 2, 8), torch.ones(1, 4, 8)
        >>> o, lse = branch_attention(q, kv, kv, below, below, Masking(1.0))
        >>> o.shape, bool((o == 1).all()), lse[0, 0, 0].exp().round().tolist()
        (torch.Size([1, 3, 1, 2, 8]), True, [5.0, 6.0])
    """
    tensors = (query, key, value, prefix_key, prefix_value)
    offers = ("native", "triton") if query.shape[-1] <= WIDEST else ("native",)
    chosen = implementation("branch_attention", impl, *tensors, offers=offers, also=HALF)
    if chosen == "triton":
        from heat_fast.kernels.branch_attention import triton

        return triton.branch_attention(*tensors, masking)
    if chosen == "native":
        return native.branch_attention(*tensors, masking)
    return reference.branch_attention(*tensors, masking)

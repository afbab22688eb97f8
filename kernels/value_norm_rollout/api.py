"""Attention-value flow and value-output norms: one door to their implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.kernels.branch_attention.reference import Masking
from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.value_norm_rollout import reference

# The widest head that the GPU kernels serve.
_WIDEST = 256


def _offers(width: int, sums: torch.dtype) -> tuple[str, ...]:
    return ("triton",) if width <= _WIDEST and sums == torch.float32 else ()


def attention_flow(
    query: Tensor,
    key: Tensor,
    normaliser: Tensor,
    rho: Tensor,
    masking: Masking,
    *,
    impl: str | None = None,
) -> Tensor:
    """Weights `rho` over query positions, moved to key positions by every head's attention.

        flow[h, r, i] = sum_j rho[r, j] A[h, j, i],    A = softmax rows from q, k, log-sum-exp

    `query [Hk, G, Q, D]`, `key [Hk, T, D]`, `normaliser [Hk, G, Q]` (log-sum-exp); the queries
    stand at the last `Q` of the `T` positions. `rho` weighs them: `[R, Q]` (the same for every
    head) or `[Hk, G, R, Q]`. Returns `[Hk, G, R, T]`; the sums are taken in rho's dtype.
    Deterministic; memory `O(H R T)`. `impl`: see `heat_fast.kernels.dispatch`; the GPU kernels take
    heads up to 256 wide, and `rho` and `normaliser` of float32.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 4, 8)
        >>> lse = torch.arange(1.0, 5.0).log().view(1, 1, 4)
        >>> attention_flow(q, k, lse, torch.eye(4)[3:], Masking(1.0))[0, 0, 0].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    sums = rho.dtype if rho.dtype == normaliser.dtype and query.dtype == key.dtype else None
    offers = _offers(query.shape[-1], sums) if sums is not None else ()
    if implementation("attention_flow", impl, query, key, rho, offers=offers) == "triton":
        from heat_fast.kernels.value_norm_rollout import triton

        return triton.attention_flow(query, key, normaliser, rho, masking)
    return reference.attention_flow(query, key, normaliser, rho, masking)


def value_output_norms(
    value: Tensor, output_weight: Tensor, dtype: torch.dtype, *, impl: str | None = None
) -> Tensor:
    """`norm[h, g, i] = | value[h, i] W_O^hg |_1`, `[Hk, G, T]` in `dtype`.

    `value [Hk, T, D]`, `output_weight [d, Hk * G * D]` (out, in): each query head multiplies its
    group's value by its own columns. `impl`: see `heat_fast.kernels.dispatch`; the GPU kernels,
    which never write the product out, take heads up to 256 wide and sum in float32.

    Example:
        >>> import torch
        >>> value_output_norms(torch.ones(1, 2, 3), -torch.ones(5, 3), torch.float32).tolist()
        [[[15.0, 15.0]]]
    """
    offers = _offers(value.shape[-1], dtype) if value.dtype == output_weight.dtype else ()
    tensors = value.detach(), output_weight.detach()
    if implementation("value_output_norms", impl, *tensors, offers=offers) == "triton":
        from heat_fast.kernels.value_norm_rollout import triton

        return triton.value_output_norms(*tensors, dtype)
    return reference.value_output_norms(value, output_weight, dtype)

"""Attention's tangent, adjoint and tangent of adjoint: one door to their implementations."""

from __future__ import annotations

from torch import Tensor

from heat_fast.kernels.dispatch import HALF, implementation
from heat_fast.kernels.second_order_attention import native, reference
from heat_fast.kernels.second_order_attention.reference import Primal

_OFFERS = ("native", "triton")


def attention_tangent(
    primal: Primal, query: Tensor, key: Tensor, value: Tensor, *, impl: str | None = None
) -> Tensor:
    """`O. = P. V + P V.`, `[Hk, B, G, Q, D]`, for a batch of `B` probes.

    `query [Hk, B, G, Q, D]`, `key` and `value [Hk, B, S, D]` are tangents; keys and values move
    from `primal.start` on. Formulas: `reference.py`. `impl`: see `heat_fast.kernels.dispatch`.
    """
    tensors = (primal.query, query, key, value)
    chosen = implementation("attention_tangent", impl, *tensors, offers=_OFFERS, also=HALF)
    if chosen == "triton":
        from heat_fast.kernels.second_order_attention import triton

        return triton.attention_tangent(primal, query, key, value)
    if chosen == "native":
        return native.attention_tangent(primal, query, key, value)
    return reference.attention_tangent(primal, query, key, value)


def attention_adjoint(primal: Primal, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Q_ [Hk, G, Q, D]`, `K_`, `V_ [Hk, stop, D]` from the output's adjoint `[Hk, G, Q, D]`.

    Once per target, in torch alone.
    """
    return reference.attention_adjoint(primal, output)


def attention_adjoint_tangent(
    primal: Primal,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    output_bar: Tensor,
    output_bar_dot: Tensor,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Q_. [Hk, B, G, Q, D]`, `K_.` and `V_. [Hk, B, S, D]`, for a batch of `B` probes.

    `query`, `key`, `value`, `output` are the tangents going up; `output_bar [Hk, G, Q, D]` is the
    primal adjoint, `output_bar_dot [Hk, B, G, Q, D]` its tangent. Formulas: `reference.py`. `impl`:
    see `heat_fast.kernels.dispatch`.
    """
    moved = (query, key, value, output, output_bar, output_bar_dot)
    chosen = implementation(
        "attention_adjoint_tangent",
        impl,
        primal.query,
        *moved,
        offers=_OFFERS,
        also=HALF,
    )
    if chosen == "triton":
        from heat_fast.kernels.second_order_attention import triton

        return triton.attention_adjoint_tangent(primal, *moved)
    if chosen == "native":
        return native.attention_adjoint_tangent(primal, *moved)
    return reference.attention_adjoint_tangent(primal, *moved)

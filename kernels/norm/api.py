"""LayerNorm and RMSNorm in three readings: one door to their implementations.

The extension takes one dtype throughout and statistics without a batch of their own; norms over
heads, whose statistics are `[Hk, 1, G, S, D]`, and half precision run on torch.
"""

from __future__ import annotations

from torch import Tensor

from heat_fast.kernels.dispatch import implementation
from heat_fast.kernels.norm import native, reference
from heat_fast.kernels.norm.reference import Affine


def _native(impl: str | None, affine: Affine, flat: bool, *tensors: Tensor) -> bool:
    parameters = [part for part in (affine.weight, affine.bias) if part is not None]
    every = (*tensors, *(part.detach() for part in parameters))
    same = all(part.dtype == tensors[0].dtype for part in every)
    dense = all(part.is_contiguous() for part in parameters)
    offers = ("native",) if same and dense and flat else ()
    return implementation("norm", impl, *every, offers=offers) == "native"


def norm_forward(
    affine: Affine, x: Tensor, *, keep: bool = True, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, `x^` and `r [..., 1]` of rows `x [..., d]`.

    With `keep=False` the statistics are not wanted and may come back empty. `impl`: see
    `heat_fast.kernels.dispatch`.

    Example:
        >>> import torch
        >>> rms = Affine(None, None, 0.0, centered=False)
        >>> norm_forward(rms, torch.tensor([[[3.0, 4.0]]]))[0].square().mean().item()
        1.0
    """
    if _native(impl, affine, x.dim() >= 2, x):
        return native.norm_forward(affine, x, keep)
    return reference.norm_forward(affine, x)


def norm_tangent(
    affine: Affine, normalised: Tensor, inverse: Tensor, x_dot: Tensor, *, impl: str | None = None
) -> Tensor:
    """`y. = w r (x. - x^ mean(x^ x.))`, `[B, S, d]`."""
    flat = x_dot.dim() == 3 and normalised.dim() == 2
    if _native(impl, affine, flat, x_dot, normalised, inverse):
        return native.norm_tangent(affine, normalised, inverse, x_dot)
    return reference.norm_tangent(affine, normalised, inverse, x_dot)


def norm_adjoint_tangent(
    affine: Affine,
    normalised: Tensor,
    inverse: Tensor,
    pulled: Tensor,
    along: Tensor,
    x_dot: Tensor,
    y_bar_dot: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """The derivative of the adjoint along `(x_dot, y_bar_dot)`, `[B, S, d]`."""
    moved = (normalised, inverse, pulled, along, x_dot, y_bar_dot)
    flat = x_dot.dim() == 3 and normalised.dim() == 2 and pulled.dim() == 2
    if _native(impl, affine, flat, *moved):
        return native.norm_adjoint_tangent(affine, *moved)
    return reference.norm_adjoint_tangent(affine, *moved)

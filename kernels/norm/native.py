"""Norms by the compiled extension (CPU), one pass over a row for each result."""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast import native
from heat_fast.kernels.norm.reference import Affine


def rows(x: Tensor) -> Tensor:
    """`[B, .., S, d]` as `[B', S, d]`, copied only where its strides demand it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])


def norm_forward(affine: Affine, x: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; with `keep=False` the statistics are empty and not written."""
    extension = native.module(x.dtype)
    flat = rows(x)
    y = x.new_empty(flat.shape)
    normalised = x.new_empty(flat.shape if keep else 0)
    inverse = x.new_empty(flat.shape[:-1] if keep else 0)
    extension.norm_forward(
        native.array(affine.weight),
        native.array(affine.bias),
        affine.weight_offset,
        affine.eps,
        affine.centered,
        native.array(flat),
        native.array(y),
        native.array(normalised) if keep else None,
        native.array(inverse) if keep else None,
        torch.get_num_threads(),
    )
    if not keep:
        return y.view(x.shape), normalised, inverse
    return y.view(x.shape), normalised.view(x.shape), inverse.view(*x.shape[:-1], 1)


def norm_tangent(affine: Affine, normalised: Tensor, inverse: Tensor, x_dot: Tensor) -> Tensor:
    """As the reference, for `x. [B, S, d]` and statistics `[S, d]`, `[S, 1]`."""
    extension = native.module(x_dot.dtype)
    moved = rows(x_dot)
    y_dot = x_dot.new_empty(moved.shape)
    extension.norm_tangent(
        native.array(affine.weight),
        affine.weight_offset,
        affine.centered,
        native.array(normalised),
        native.array(inverse[..., 0]),
        native.array(moved),
        native.array(y_dot),
        torch.get_num_threads(),
    )
    return y_dot


def norm_adjoint_tangent(
    affine: Affine,
    normalised: Tensor,
    inverse: Tensor,
    pulled: Tensor,
    along: Tensor,
    x_dot: Tensor,
    y_bar_dot: Tensor,
) -> Tensor:
    """As the reference, for `[B, S, d]` and statistics `[S, .]`."""
    extension = native.module(x_dot.dtype)
    moved, pulled_dot = rows(x_dot), rows(y_bar_dot)
    result = x_dot.new_empty(moved.shape)
    extension.norm_adjoint_tangent(
        native.array(affine.weight),
        affine.weight_offset,
        affine.centered,
        native.array(normalised),
        native.array(inverse[..., 0]),
        native.array(pulled),
        native.array(along[..., 0]),
        native.array(moved),
        native.array(pulled_dot),
        native.array(result),
        torch.get_num_threads(),
    )
    return result

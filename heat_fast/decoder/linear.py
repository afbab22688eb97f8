"""Affine maps: the model's own linear submodules, read forwards and backwards.

`y = x W' + b`. The module is *called* for the forward reading, so quantised weights, low-rank
adapters and offloading hooks keep working; only on a CPU, where torch does not always take the
fastest product there is, is a plain matrix multiplied here (`product.py`). Because the map is
affine it has no second derivative: `tangent` and `adjoint` are all that the second-order sweeps
need of it. Of a layer that has hooks, or modules within it, affinity is tested on the first
activations that it sees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from heat_fast.decoder.norm import wide
from heat_fast.decoder.product import better_affine, product
from heat_fast.errors import UnsupportedModelError

# How far a layer may be from affine, of the norm of its output: activations may be quantised.
_AFFINE = 0.05
# Rows that this is tested on, and the least norm that counts.
_TESTED_ROWS = 32
_LEAST = 1e-30


def is_hooked(module: nn.Module) -> bool:
    """Whether something takes part in the module's call beside its own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def dense_weight(module: nn.Module) -> Tensor | None:
    """Return the `[out, in]` weight of a plain matrix layer, or None for anything else.

    A layer counts as plain only if its class is known exactly and nothing hooks into its call: a
    subclass may dequantise, add an adapter or fetch its weight from elsewhere, a hook may change
    what comes out, and then only calling the module is right.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return None
    if is_hooked(module) or hasattr(module, "parametrizations"):
        return None
    if type(module) is nn.Linear:
        return weight.detach()
    if kind == "transformers.pytorch_utils.Conv1D":  # stores its weight as [in, out]
        return weight.detach().t()
    return None


class Linear:
    """One affine submodule of the user's model.

    Shapes: `x [..., in]`, `y [..., out]`. A plain layer multiplies by its weight directly; every
    other layer (quantised, adapted, offloaded) is differentiated through its own forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weight = dense_weight(module)
        bias = getattr(module, "bias", None)
        self.bias = bias.detach() if isinstance(bias, Tensor) else None
        self._differentiable = True
        self._matrix: Tensor | None = None
        # A module by itself that nothing hooks into is what it is named: a kind of linear layer,
        # such as a quantised one, whose rounding would look like a bend.
        alone = next(module.children(), None) is None
        self._tested = alone and not (module._forward_hooks or module._forward_pre_hooks)

    def out_features(self, row: Tensor) -> int:
        """Width of the output; a layer that does not say is asked by `row [1, in]`."""
        if self.weight is not None:
            return int(self.weight.shape[0])
        for name in ("out_features", "nf"):
            width = getattr(self.module, name, None)
            if isinstance(width, int):
                return width
        # A layer in training may draw random numbers, whose state is the user's.
        with torch.no_grad(), torch.random.fork_rng([row.device] if row.is_cuda else []):
            return int(self.module(row).shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """`y = x W' + b`, by the module itself but for plain layers on some CPUs."""
        better = None if self.weight is None else better_affine(x, self.weight, self.bias)
        if better is not None:
            return better
        output: Tensor = self.module(x)
        if not self._tested:
            self._tested = True
            self._test_affine(x)
        return output

    def _test_affine(self, x: Tensor) -> None:
        """See that some of the rows `x`, times -2, are mapped as an affine map does.

        Twice for what saturates, the sign for what is linear on either side of 0.
        """
        rows = x.reshape(-1, x.shape[-1])
        index = torch.linspace(0, len(rows) - 1, min(len(rows), _TESTED_ROWS), device=x.device)
        rows = rows[index.round().long()]
        y, moved = self.tangent(rows), self.tangent(-2 * rows)
        size, error = 2 * _sizes(y), _sizes(moved + 2 * y)
        rounding = 8 * torch.finfo(y.dtype).eps * _sizes(self.module(rows))
        worst = float(((error - rounding) / size.clamp_min(_LEAST)).amax())
        # What is not finite is told where it makes a difference.
        if math.isfinite(worst) and worst > _AFFINE:
            raise UnsupportedModelError(
                f"a {type(self.module).__name__} in place of a linear layer is not affine (off by "
                f"{worst:.0%} of its output, expected at most {_AFFINE:.0%}): a hook or a wrapper "
                "bends it, and second derivatives of that are not known. Remove it, or merge it "
                "into the weights."
            )

    def tangent(self, x_dot: Tensor) -> Tensor:
        """`y. = x. W'`: the affine map without its offset."""
        if self.weight is not None:
            return product(x_dot, self.weight.t())
        offset = self.module(x_dot.new_zeros(1, x_dot.shape[-1]))
        output: Tensor = self.module(x_dot) - offset.reshape(-1)
        return output

    def adjoint(self, y_bar: Tensor, in_features: int) -> Tensor:
        """`x_ = y_ W`, the vector-Jacobian product; `[..., out] -> [..., in]`."""
        if self.weight is not None:
            return product(y_bar, self.weight)
        if not self._differentiable:
            return product(y_bar, self._unit_images(in_features, y_bar))
        with torch.enable_grad():
            x = y_bar.new_zeros(*y_bar.shape[:-1], in_features, requires_grad=True)
            y = self.module(x)
            if y.requires_grad:
                # None where the output depends on something else alone, such as a kernel's handle.
                (x_bar,) = torch.autograd.grad(y, x, y_bar, allow_unused=True)
                if x_bar is not None:
                    return x_bar.detach()
        # A forward-only kernel (some quantised layers): its matrix has to stand in.
        self._differentiable = False
        return self.adjoint(y_bar, in_features)

    def _unit_images(self, in_features: int, like: Tensor) -> Tensor:
        """The `[out, in]` matrix of a layer that is not plain, from unit vectors; kept."""
        if self._matrix is None:
            unit = torch.eye(in_features, dtype=like.dtype, device=like.device)
            self._matrix = self.tangent(unit).t()
        return self._matrix

    def matrix(self, in_features: int, like: Tensor) -> Tensor:
        """The `[out, in]` matrix of the map; for a layer that is not plain, from unit vectors.

        The unit vectors take the dtype and device of `like`.
        """
        return self.weight if self.weight is not None else self._unit_images(in_features, like)


def _sizes(rows: Tensor) -> Tensor:
    """The norm of every row, in at least float32."""
    sizes: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=wide(rows.dtype))
    return sizes

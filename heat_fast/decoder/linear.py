"""Affine maps: the model's own linear submodules, read forwards and backwards.

`y = x W' + b`. The module is always *called* for the forward reading, so quantised weights,
low-rank adapters and offloading hooks keep working. Because the map is affine it has no second
derivative: `tangent` and `adjoint` are all that the second-order sweeps need of it. Of a layer that
is not plain, affinity is tested on the first activations that it sees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heat_fast.errors import UnsupportedModelError

# How far a layer may be from affine, of its largest output: quantised activations are rounded.
_AFFINE = 0.02


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
        self._differentiable = True
        self._matrix: Tensor | None = None
        self._tested = self.weight is not None

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
        """`y = x W' + b`, by the module itself."""
        output: Tensor = self.module(x)
        if not self._tested:
            self._tested = True
            self._test_affine(x, output)
        return output

    def _test_affine(self, x: Tensor, y: Tensor) -> None:
        """See that `-2 x` is mapped as an affine map does.

        Twice, for what saturates; the negative, for what is linear on either side of 0. Both scale
        exactly where activations are quantised by their largest entry.
        """
        expected = -2 * (y - self.module(x.new_zeros(1, x.shape[-1])).reshape(-1))
        error = float((self.tangent(-2 * x) - expected).abs().max())
        allowed = max(_AFFINE, 8 * torch.finfo(y.dtype).eps) * float(expected.abs().max())
        if error > allowed:
            raise UnsupportedModelError(
                f"a {type(self.module).__name__} in place of a linear layer is not affine (off by "
                f"{error:.2g}, expected at most {allowed:.2g}): a hook or a wrapper bends its "
                "output, of which second derivatives are not known. Remove it, or merge it into "
                "the weights."
            )

    def tangent(self, x_dot: Tensor) -> Tensor:
        """`y. = x. W'`: the affine map without its offset."""
        if self.weight is not None:
            return x_dot @ self.weight.t()
        offset = self.module(x_dot.new_zeros(1, x_dot.shape[-1]))
        output: Tensor = self.module(x_dot) - offset.reshape(-1)
        return output

    def adjoint(self, y_bar: Tensor, in_features: int) -> Tensor:
        """`x_ = y_ W`, the vector-Jacobian product; `[..., out] -> [..., in]`."""
        if self.weight is not None:
            return y_bar @ self.weight
        if not self._differentiable:
            return y_bar @ self._unit_images(in_features, y_bar)
        with torch.enable_grad():
            x = y_bar.new_zeros(*y_bar.shape[:-1], in_features, requires_grad=True)
            y = self.module(x)
            if y.requires_grad:
                (x_bar,) = torch.autograd.grad(y, x, y_bar)
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

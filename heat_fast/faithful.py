"""Is the view the model? What is explained is compared with what the model itself computes."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast.decoder.experts import Experts
from heat_fast.errors import UnsupportedModelError
from heat_fast.forward import log_probs
from heat_fast.trunk import Trunk

#: How much more log-probabilities below float32 may differ where a router chooses.
ROUTED = 16


def check_faithful(model: Any, trunk: Trunk) -> None:
    """Compare the view's log-probabilities with the model's own at the target rows.

    A patched forward, a subclass or another attention may change what the model computes above the
    submodules that the view calls; explaining another model would be worse than none. Costs about
    one run of the trunk.
    """
    own = log_probs(model, trunk.embeddings, len(trunk.targets)).to(trunk.log_probs)
    # Unlikely tokens do not matter.
    weight = torch.maximum(own.exp(), trunk.log_probs.exp())
    difference = float((weight * (own - trunk.log_probs).abs()).max())
    allowed = _rounding(trunk, own)
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"the view of {type(model).__name__} does not compute what the model computes: "
            f"log-probabilities differ by {difference:.2g} nats, expected at most {allowed:.2g}. "
            "A hook, a patched forward, a custom attention or a learned prompt changes the model; "
            "remove it, or merge it into the weights."
        )


def _rounding(trunk: Trunk, own: Tensor) -> float:
    """How far the log-probabilities of two orders of summation may be apart, in nats.

    In float32 and 64 (where norms and softmax are in float32) far above rounding, and far below
    what a change to the model does. Below float32 a logit itself is known to `eps` of its size
    only, a tenth of a nat at 25 in bfloat16, and layers that are not plain may round more. Experts
    that a router finds nearly equal are chosen otherwise, which is a leap: several times the rest
    even in three layers of random weights.
    """
    single = float(torch.finfo(torch.float32).eps)
    eps = float(torch.finfo(trunk.embeddings.dtype).eps)
    if eps <= single:
        return 8 * math.sqrt(single)
    logit = float((own.amax(-1) + trunk.normaliser).abs().max())
    layers = 0.0 if trunk.decoder.plain else 8 * math.sqrt(eps)
    routed = any(isinstance(block.mlp, Experts) for block in trunk.decoder.blocks)
    return max(16 * eps * max(1.0, logit / 4), layers) * (ROUTED if routed else 1)


def check_hooks(model: Any, trunk: Trunk) -> None:
    """See that hooks on modules that the view does not call leave the log-probabilities alone.

    The model's own forward is run with and without them, and has to be the same to the last bit:
    a difference that rounding could make would not be found by `check_faithful` in half precision.
    Where there are no such hooks nothing is run.
    """
    called = {id(each) for linear in trunk.decoder.linears for each in linear.module.modules()}
    names = [
        name
        for name, module in model.named_modules()
        if (module._forward_hooks or module._forward_pre_hooks) and id(module) not in called
    ]
    if not names:
        return
    embeddings, count = trunk.embeddings, len(trunk.targets)
    own = log_probs(model, embeddings, count)
    if torch.equal(own, log_probs(_without_hooks(model, called), embeddings, count)):
        return
    # A kernel that does not give the same twice leaves it to the comparison up to rounding.
    if torch.equal(own, log_probs(model, embeddings, count)):
        raise UnsupportedModelError(
            f"hooks change what {type(model).__name__} computes (there are some on "
            f"{', '.join(name or 'the model' for name in names[:3])}): expected hooks that only "
            "look on, or on linear layers. Remove them."
        )


def _without_hooks(module: nn.Module, called: set[int]) -> nn.Module:
    """The same parameters in copied modules without hooks, save those that are called.

    The model itself may be running in another thread, so that nothing can be taken off it. What is
    bound to a module (a forward that accelerate has put in its place) is bound to its copy.
    """
    if id(module) in called:
        return module
    bare: nn.Module = object.__new__(type(module))
    bare.__dict__ = {name: _bound(value, module, bare) for name, value in vars(module).items()}
    bare._modules = {
        name: None if child is None else _without_hooks(child, called)
        for name, child in module._modules.items()
    }
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    return bare


def _bound(value: Any, module: nn.Module, bare: nn.Module) -> Any:
    """A method or partial call of a module as one of its copy; anything else as it is."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, bare)
    if isinstance(value, partial):
        arguments = (bare if each is module else each for each in value.args)
        return partial(_bound(value.func, module, bare), *arguments, **value.keywords)
    return value

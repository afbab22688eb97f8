"""Is the view the model? What is explained is compared with what the model itself computes."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast.decoder.linear import Linear
from heat_fast.errors import UnsupportedModelError
from heat_fast.forward import follows_length, log_probs
from heat_fast.trunk import Trunk

_SINGLE = float(torch.finfo(torch.float32).eps)
#: How float32 factors of a product may be rounded, by torch's setting; not at all by default.
_PRODUCTS = {"tf32": 2.0**-10, "bf16": 2.0**-7}

#: How much more log-probabilities below float32 may differ where a router chooses.
ROUTED = 16


def check_faithful(model: Any, trunk: Trunk) -> None:
    """Compare the view's log-probabilities with the model's own at the target rows.

    A patched forward, a subclass or another attention may change what the model computes above the
    submodules that the view calls; explaining another model would be worse than none. Costs about
    one run of the trunk.
    """
    own = _own(model, trunk)
    eps = _eps(trunk)
    allowed, difference = _rounding(trunk, own, eps), _difference(trunk, own, eps)
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"the view of {type(model).__name__} does not compute what the model computes: "
            f"log-probabilities differ by {difference:.2g} nats, expected at most {allowed:.2g}. "
            "A hook, a patched forward, a custom attention or a learned prompt changes the model "
            "(remove it, or merge it into the weights), or a layer rounds a row by its neighbours, "
            "as torch's dynamic quantisation does (load the model without it)."
        )


def _own(model: Any, trunk: Trunk) -> Tensor:
    """The model's own log-probabilities `[n, V]`.

    Rotary tables that change with the length of the context are those of the decoder's, which is
    longer than the trunk's where a response comes in chunks: the context is then filled up.
    """
    count, missing = len(trunk.targets), trunk.decoder.length - trunk.length
    context = trunk.embeddings
    if missing and any(follows_length(module) for module in model.modules()):
        context = torch.cat((context, context[-1:].expand(missing, -1)))
    else:
        missing = 0
    return log_probs(model, context, count + missing)[:count].to(trunk.log_probs)


def _difference(trunk: Trunk, own: Tensor, eps: float) -> float:
    """The largest difference of two log-probabilities, in nats.

    In full precision that of any token; very small probabilities are compared by the digits of
    their logarithm, as a head's bias may rule tokens out. Below it, where the tail of a vocabulary
    always holds some large difference, unlikely tokens count by their probability; the targets in
    full, unless a router's leaps may move them.
    """
    view = trunk.log_probs
    apart = (own - view).abs()
    if eps <= _SINGLE:
        return float((apart / (own.abs() / 16).clamp_min(1.0)).max())
    weight = torch.maximum(own.exp(), view.exp())
    if not _is_routed(trunk):
        rows = torch.arange(len(trunk.targets), device=weight.device)
        weight[rows, torch.as_tensor(trunk.targets, device=weight.device)] = 1.0
    return float((weight * apart).max())


def _eps(trunk: Trunk) -> float:
    """The coarsest rounding on the way: of the stream, of products, of layers that are not plain.

    Of a layer that holds anything but float32 and 64 (packed weights, factors in half precision)
    nothing is known: it is taken to round as bfloat16 does.
    """
    stream = trunk.embeddings
    eps = float(torch.finfo(stream.dtype).eps)
    if stream.dtype == torch.float32:
        backend: Any = torch.backends.cuda if stream.is_cuda else torch.backends.mkldnn
        chosen = backend.matmul.fp32_precision
        general: Any = torch.backends
        chosen = general.fp32_precision if chosen == "none" else chosen
        eps = max(eps, _PRODUCTS.get(chosen, eps))
    if all(_is_exact(linear) for linear in trunk.decoder.linears):
        return eps
    return max(eps, float(torch.finfo(torch.bfloat16).eps))


def _is_exact(linear: Linear) -> bool:
    """Whether a layer multiplies in the precision of its input, as far as can be told."""
    if linear.weight is not None:
        return True
    held = [*linear.module.parameters(), *linear.module.buffers()]
    return bool(held) and all(part.dtype in (torch.float32, torch.float64) for part in held)


def _rounding(trunk: Trunk, own: Tensor, eps: float) -> float:
    """How far the log-probabilities of two orders of summation may be apart, in nats.

    In float32 and 64 (where norms and softmax are in float32) far above rounding, and far below
    what a change to the model does. Below float32, or where torch may round its products, a logit
    itself is known to `eps` of its size only, a tenth of a nat at 25 in bfloat16, and layers that
    are not plain may round more. Experts that a router finds nearly equal are chosen otherwise,
    which is a leap: several times the rest even in three layers of random weights.
    """
    if eps <= _SINGLE:
        return 8 * math.sqrt(_SINGLE)
    logit = float((own.amax(-1) + trunk.normaliser).abs().max())
    layers = 0.0 if trunk.decoder.plain else 8 * math.sqrt(eps)
    return max(16 * eps * max(1.0, logit / 4), layers) * (ROUTED if _is_routed(trunk) else 1)


def _is_routed(trunk: Trunk) -> bool:
    return any(block.mlp.routed for block in trunk.decoder.blocks)


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

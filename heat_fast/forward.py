"""The user's model as it is: its own forward, and the state it is left in."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast.decoder.norm import wide
from heat_fast.errors import InputError, UnsupportedModelError
from heat_fast.trunk import Trunk


def check_model(model: Any) -> None:
    """Raise `InputError` for anything but a model in memory."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is {type(model).__name__}: expected a loaded Hugging Face causal language "
            "model. Load one with AutoModelForCausalLM.from_pretrained(...)."
        )


def context_length(model: Any) -> int | None:
    """The longest context the model was made for, if its config says."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def log_probs(model: Any, embeddings: Tensor, count: int) -> Tensor:
    """Log-probabilities `[count, V]` at the last positions of a context `[M, d]`, float32 or 64."""
    output = model(inputs_embeds=embeddings[None], use_cache=False, logits_to_keep=count)
    logits = output.logits[0, -count:]
    return torch.log_softmax(logits.to(wide(logits.dtype)), dim=-1)


def check_faithful(model: Any, trunk: Trunk) -> None:
    """See that the view computes what the model computes, at the target rows.

    A hook, a patched forward, a subclass or a prompt-learning adapter may change what the model
    computes above the submodules that the view calls; explaining another model would be worse
    than none. Hooks on modules that are not called are found by the same forward without them,
    which has to be equal to the last bit; whatever else by comparing log-probabilities up to
    rounding. Costs about one run of the trunk, two where there are such hooks.
    """
    count = len(trunk.targets)
    own = log_probs(model, trunk.embeddings, count).to(trunk.log_probs)
    called = set(map(id, trunk.decoder.called))
    names = [name for name, each in model.named_modules() if _is_changed(each, called)]
    if names:
        plain = log_probs(_without_hooks(model, called), trunk.embeddings, count).to(own)
        if not torch.allclose(own, plain, rtol=0, atol=0, equal_nan=True):
            raise UnsupportedModelError(
                f"hooks change what {type(model).__name__} computes (there are some on "
                f"{', '.join(name or 'the model' for name in names[:3])}): expected hooks that "
                "only look on, or on linear layers. Remove them."
            )
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
    only, a tenth of a nat at 25 in bfloat16.
    """
    single = float(torch.finfo(torch.float32).eps)
    least = 8 * math.sqrt(single)
    eps = float(torch.finfo(trunk.embeddings.dtype).eps)
    if eps <= single:
        return least
    logit = float((own.amax(-1) + trunk.normaliser).abs().max())
    return max(least, 16 * eps * max(1.0, logit / 4))


def _is_changed(module: nn.Module, called: set[int]) -> bool:
    """Whether hooks take part in the call of a module that is not called."""
    return bool(module._forward_hooks or module._forward_pre_hooks) and id(module) not in called


def _without_hooks(module: nn.Module, called: set[int]) -> nn.Module:
    """The same parameters in copied modules without hooks, save those that are called.

    The model itself may be running in another thread, so that nothing can be taken off it.
    """
    if id(module) in called:
        return module
    bare = copy.copy(module)
    bare._modules = {
        name: None if child is None else _without_hooks(child, called)
        for name, child in module._modules.items()
    }
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    return bare


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Switch dropout off (an adapter's, say); afterwards restore every module's mode and tables.

    Long-context variants of the rotary embedding rewrite their tables in the model's own forward.
    Where calls overlap, in threads or one within another, the first finds the model as its owner
    left it, and the last restores that. Tensors that are made without a device are the CPU's
    inside, whatever `torch.set_default_device` says.
    """
    with _LOCK:
        if model not in _BORROWED:
            _BORROWED[model] = 0, _restorer(model)
        users, restore = _BORROWED[model]
        _BORROWED[model] = users + 1, restore
        model.eval()
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        with _LOCK:
            users, restore = _BORROWED[model]
            _BORROWED[model] = users - 1, restore
            if users == 1:
                del _BORROWED[model]
                restore()


_LOCK = threading.Lock()
#: Of each model in use: by how many calls, and what puts it back as it was before the first.
_BORROWED: dict[nn.Module, tuple[int, Callable[[], None]]] = {}


def _restorer(model: nn.Module) -> Callable[[], None]:
    """What gives the model its present modes and rotary tables back."""
    training = [module for module in model.modules() if module.training]
    rotary = [module for module in model.modules() if "Rotary" in type(module).__name__]
    attributes = [dict(vars(module)) for module in rotary]
    buffers = [
        {name: (table, table.clone()) for name, table in module.named_buffers(recurse=False)}
        for module in rotary
    ]

    def restore() -> None:
        for module in training:
            module.training = True
        for module, before, tables in zip(rotary, attributes, buffers, strict=True):
            for name in vars(module).keys() - before.keys():
                delattr(module, name)
            for name, (table, values) in tables.items():
                module._buffers[name] = table
                if not torch.equal(table, values):
                    with torch.inference_mode(table.is_inference()):
                        table.copy_(values)

    return restore

"""The user's model as it is: its own forward, and the state it is left in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Compare the view's log-probabilities with the model's own at the target rows.

    A hook, a patched forward, a subclass or a prompt-learning adapter may change what the model
    computes above the submodules that the view calls; explaining another model would be worse
    than none. Costs about one run of the trunk.
    """
    own = log_probs(model, trunk.embeddings, len(trunk.targets)).to(trunk.log_probs)
    # Rounding accumulates over the blocks: the square root of the precision is far above it, and
    # far below what a change to the model does. Unlikely tokens do not matter.
    weight = torch.maximum(own.exp(), trunk.log_probs.exp())
    difference = float((weight * (own - trunk.log_probs).abs()).max())
    # A float64 model still takes its norms and softmax in float32.
    eps = max(torch.finfo(trunk.embeddings.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = 8 * eps**0.5
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"the view of {type(model).__name__} does not compute what the model computes: "
            f"log-probabilities differ by {difference:.2g} nats, expected at most {allowed:.2g}. "
            "A hook, a patched forward, a custom attention or a learned prompt changes the model; "
            "remove it, or merge it into the weights."
        )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Switch dropout off (an adapter's, say); afterwards restore every module's mode and tables.

    Long-context variants of the rotary embedding rewrite their tables in the model's own forward.
    Where calls overlap, in threads or one within another, the first finds the model as its owner
    left it, and the last restores that.
    """
    with _LOCK:
        if model not in _BORROWED:
            _BORROWED[model] = 0, _restorer(model)
        users, restore = _BORROWED[model]
        _BORROWED[model] = users + 1, restore
        model.eval()
    try:
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
                table.copy_(values)
                module._buffers[name] = table

    return restore

"""The user's model as it is: its own forward, and the state it is left in."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
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


def check_in_memory(model: Any) -> torch.device:
    """Where the model's embeddings are; `UnsupportedModelError` where they have no values."""
    embed = model.get_input_embeddings()
    weight: Tensor = embed.weight
    place = getattr(getattr(embed, "_hf_hook", None), "execution_device", None)
    device = torch.device(place) if place is not None else weight.device
    if device.type == "meta":
        raise UnsupportedModelError(
            f"the weights of {type(model).__name__} are on the meta device, without values: "
            "expected a model in memory. Load it with from_pretrained, without offloading."
        )
    return device


def context_length(model: Any) -> int | None:
    """The longest context the model was made for, if its config says."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def vocabularies(model: Any) -> tuple[int, int]:
    """How many token ids the model reads, and how many it predicts; they may differ."""
    read = int(model.get_input_embeddings().weight.shape[0])
    head: Any = model.get_output_embeddings()
    return read, int(getattr(head, "out_features", read))


def log_probs(model: Any, embeddings: Tensor, count: int) -> Tensor:
    """Log-probabilities `[count, V]` at the last positions of a context `[M, d]`, float32 or 64."""
    return padded_log_probs(model, [embeddings], count)[0]


def padded_log_probs(model: Any, contexts: Sequence[Tensor], count: int) -> Tensor:
    """Log-probabilities `[B, count, V]` at the last positions of each context `[M, d]`.

    Shorter contexts are padded on the right, which a causal model does not see.
    """
    sizes = [len(each) for each in contexts]
    padded = nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)
    kept = max(sizes) - min(sizes) + count
    logits = model(inputs_embeds=padded, use_cache=False, logits_to_keep=kept).logits[:, -kept:]
    if kept > count:
        ends = [slice(size - min(sizes), size - min(sizes) + count) for size in sizes]
        logits = torch.stack([row[end] for row, end in zip(logits, ends, strict=True)])
    return torch.log_softmax(logits.to(wide(logits.dtype)), dim=-1)


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
    only, a tenth of a nat at 25 in bfloat16, and layers that are not plain may round more.
    """
    single = float(torch.finfo(torch.float32).eps)
    eps = float(torch.finfo(trunk.embeddings.dtype).eps)
    if eps <= single:
        return 8 * math.sqrt(single)
    logit = float((own.amax(-1) + trunk.normaliser).abs().max())
    layers = 0.0 if trunk.decoder.plain else 8 * math.sqrt(eps)
    return max(16 * eps * max(1.0, logit / 4), layers)


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


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model `unchanged`, and torch's modes as if the caller had set none; no gradients."""
    # Within inference mode autograd could not differentiate the activations; autocast would change
    # dtypes behind the model's back.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        unchanged(model),
    ):
        yield


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
                if not table.is_meta and not torch.equal(table, values):
                    with torch.inference_mode(table.is_inference()):
                        table.copy_(values)

    return restore

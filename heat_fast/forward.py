"""The user's model as it is: its own forward, and the state it is left in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast.decoder.norm import wide
from heat_fast.errors import InputError, UnsupportedModelError

# Kinds of rotary embedding whose angles depend on how long the context is.
_LENGTH_ROPES = frozenset({"longrope", "dynamic"})


def check_model(model: Any) -> None:
    """Raise `InputError` for anything but a model in memory."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is {type(model).__name__}: expected a loaded Hugging Face causal language "
            "model. Load one with AutoModelForCausalLM.from_pretrained(...)."
        )


def check_in_memory(model: Any) -> torch.device:
    """Where the model's embeddings are; `UnsupportedModelError` where they have no values.

    Nor may norms lie elsewhere, which are not called; linear layers are, and may fetch theirs.
    """
    embed = model.get_input_embeddings()
    weight: Tensor = embed.weight
    place = getattr(getattr(embed, "_hf_hook", None), "execution_device", None)
    device = torch.device(place) if place is not None else weight.device
    if weight.is_meta or device.type == "meta":
        raise UnsupportedModelError.of_meta(type(model).__name__)
    for name, module in model.named_modules():
        own = module.parameters(recurse=False)
        if type(module).__name__.endswith("Norm") and any(each.is_meta for each in own):
            raise UnsupportedModelError.of_meta(name)
    return device


def context_length(model: Any) -> int | None:
    """The longest context the model was made for, if its config says."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def vocabularies(model: Any) -> tuple[int, int]:
    """How many token ids the model reads, and how many it predicts; they may differ."""
    read = int(model.get_input_embeddings().weight.shape[0])
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return read, int(getattr(head, "out_features", read))


def log_probs(model: Any, embeddings: Tensor, count: int) -> Tensor:
    """Log-probabilities `[count, V]` at the last positions of a context `[M, d]`, float32 or 64."""
    return padded_log_probs(model, [embeddings], count)[0]


def picked(log_probs: Tensor, targets: Sequence[int]) -> Tensor:
    """Of each row `[n, V]` the entry of its target, `[n]`."""
    index = torch.tensor(targets, device=log_probs.device)
    return log_probs.gather(-1, index[:, None])[:, 0]


def padded_log_probs(model: Any, contexts: Sequence[Tensor], count: int) -> Tensor:
    """Log-probabilities `[B, count, V]` at the last positions of each context `[M, d]`.

    Shorter contexts are padded on the right, which a causal model does not see, unless the length
    of the context changes its rotary tables: then one length is run at a time.
    """
    sizes = [len(each) for each in contexts]
    if len(set(sizes)) > 1 and any(map(follows_length, model.modules())):
        return torch.cat([padded_log_probs(model, [each], count) for each in contexts])
    padded = nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)
    kept = max(sizes) - min(sizes) + count
    logits = model(inputs_embeds=padded, use_cache=False, logits_to_keep=kept).logits[:, -kept:]
    if kept > count:
        ends = [slice(size - min(sizes), size - min(sizes) + count) for size in sizes]
        logits = torch.stack([row[end] for row, end in zip(logits, ends, strict=True)])
    return torch.log_softmax(logits.to(wide(logits.dtype)), dim=-1)


def follows_length(module: nn.Module) -> bool:
    """Whether a module's rotary tables depend on how long the context is."""
    kinds = getattr(module, "rope_type", None)
    return not _LENGTH_ROPES.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds])


@contextmanager
def on_cpu() -> Iterator[None]:
    """Tensors that are made without a device are the CPU's, whatever `torch.set_default_device`
    says."""
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if elsewhere else nullcontext():
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Switch dropout off (an adapter's, say); afterwards restore every module's mode and tables.

    Long-context variants of the rotary embedding rewrite their tables in the model's own forward.
    Where calls overlap, in threads or one within another, the first finds the model as its owner
    left it, and the last restores that. Inside it is as `on_cpu`.
    """
    with _LOCK:
        if model not in _BORROWED:
            _BORROWED[model] = 0, _restorer(model)
        users, restore = _BORROWED[model]
        _BORROWED[model] = users + 1, restore
        model.eval()
    try:
        with on_cpu():
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

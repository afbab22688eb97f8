"""What a result was made by: the model, where it was, and the versions."""

from __future__ import annotations

import hashlib
import os
import platform
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast._version import __version__

#: Numbers of every parameter that a fingerprint reads.
SAMPLED = 64
#: From one of them to the next: an odd number without a pattern, so that all columns are met.
_STRIDE = 0x9E3779B1


def identity(model: Any) -> dict[str, Any]:
    """Which model it is: its class, name, active adapters, and a fingerprint of its weights."""
    return {
        "model": type(model).__name__,
        "name": str(getattr(model, "name_or_path", "") or ""),
        "adapters": _adapters(model),
        "weights": fingerprint(model),
    }


def one_spelling(name: str) -> str:
    """The folder that a model's name stands for, by its absolute path; a hub name as it is."""
    return os.path.realpath(name) if os.path.isdir(name) else name


def _adapters(model: nn.Module) -> list[str]:
    """Names of PEFT's adapters that take part in the model's forward, merged ones left out."""
    names: set[str] = set()
    for layer in model.modules():
        enabled = getattr(layer, "disable_adapters", None) is False
        if enabled and not getattr(layer, "merged", False):
            names.update(getattr(layer, "active_adapters", ()))
    return sorted(names)


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that tell whether two models have the same weights.

    They are a digest of every parameter's name, shape and dtype and of `SAMPLED` of its numbers, in
    milliseconds: a model that was trained further, or had an adapter merged into it, has others;
    one of which only a few numbers were changed may not. Values that are elsewhere (offloaded) or
    packed by a quantisation library are not read.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = fingerprint(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(2)
        >>> fingerprint(layer) == before
        False
    """
    digest, steps = hashlib.sha256(), torch.arange(SAMPLED) * _STRIDE
    read: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        values = parameter.data
        if not _is_plain(values):
            continue
        # In the order of memory a transposed matrix is read without a copy; as bytes every dtype
        # can be indexed, those narrower than a byte too.
        order = sorted(range(values.dim()), key=values.stride, reverse=True)
        flat = values.permute(order).reshape(-1).view(torch.uint8)
        numbers = flat.view(-1, values.element_size())
        places = steps[: len(numbers)] % len(numbers)
        read.setdefault(values.device, []).append((number, numbers[places].flatten()))
    found: dict[int, bytes] = {}
    for each in read.values():  # one copy from each device, not one of each parameter
        rows = torch.cat([row for _, row in each]).cpu().split([len(row) for _, row in each])
        for (number, _), row in zip(each, rows, strict=True):
            found[number] = row.numpy().tobytes()
    for number in sorted(found):
        digest.update(found[number])
    return digest.hexdigest()[:16]


def _is_plain(values: Tensor) -> bool:
    """Whether these are numbers in memory: not elsewhere, packed by a library, sparse, or none."""
    here = type(values) is Tensor and values.device.type != "meta" and values.numel() > 0
    return here and values.layout == torch.strided and not values.is_quantized


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, and of Python."""
    import transformers

    return {
        "heat_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def provenance(model: Any, embeddings: Tensor) -> dict[str, Any]:
    """The part of a result's metadata that every method shares, as JSON values."""
    return {
        **identity(model),
        "device": str(embeddings.device),
        "dtype": str(embeddings.dtype).removeprefix("torch."),
        "versions": versions(),
    }

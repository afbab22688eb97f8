"""The compiled extension: whether it is there, what it was built with, how tensors are passed.

`heat_fast._native` holds CPU kernels (csrc/). It takes addresses, sizes and strides and links
neither torch nor an OpenMP runtime, so one build serves every torch version. Where no compiler was
at hand when the package was installed it is missing, and everything runs on torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heat_fast import cuda

try:
    _extension: Any = importlib.import_module("heat_fast._native")
    _missing = ""
except ImportError as error:  # not built, or built for another interpreter
    _extension = None
    _missing = str(error)

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def available() -> bool:
    """Whether the extension was built and can be loaded."""
    return _extension is not None


def serves(*tensors: Tensor, also: tuple[torch.dtype, ...] = ()) -> bool:
    """Whether the extension can take these: CPU, float32 or float64 (or `also`), no autograd."""
    return available() and all(
        tensor.device.type == "cpu"
        and (tensor.dtype in _DTYPES or tensor.dtype in also)
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


def missing() -> str:
    """Why the extension cannot be loaded; empty if it can."""
    return _missing


def module(dtype: torch.dtype) -> Any:
    """The extension's operations for one type of number."""
    return getattr(_extension, _DTYPES[dtype])


def array(tensor: Tensor | None) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """A tensor as the extension takes it: address, shape, strides."""
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())


def workspace(dtype: torch.dtype) -> Callable[[int], int]:
    """An allocator of torch memory for one call, freed with it: `allocate(count) -> address`."""
    kept: list[Tensor] = []

    def allocate(count: int) -> int:
        kept.append(torch.empty(count, dtype=dtype, device="cpu"))
        return kept[-1].data_ptr()

    return allocate


def build_info() -> dict[str, Any]:
    """What was compiled, with what, and what this processor runs of it.

    `native`: whether the extension is there; if not, `reason`. Else `compiler`,
    `instruction_set` (in use), `instruction_sets` (that this processor runs) and `threads`.
    `cuda`: the same of the CUDA kernels, see `heat_fast.cuda.build_info`.

    Example:
        >>> sorted(build_info())[-1] in ("reason", "threads")
        True
    """
    if _extension is None:
        return {"native": False, "reason": _missing, "cuda": cuda.build_info()}
    return {
        "native": True,
        "cuda": cuda.build_info(),
        "compiler": _extension.compiler,
        "instruction_set": _extension.instruction_set(),
        "instruction_sets": _extension.instruction_sets(),
        "threads": _extension.threads(),
    }


def use_instruction_set(name: str) -> None:
    """Run on one of `build_info()["instruction_sets"]`, for tests and comparisons."""
    _extension.use_instruction_set(name)

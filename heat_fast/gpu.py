"""Triton, the GPU kernels' compiler: whether it is there and which tensors its kernels take.

Wheels of torch for CUDA bring Triton along. With `TRITON_INTERPRET=1` in the environment the
kernels run on the CPU, in its interpreter: slowly, for tests, and only where `impl="triton"` is
asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def missing() -> str:
    """Why Triton's kernels cannot run; empty if they can."""
    if find_spec("triton") is None:
        return "No module named 'triton'"
    if interpreted() or torch.cuda.is_available():
        return ""
    return "torch sees no CUDA device"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def serves(*tensors: Tensor, asked: bool) -> bool:
    """Whether the kernels can take these: on CUDA, float32, float16 or bfloat16, no autograd.

    `asked`: by name, not as part of `"auto"`; only then is the interpreter used.
    """
    device = "cuda" if not interpreted() else "cpu" if asked else "none"
    return not missing() and all(
        tensor.device.type == device
        and tensor.dtype in _DTYPES
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the current one; kernels are launched on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability(device: torch.device) -> int:
    """A device's compute capability, 90 for 9.0; 0 for the interpreter's."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def for_architecture(table: Mapping[int, T], device: torch.device | int) -> T:
    """The entry for a device (or compute capability, 90 for 9.0) of a table of tile sizes.

    The newest entry that is not newer than the device, else the oldest.
    """
    newest = device if isinstance(device, int) else capability(device)
    return table[max((each for each in table if each <= newest), default=min(table))]

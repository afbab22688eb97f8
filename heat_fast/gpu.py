"""Triton, the GPU kernels' compiler: whether it is there and which tensors its kernels take.

Wheels of torch for CUDA bring Triton along. With `TRITON_INTERPRET=1` in the environment the
kernels run on the CPU, in its interpreter: slowly, for tests, and only where `impl="triton"` is
asked for.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

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

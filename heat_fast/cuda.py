"""The compiled CUDA kernels: whether they are there, and how tensors are passed to them.

`heat_fast._cuda` (csrc/cuda/) is built where nvcc is at hand. It takes addresses, sizes, strides
and a stream; the CUDA runtime is linked into it and torch is not, so it can be imported on a
machine without a GPU, where a launch is an error. It is a module of its own beside Triton's kernels
(`heat_fast.gpu`) because these need float64 tensor cores and no compiler at run time.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

try:
    _extension: Any = importlib.import_module("heat_fast._cuda")
    _missing = ""
except ImportError as error:  # not built, or built for another interpreter
    _extension = None
    _missing = str(error)

_DTYPES = (torch.float32, torch.float64)

#: A tensor as the extension takes it: address, bytes of a number, shape, strides.
Array = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def missing() -> str:
    """Why the kernels cannot run; empty if they can."""
    if _extension is None:
        return _missing
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: one CUDA device, float32 or float64, no autograd."""
    return not missing() and all(
        tensor.device == tensors[0].device
        and tensor.is_cuda
        and tensor.dtype in _DTYPES
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


def module() -> Any:
    """The extension."""
    return _extension


def array(tensor: Tensor) -> Array:
    """A tensor as the extension takes it."""
    return tensor.data_ptr(), tensor.element_size(), tuple(tensor.shape), tensor.stride()


def launch(name: str, where: Tensor, *arguments: Any) -> None:
    """Call a function of the extension on a tensor's device and the stream in use there.

    It makes that device the current one; afterwards it is again the one that was.
    """
    device = where.device
    stream = torch.cuda.current_stream(device).cuda_stream
    given = [array(each) if isinstance(each, Tensor) else each for each in arguments]
    with torch.cuda.device(device):
        getattr(module(), name)(device.index, stream, *given)


def multiprocessors(device: torch.device) -> int:
    """How many blocks of one kind a device runs side by side, for each that fits."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def build_info() -> dict[str, Any]:
    """What was compiled for CUDA: `built`; if not, `reason`; else `compiler`, `runtime` and
    `architectures`, the last of which is there as PTX too, for devices that are newer.
    """
    if _extension is None:
        return {"built": False, "reason": _missing}
    version = int(_extension.runtime)
    return {
        "built": True,
        "compiler": _extension.compiler,
        "runtime": f"{version // 1000}.{version % 1000 // 10}",
        "architectures": [f"sm_{arch}" for arch in _extension.architectures.split()],
    }

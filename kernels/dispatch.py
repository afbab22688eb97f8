"""Which implementation of an operation runs, and which one ran.

Every operation takes `impl=`: `"reference"` (torch; any device and dtype), `"native"` (the compiled
extension; CPU), `"cuda"` (its kernels for GPUs), `"triton"` (kernels for GPUs in Triton) or None,
the choice in force (`using`). The choice `"auto"` is one of these wherever it can take the tensors,
else `"reference"`. Asking for one where it is missing is an error, and what ran is on record:
nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from heat_fast import cuda, gpu, native
from heat_fast.checks import nearest
from heat_fast.errors import ConfigError

#: Operations by name, with the implementations that ran them.
Record = dict[str, set[str]]

#: Dtypes that the attention operations cast to float32 for the extension.
HALF = (torch.bfloat16, torch.float16)

_CHOICE: ContextVar[str] = ContextVar("heat_fast_kernels", default="auto")
_RECORD: ContextVar[Record | None] = ContextVar("heat_fast_kernels_ran", default=None)


@contextmanager
def using(choice: str, device: torch.device) -> Iterator[Record]:
    """Put a choice in force for a model on `device`; the value records what runs.

    `"native"` and `"triton"` then serve wherever they have the operation for the model's dtype.
    """
    if choice == "triton" and (gpu.missing() or device.type != "cuda"):
        found = gpu.missing() or f"the model is on {device.type}"
        raise ConfigError(
            f"kernels='triton' cannot run ({found}): expected Triton and a model on a CUDA device. "
            "Install triton and move the model to the GPU, or use kernels='auto'."
        )
    if choice == "native" and (not native.available() or device.type != "cpu"):
        found = native.missing() or f"the model is on {device.type}"
        raise ConfigError(
            f"kernels='native' cannot run ({found}): expected the compiled extension and a model "
            "on the CPU. Install heat-fast where a C++ compiler is at hand, or use kernels='auto'."
        )
    record: Record = {}
    tokens = _CHOICE.set(choice), _RECORD.set(record)
    try:
        yield record
    finally:
        _CHOICE.reset(tokens[0])
        _RECORD.reset(tokens[1])


def implementation(
    operation: str,
    impl: str | None,
    *tensors: Tensor,
    offers: tuple[str, ...] = ("native",),
    also: tuple[torch.dtype, ...] = (),
) -> str:
    """Which implementation runs an operation on `tensors`: `"reference"` or one of its `offers`.

    `also`: dtypes that the operation casts for the extension, beside float32 and float64. `offers`
    are those that have a kernel for the tensors' layout. Raises `ConfigError` if `impl` names an
    implementation that is not known, or cannot take them.
    """
    if impl is not None and impl not in _IMPLEMENTATIONS:
        raise ConfigError(
            f"{operation} with impl={impl!r}: expected one of {', '.join(_IMPLEMENTATIONS)}, or "
            f"None for the choice in force. {nearest(impl, _IMPLEMENTATIONS)}"
        )
    choice = impl if impl is not None else _CHOICE.get()
    serving = {
        "native": lambda: native.serves(*tensors, also=also),
        "cuda": lambda: cuda.serves(*tensors),
        "triton": lambda: gpu.serves(*tensors, asked=choice == "triton"),
    }
    chosen = "reference"
    for name in offers:
        if choice in ("auto", name) and serving[name]():
            chosen = name
    if impl not in (None, "auto", chosen):
        found = ", ".join(sorted({f"{tensor.device.type} {tensor.dtype}" for tensor in tensors}))
        layout = (
            "" if impl in offers else ", and a layout and mix of dtypes that it has a kernel for"
        )
        raise ConfigError(
            f"{operation} with impl={impl!r} cannot take {found}: expected {_EXPECTED[impl]}"
            f"{layout}. Use impl='reference'" + _why(impl)
        )
    note(operation, chosen)
    return chosen


def choice() -> str:
    """The choice in force."""
    return _CHOICE.get()


def note(operation: str, chosen: str) -> None:
    """Put on record what runs an operation."""
    record = _RECORD.get()
    if record is not None:
        record.setdefault(operation, set()).add(chosen)


def told(record: Record) -> dict[str, Any]:
    """What ran each operation and with what, as JSON values."""
    compiled = any("native" in names for names in record.values())
    built = native.build_info() if compiled else {}
    return {
        "kernels": {name: sorted(names) for name, names in sorted(record.items())},
        **{key: built[key] for key in ("instruction_set", "threads") if key in built},
    }


_EXPECTED = {
    "native": "the compiled extension and CPU tensors of float32 or float64 without gradients",
    "cuda": "the compiled CUDA extension and CUDA tensors of float32 or float64 without gradients",
    "triton": "Triton and CUDA tensors of float32, float16 or bfloat16 without gradients",
}

_IMPLEMENTATIONS = ("auto", "reference", *_EXPECTED)


def _why(impl: str) -> str:
    missing = {"native": native, "cuda": cuda, "triton": gpu}[impl].missing()
    return f" ({impl} is missing: {missing})." if missing else "."

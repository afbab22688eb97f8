"""Which implementation of an operation runs, and which one ran.

Every operation takes `impl=`: `"reference"` (torch; any device and dtype), `"native"` (the compiled
extension; CPU) or None, the choice in force (`using`). The choice `"auto"` is `"native"` wherever
the extension can take the tensors, else `"reference"`. Asking for `"native"` where it is missing is
an error, and what ran is on record: nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from heat_fast import native
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

    `"native"` then serves wherever the extension has the operation for the model's dtype.
    """
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


def runs_native(
    operation: str, impl: str | None, *tensors: Tensor, also: tuple[torch.dtype, ...] = ()
) -> bool:
    """Whether the extension runs an operation on `tensors`; raises `ConfigError` if it cannot.

    `also`: dtypes that the operation casts, beside float32 and float64.
    """
    choice = impl if impl is not None else _CHOICE.get()
    chosen = choice != "reference" and native.serves(*tensors, also=also)
    if impl == "native" and not chosen:
        found = ", ".join(sorted({f"{tensor.device.type} {tensor.dtype}" for tensor in tensors}))
        raise ConfigError(
            f"{operation} with impl='native' cannot take {found}: expected the compiled extension "
            "and CPU tensors of float32 or float64 without gradients. Use impl='reference'"
            + (f" (the extension is missing: {native.missing()})." if native.missing() else ".")
        )
    record = _RECORD.get()
    if record is not None:
        record.setdefault(operation, set()).add("native" if chosen else "reference")
    return chosen

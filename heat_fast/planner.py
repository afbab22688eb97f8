"""How much to run at once: token rows per batch, and what happens when memory runs out.

On a CPU batches of about 512 token rows are fastest: larger temporaries leave the cache. On a GPU
the budget follows from the memory that is free and the model's shape. When an allocation fails the
budget is halved and the batch tried again; nothing that was computed is lost.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# The C library that this process runs on, where it can be asked.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

CPU_ROWS = 512

# The C library gives freed memory back to the system, page by page, and every use of it then
# faults the pages in again, unless it has seen a large block come and go. The largest that counts.
_LARGEST_HEAP_BLOCK = (32 << 20) - 4096
_LARGEST = 1 << 16


@dataclass
class Budget:
    """Token rows per batch; halves itself when memory runs out. `halvings` counts how often."""

    rows: int
    halvings: int = 0

    def batch(self, rows_each: int, most: int) -> int:
        """How many sequences of `rows_each` rows fit, at least one, at most `most`."""
        return max(1, min(most, self.rows // max(1, rows_each)))

    def shrink(self) -> None:
        """Halve the budget after a batch did not fit."""
        self.rows = max(1, self.rows // 2)
        self.halvings += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def keep_heap() -> None:
    """Let the C library keep the memory of a batch's temporaries for the next batch.

    glibc raises its thresholds for returning memory when a block that it had mapped is freed; one
    block of the largest size that it adapts to is enough for the life of the process. Elsewhere
    this allocates and frees 32 MB.
    """
    torch.empty(_LARGEST_HEAP_BLOCK, dtype=torch.uint8)


def trim_heap() -> None:
    """Give back to the system what is free: the next component uses blocks of other sizes.

    Only glibc can be asked to; elsewhere this does nothing.
    """
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def token_budget(trunk_bytes: int, length: int, device: torch.device, asked: int | None) -> Budget:
    """The budget asked for, or the planner's choice for this device.

    On a GPU a row of a sweep keeps about three times the bytes of a row of the trunk (tangents,
    their temporaries and the products of the way down); half of the free memory is used.
    """
    if asked is not None:
        return Budget(asked)
    if device.type != "cuda":
        return Budget(CPU_ROWS)
    free, _ = torch.cuda.mem_get_info(device)
    each = max(1, 3 * trunk_bytes // max(1, length))
    return Budget(max(CPU_ROWS, min(_LARGEST, free // 2 // each)))


def targets_at_once(trunk_bytes: int) -> int:
    """How many targets' adjoints are kept together: as many as fill 1 GiB, at least one.

    More targets share one tangent sweep up; an adjoint is about as large as the trunk.
    """
    return max(1, (1 << 30) // max(1, trunk_bytes))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )


def run_batches(
    total: int,
    budget: Budget,
    size: Callable[[int], int],
    run: Callable[[int, int], None],
) -> None:
    """Run items `0..total-1` in order, batch by batch.

    `size(first)` is how many items fit from `first` on under the present budget; `run(first, stop)`
    does a batch and must write its result only at its end, so that a failed batch can be repeated.
    """
    first = 0
    while first < total:
        stop = min(total, first + max(1, size(first)))
        fits = True
        try:
            run(first, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or stop - first <= 1:
                raise
            fits = False
        if fits:
            first = stop
        else:  # not within `except`, where the traceback still holds the batch's tensors
            budget.shrink()


def slices(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `0..total-1`."""
    for low in range(0, total, max(1, step)):
        yield slice(low, min(low + step, total))

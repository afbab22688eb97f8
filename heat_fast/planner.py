"""How much to run at once: token rows per batch, and what happens when memory runs out.

On a CPU batches are fastest whose temporaries just fit the cache: 512 token rows of a model of
width 288 or more, up to twice as many of a narrower one (`cpu_rows`). Several batches run side by
side, each on its own share of torch's threads. On a GPU the budget follows from the memory that is
free and the model's shape. When an allocation fails the budget is halved and the batch tried again;
nothing that was computed is lost.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

# The C library that this process runs on, where it can be asked.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

# Rows of a batch on a CPU, at least, and numbers in one of its tensors `[rows, width]`. Timed: up
# to width 128 twice as many rows take 0.5 to 0.7 times as long, at 288 more rows gain nothing.
CPU_ROWS = 512
_CPU_NUMBERS = 512 * 288
# A batch of plain forwards: rows on a GPU, and logits, 256 MB of them in float32.
_GPU_FORWARD_ROWS = 1 << 13
FORWARD_LOGITS = 1 << 26
# Python itself takes a few milliseconds of each batch, one thread at a time.
MOST_WORKERS = 8

Result = TypeVar("Result")

# The C library gives freed memory back to the system, page by page, and every use of it then
# faults the pages in again, unless it has seen a large block come and go. The largest that counts.
_LARGEST_HEAP_BLOCK = (32 << 20) - 4096
_LARGEST = 1 << 16
# glibc's number for the threshold that says when the free end of a heap is given back, and a block
# whose freeing makes it look.
_TRIM_THRESHOLD = -1
_ARENA_BLOCK = 1 << 18


@dataclass
class Budget:
    """Token rows per batch, and how many batches run at once.

    The rows are halved when memory runs out; `halvings` counts how often.
    """

    rows: int
    workers: int = 1
    halvings: int = 0

    def batch(self, rows_each: int, most: int, logits_each: int = 1) -> int:
        """How many sequences of `rows_each` rows fit, at least one, at most `most`.

        `logits_each`: how many logits a sequence makes, where their number may matter.
        """
        fit = min(self.rows // max(1, rows_each), FORWARD_LOGITS // logits_each)
        return max(1, min(most, fit))

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


def trim_heap(workers: int = 1) -> None:
    """Give back to the system what is free: the next component uses blocks of other sizes.

    `workers`: how many threads ran batches side by side; each had an arena of its own. Only glibc
    can be asked to; elsewhere this does nothing.
    """
    if _LIBC is None or not hasattr(_LIBC, "malloc_trim"):
        return
    if workers > 1:
        _trim_arenas(_LIBC, workers)
    _LIBC.malloc_trim(0)


def _trim_arenas(libc: ctypes.CDLL, workers: int) -> None:
    """Give back the free ends, up to 64 MB each, of the arenas that a pool's threads have left.

    `malloc_trim` passes over them. glibc cuts an end off when a block beside it is freed while the
    threshold is below it: by new threads, which take over what earlier ones left.
    """
    everyone = threading.Barrier(workers)  # so that no thread takes two turns

    def turn(_: int) -> None:
        everyone.wait()
        torch.empty(_ARENA_BLOCK, dtype=torch.uint8)

    libc.mallopt(_TRIM_THRESHOLD, _ARENA_BLOCK)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(turn, range(workers)))
    libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_HEAP_BLOCK)


def cpu_rows(width: int) -> int:
    """Token rows of one batch on a CPU, for a model of that width.

    At most twice the least: rows of a sweep hold memory in every block.
    """
    return max(CPU_ROWS, min(2 * CPU_ROWS, _CPU_NUMBERS // width))


def forward_rows(device: torch.device, width: int) -> int:
    """Token rows of one batch of plain forwards, of which nothing but logits is kept."""
    return _GPU_FORWARD_ROWS if device.type == "cuda" else cpu_rows(width)


def runs_alone(length: int, width: int) -> bool:
    """Whether sweeps over contexts of `length` tokens run one at a time on a CPU.

    A long one's tangents are as large as the trunk, and its operations large enough to be shared
    by all threads.
    """
    return length > cpu_rows(width)


def token_budget(
    trunk_bytes: int,
    length: int,
    width: int,
    device: torch.device,
    asked: int | None,
    concurrent: bool,
) -> Budget:
    """The budget asked for, or the planner's choice for this device.

    On a GPU a row of a sweep keeps about three times the bytes of a row of the trunk (tangents,
    their temporaries and the products of the way down); half of the free memory is used. On a CPU
    batches run side by side if several threads may run the model at once (`concurrent`).
    """
    if device.type != "cuda":
        workers = min(torch.get_num_threads(), MOST_WORKERS) if concurrent else 1
        return Budget(asked or cpu_rows(width), workers)
    if asked is not None:
        return Budget(asked)
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for reuse is free as well, or the second prompt would get a smaller budget.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    each = max(1, 3 * trunk_bytes // max(1, length))
    return Budget(max(CPU_ROWS, min(_LARGEST, free // 2 // each)))


def targets_at_once(trunk_bytes: int) -> int:
    """How many targets' adjoints are kept together: as many as fill 1 GiB, at least one.

    More targets share one tangent sweep up; an adjoint is about as large as the trunk.
    """
    return max(1, (1 << 30) // max(1, trunk_bytes))


#: How allocators other than torch's own for GPUs say that they found no room: torch's for CPUs, the
#: CUDA driver under Triton, torch and this package's kernels, and the libraries' workspaces.
_EXHAUSTED = (
    "can't allocate memory",
    "not enough memory",
    "[CUDA]: out of memory",
    "CUDA error: out of memory",
    "could not run: out of memory",
    "_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)


class _Batch(NamedTuple):
    """Items being run: under which budget they were taken, and whether nothing ran beside them."""

    first: int
    stop: int
    rows: int
    alone: bool


def run_batches(
    total: int,
    budget: Budget,
    size: Callable[[int], int],
    run: Callable[[int, int], Result],
    keep: Callable[[int, int, Result], None],
) -> None:
    """Run items `0..total-1`, batch by batch, several batches at once if the budget has workers.

    `size(first)` is how many items fit from `first` on under the present budget. `run(first, stop)`
    does a batch and returns its result; it may be called on another thread, and again after an
    allocation failed, so it must change nothing. `keep(first, stop, result)` is called on this
    thread, in order, once for every item: results do not depend on which batch ends first.
    """
    pending = [(0, total)] if total else []  # ranges still to be run, the next one last
    running: dict[Future[Result], _Batch] = {}
    ready: dict[int, tuple[int, Result]] = {}
    kept, workers = 0, min(budget.workers, total)
    share = -(-total // max(1, workers))  # every worker gets something
    with _submitting(workers) as submit:
        while pending or running:
            while pending and len(running) < workers:
                first, limit = pending.pop()
                stop = min(limit, first + max(1, min(share, size(first))))
                if stop < limit:
                    pending.append((stop, limit))
                batch = _Batch(first, stop, budget.rows, alone=workers == 1)
                running[submit(run, first, stop)] = batch
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                batch = running.pop(future)
                error = future.exception()
                if error is None:
                    ready[batch.first] = batch.stop, future.result()
                    continue
                single = batch.stop - batch.first <= 1
                if not is_out_of_memory(error) or (single and batch.alone):
                    raise error
                # The traceback holds the batch's tensors.
                traceback.clear_frames(error.__traceback__)
                if single:
                    workers = 1  # it may fit when it is alone
                if batch.rows == budget.rows:  # else a batch beside it has already shrunk it
                    budget.shrink()
                pending.append((batch.first, batch.stop))
            while kept in ready:
                stop, result = ready.pop(kept)
                keep(kept, stop, result)
                kept = stop


def collect(
    total: int, budget: Budget, size: Callable[[int], int], run: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """What `run(first, stop)` of `run_batches` returns for all items, in one tensor."""
    parts: list[torch.Tensor] = []
    run_batches(total, budget, size, run, lambda first, stop, found: parts.append(found))
    return torch.cat(parts)


@contextmanager
def _submitting(workers: int) -> Iterator[Callable[..., Future[Any]]]:
    """`submit(run, first, stop)` on a pool of threads that share torch's; at once for one worker.

    Every operation of a small batch would otherwise make all of torch's threads wait for each
    other, thousands of times a second; on a machine with other work that costs many times the
    work itself.
    """
    if workers <= 1:
        yield _at_once
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers,
        thread_name_prefix="heat_fast",
        initializer=torch.set_num_threads,
        initargs=(max(1, threads // workers),),
    )
    try:
        # The choice of kernels is the caller's.
        yield lambda run, first, stop: pool.submit(
            copy_context().run, _in_default_modes, run, first, stop
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # the matrix library's own setting is the process'


def _in_default_modes(run: Callable[[int, int], Result], first: int, stop: int) -> Result:
    """A batch on a new thread, whose torch modes are the defaults."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return run(first, stop)


def _at_once(run: Callable[[int, int], Result], first: int, stop: int) -> Future[Result]:
    """A batch on this thread; an interruption goes straight through."""
    future: Future[Result] = Future()
    try:
        future.set_result(run(first, stop))
    except Exception as error:
        future.set_exception(error)
    return future


def slices(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `0..total-1`."""
    for low in range(0, total, max(1, step)):
        yield slice(low, min(low + step, total))

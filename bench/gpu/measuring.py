"""Seconds by the device's own clock, peak memory of a call, and where this GPU's results lie."""

from __future__ import annotations

import functools
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The results that are kept with the source.
COMMITTED = Path(__file__).resolve().parent.parent / "results"
#: Where new ones go.
RESULTS = Path(os.environ.get("HEAT_FAST_BENCH_RESULTS", COMMITTED))


class Instant:
    """A point on the device's clock; the difference of two is seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Instant) -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def clock() -> Any:
    """Now: by CUDA events where there is a device, else by this process's clock."""
    return Instant() if torch.cuda.is_available() else time.perf_counter()


@functools.cache
def _scratch() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def flush() -> None:
    """Overwrite the second-level cache, where there is a device."""
    if torch.cuda.is_available():
        _scratch().zero_()


def lead(call: Callable[[], Any]) -> float:
    """Seconds of the host's until a call returns, to `hold` the device for before it is timed.

    A kernel of some microseconds is done before the next one is launched: a clock on the device
    would tell the host's time. Held back, the device finds all launches of a call queued.
    """
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    return min(2 * (time.perf_counter() - begin), LONGEST_LEAD)


#: A call that keeps the host for longer than this waits for the device, or is long itself.
LONGEST_LEAD = 0.02
#: Ticks of the fastest device's clock: `hold` holds the others a little longer.
TICKS_PER_SECOND = 2e9


def hold(duration: float) -> None:
    """Keep the device from what is launched next for at least `duration` seconds."""
    if duration and torch.cuda.is_available():
        torch.cuda._sleep(int(duration * TICKS_PER_SECOND))


def seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Median time of a call on the device, the cache flushed before each, after two for warm-up."""
    call()
    ahead = lead(call)
    times = []
    for _ in range(repetitions):
        flush()
        hold(ahead)
        begin = clock()
        call()
        times.append(clock() - begin)
    return statistics.median(times)


def with_peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """A call's value, and the bytes that it allocates at its peak beyond what is held.

    None in their place without a device.
    """
    if not torch.cuda.is_available():
        return call(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = call()
    torch.cuda.synchronize()
    return value, torch.cuda.max_memory_allocated() - before


def difference(expected: Any, found: Any) -> float:
    """The largest difference of two results, as a share of the largest entry.

    `expected` may be of the first heads alone.
    """
    if isinstance(expected, tuple):
        return max(difference(*pair) for pair in zip(expected, found, strict=True))
    found = found[: len(expected)]
    scale = float(expected.abs().max())
    return float((expected.float() - found.float()).abs().max()) / max(scale, 1e-30)


def folder() -> Path:
    """The results of this GPU; in another place than the source's they go on from those there."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    place, committed = RESULTS / name, COMMITTED / name
    if committed.exists() and not place.exists():
        shutil.copytree(committed, place)
    return place

"""What this machine can do at best, measured now: the rates that a share of the floor refers to.

A component's floor is the longer of the times that its FLOPs and its bytes take at these rates (the
roofline model of Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from heat_fast.decoder.product import product


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large matrix product and bytes/s of a copy (read and written)."""

    flop_rate: float
    byte_rate: float

    def floor(self, flops: Mapping[str, int], bytes_moved: Mapping[str, int]) -> dict[str, float]:
        """Least seconds of each component."""
        return {
            name: max(count / self.flop_rate, bytes_moved[name] / self.byte_rate)
            for name, count in flops.items()
        }


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device, in a fraction of a second with the threads that torch uses now.

    Raises what torch raises where the device has no room for 1 GB (on a GPU; 270 MB on a CPU).
    """
    big = device.type == "cuda"
    order = 8192 if big else 1024
    byte_rate = _copy_rate(device, 1 << (28 if big else 25))
    return Ceilings(matmul_rate(device, dtype, (order, order, order)), byte_rate)


def _copy_rate(device: torch.device, count: int) -> float:
    """Bytes/s, read and written, of copying `count` float32 numbers."""
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> float:
    """FLOP/s of a product of `[rows, inner]` with the transpose of `[outer, inner]`.

    Taken as the engine takes it: `decoder/product.py` tells where torch's own is not used.
    """
    rows, inner, outer = sizes
    left = torch.ones(rows, inner, device=device).to(dtype)
    right = torch.ones(outer, inner, device=device).to(dtype)
    return 2 * rows * inner * outer / _seconds(lambda: product(left, right.t()), device)


def _seconds(call: Callable[[], object], device: torch.device, spent: float = 0.1) -> float:
    """The best time of one call, in runs of several calls that take `spent` seconds in all."""
    if device.type == "cuda":
        return _event_seconds(call)
    call()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < spent:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def _event_seconds(call: Callable[[], object]) -> float:
    """The best of ten calls by the device's own clock."""
    times = []
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return float(min(times))

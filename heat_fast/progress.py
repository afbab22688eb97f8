"""Progress of a long run, reported to whoever asked, and the time and work each component took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

#: `(component, done, total)`: called after every batch with the units of work done so far.
Progress = Callable[[str, int, int], None]

#: Called by a component with the number of units it has just finished.
Step = Callable[[int], None]


class Ledger:
    """Seconds per component, counts of work, and progress passed on to a callback."""

    def __init__(self, progress: Progress | None, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {"hvp": 0, "branches": 0, "branch_tokens": 0}
        self._progress = progress
        self._device = device

    @contextmanager
    def component(self, name: str, total: int) -> Iterator[Step]:
        """Time a component of `total` units; the value is called with each number of units done."""
        done = 0

        def step(units: int) -> None:
            nonlocal done
            done += units
            if self._progress is not None:
                self._progress(name, done, total)

        begin = time.perf_counter()
        if self._progress is not None:
            self._progress(name, 0, total)
        yield step
        if self._progress is not None and done < total:  # it took less than it might have
            self._progress(name, total, total)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

"""Progress of a long run: what is told to whoever asked, the bars that show it, and the accounts.

The unit is a floating-point operation of the definition (`heat_fast.work`), so that `done / total`
is a share of a component's time: the cost of a token falls with its position in the prompt, and
counting tokens would promise half the speed at first and twice at last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from heat_fast.config import HeatConfig
from heat_fast.errors import InputError

#: `(component, done, total)`, called when a component begins (`done` is 0) and after every batch.
#:
#: Components are "trunk", "gate", "information" and "curvature", in FLOPs of the definition, and
#: "total", which counts windows (one, unless `window` is set) that are finished altogether. Each
#: component counts over all windows together; `done` never falls and ends at `total`.
#: With `probes="auto"` or `codes="auto"` the curvature's total is an upper bound, and with
#: `coverage` the information's; it falls to the work that is needed as soon as that is known.
#: Otherwise `total` does not change, unless several targets together did not fit into memory.
Progress = Callable[[str, int, int], None]

#: Called by a component with the work that it has just finished.
Step = Callable[[int], None]


class Meter:
    """Work done of the work expected of one component; every change is passed on."""

    def __init__(self, name: str, total: int, progress: Progress | None) -> None:
        self.done = 0
        self.total = total
        self._name = name
        self._progress = progress
        self._tell()

    def __call__(self, work: int) -> None:
        """Count work that is finished."""
        self.done += work
        self.total = max(self.total, self.done)
        self._tell()

    def skip(self, work: int) -> None:
        """Take back work that turned out not to be needed, or add some (negative)."""
        if work:
            self.total -= work
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._name, self.done, self.total)


class Ledger:
    """Seconds per component, counts of work, and progress passed on to a callback.

    `runs`: how many times every component is going to be entered, with the same expectation;
    `swept`: information and curvature, where it is fewer times.
    """

    def __init__(
        self,
        progress: Progress | None,
        device: torch.device,
        runs: int = 1,
        swept: int | None = None,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {"hvp": 0, "branches": 0, "branch_tokens": 0}
        self.workers: dict[str, int] = {}  # batches side by side, per component
        self.probes: list[tuple[int, bool]] = []  # taken, and whether the order was settled
        self._progress = progress
        self._device = device
        self._runs = runs
        self._swept = runs if swept is None else swept
        self._meters: dict[str, Meter] = {}
        self._entered: dict[str, int] = {}

    @property
    def flops(self) -> dict[str, int]:
        """What was done of every component, in the unit of :data:`Progress`."""
        return {name: meter.done for name, meter in self._meters.items() if name != "total"}

    @contextmanager
    def component(self, name: str, total: int) -> Iterator[Meter]:
        """Time a component that expects `total` work; the value is called with what is done."""
        begin = time.perf_counter()
        runs = self._swept if name in ("information", "curvature") else self._runs
        if name not in self._meters:
            self._meters[name] = Meter(name, runs * total, self._progress)
        meter = self._meters[name]
        self._entered[name] = self._entered.get(name, 0) + 1
        yield meter
        to_come = (runs - self._entered[name]) * total
        meter.skip(meter.total - meter.done - to_come)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def reporting(
    progress: Progress | bool | None, config: HeatConfig
) -> AbstractContextManager[Progress | None]:
    """The callback that was asked for: bars (True), the caller's own, or None.

    Raises InputError for anything else.
    """
    if progress is True:
        sampled = "auto" in (config.probes, config.codes)
        screened = config.coverage is not None
        return bars(bounded=["curvature"] * sampled + ["information"] * screened)
    if progress is None or progress is False:
        return nullcontext()
    if not callable(progress):
        raise InputError(
            f"progress is {type(progress).__name__}: expected True, or a callable that takes "
            "(component, done, total). Pass one of them, or leave it out."
        )
    return nullcontext(progress)


@contextmanager
def bars(
    *, bounded: Collection[str] = (), console: Console | None = None
) -> Iterator[Progress | None]:
    """A callback that draws one bar per component, or None where there is nothing to draw on.

    Each bar has the component's name, the share of its work that is done, the time it has taken
    and the time that remains. `bounded`: components whose total is an upper bound, and with it
    the time that remains. Drawn on standard error if that is a terminal or a notebook, unless a
    `console` is given, and removed at the end.

    Example:
        >>> import heat_fast
        >>> from heat_fast.progress import bars
        >>> demo = heat_fast.load_demo_model()
        >>> with bars() as progress:
        ...     result = heat_fast.attribute(demo.model, None, [5, 6], 7, progress=progress)
    """
    if console is None:
        console = Console(stderr=True)
        if not (console.is_jupyter or (sys.stderr is not None and sys.stderr.isatty())):
            yield None
            return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        _Remaining(),
    )
    with RichProgress(*columns, console=console, transient=True, refresh_per_second=4) as drawn:
        tasks: dict[str, Any] = {}

        def update(component: str, done: int, total: int) -> None:
            if component == "total":  # it ends only when everything has: no bar to watch
                return
            if component not in tasks:
                most = component in bounded
                tasks[component] = drawn.add_task(component, total=total, since=None, most=most)
            since = drawn.tasks[tasks[component]].elapsed
            drawn.update(tasks[component], completed=done, total=total, since=since)

        yield update


class _Remaining(ProgressColumn):
    """The time that remains if the rest of the work goes at the speed of what is done.

    rich's own column takes the speed of the last 30 seconds: it knows nothing while a batch takes
    longer than that, and stands still in between.
    """

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """`(elapsed at the last batch) / done * total - elapsed`."""
        since, elapsed = task.fields["since"], task.elapsed
        if task.finished:
            return Text("")
        if not task.completed or not task.total or since is None or elapsed is None:
            return Text("-:--:-- left", style="progress.remaining")
        seconds = round(max(0.0, since / task.completed * task.total - elapsed))
        bound = "at most " if task.fields["most"] else ""
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        text = f"{bound}{hours}:{minutes:02}:{seconds:02} left"
        return Text(text, style="progress.remaining")

"""Batches: every item once, in order, whatever runs side by side, fails for memory or stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import families
from assertions import assert_close
from heat_fast import Attributor, HeatConfig
from heat_fast.decoder import view
from heat_fast.kernels.dispatch import implementation, using
from heat_fast.planner import Budget, cpu_rows, run_batches

each_workers = pytest.mark.parametrize("workers", [1, 3])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch on two threads, so that batches run side by side."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def collect(total: int, budget: Budget, run: Any) -> list[tuple[int, int]]:
    """The batches that were kept; their results are the items themselves."""
    kept = []

    def keep(first: int, stop: int, items: list[int]) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert items == list(range(first, stop))
        kept.append((first, stop))

    run_batches(total, budget, lambda first: budget.batch(1, total - first), run, keep)
    assert [first for first, _ in kept] == [0, *(stop for _, stop in kept[:-1])][: len(kept)]
    assert (kept[-1][1] if kept else 0) == total
    return kept


def items(first: int, stop: int) -> list[int]:
    return list(range(first, stop))


@each_workers
@pytest.mark.parametrize("total", [0, 1, 2, 7, 100])
def test_every_item_once_and_in_order(total: int, workers: int) -> None:
    def run(first: int, stop: int) -> list[int]:
        time.sleep(0.002 * (first % 3))  # later batches end first
        return items(first, stop)

    collect(total, Budget(8, workers), run)


def test_every_worker_gets_something() -> None:
    assert collect(9, Budget(100, workers=3), items) == [(0, 3), (3, 6), (6, 9)]
    assert collect(9, Budget(100, workers=1), items) == [(0, 9)]


@each_workers
def test_a_batch_that_does_not_fit_is_halved_and_run_again(workers: int) -> None:
    def run(first: int, stop: int) -> list[int]:
        if stop - first > 3:
            raise MemoryError
        return items(first, stop)

    budget = Budget(16, workers)
    kept = collect(40, budget, run)
    assert max(stop - first for first, stop in kept) <= 3
    assert (budget.rows, budget.halvings) == (2, 3)


def test_the_last_item_is_tried_alone_before_giving_up() -> None:
    running = threading.Semaphore(1)

    def run(first: int, stop: int) -> list[int]:
        # Room for one batch at a time.
        if not running.acquire(blocking=False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        time.sleep(0.005)
        running.release()
        return items(first, stop)

    collect(12, Budget(1, workers=3), run)


@each_workers
def test_one_item_that_does_not_fit_is_an_error(workers: int) -> None:
    def run(first: int, stop: int) -> list[int]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        collect(5, Budget(8, workers), run)


@each_workers
def test_another_error_ends_the_run_at_once(workers: int) -> None:
    seen = []

    def run(first: int, stop: int) -> list[int]:
        seen.append(first)
        if first >= 2:
            raise ZeroDivisionError(str(first))
        return items(first, stop)

    with pytest.raises(ZeroDivisionError):
        collect(1000, Budget(1, workers), run)
    assert len(seen) < 20
    assert not any(thread.name.startswith("heat_fast") for thread in threading.enumerate())


def test_failed_batches_release_their_memory() -> None:
    import gc
    import weakref

    class Held:
        pass

    alive: list[weakref.ref[Held]] = []

    def run(first: int, stop: int) -> list[int]:
        gc.collect()
        assert all(reference() is None for reference in alive)
        held = Held()
        alive.append(weakref.ref(held))
        if stop - first > 1:
            raise MemoryError
        alive.clear()
        return items(first, stop)

    collect(4, Budget(4), run)


def test_threads_see_the_callers_choices_and_leave_torch_as_it_was(two_threads: None) -> None:
    modes = []

    def run(first: int, stop: int) -> list[int]:
        modes.append((torch.is_grad_enabled(), torch.get_num_threads()))
        implementation("probe", None, torch.zeros(1))
        return items(first, stop)

    with using("reference", torch.device("cpu")) as ran, torch.no_grad():
        collect(6, Budget(1, workers=2), run)
    assert set(modes) == {(False, 1)}
    assert ran == {"probe": {"reference"}}
    assert torch.get_num_threads() == 2


SETTINGS: dict[str, dict[str, Any]] = {
    "block": {"probes": 2},
    "coded": {"estimator": "coded", "codes": 4, "probes": 2},
    "row": {"estimator": "row", "probes": 3},
    "low_rank": {"variant": "lr", "rank": 9, "passes": 2},
    "low_rank_by_token": {"variant": "lr", "rank": 3, "rank_scope": "token"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_batches_side_by_side_change_nothing(
    name: str, settings: dict[str, Any], two_threads: None
) -> None:
    model = families.build(name, torch.float64)
    ids = torch.randint(1, 40, (23,)).tolist()

    def run() -> Any:
        config = HeatConfig(token_budget=40, **settings)
        return Attributor(model, None, config).attribute(ids, [3, 5])

    together = run()
    torch.set_num_threads(1)
    alone = run()
    for component in ("information", "curvature"):
        assert together.metadata["workers"][component] == 2
        assert alone.metadata["workers"][component] == 1
    for part in ("gate", "curvature", "information", "scores"):
        assert_close(part, getattr(alone, part), getattr(together, part), rtol=1e-6)


def test_sweeps_of_a_long_context_run_one_at_a_time(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heat_fast.planner.cpu_rows", lambda width: 8)
    model = families.build("llama", torch.float32)
    config = HeatConfig(estimator="coded", codes=2, probes=1)
    result = Attributor(model, None, config).attribute(list(range(1, 11)), 4)
    assert dict(result.metadata["workers"]) == {"information": 2, "curvature": 1}


def test_a_result_tells_what_its_largest_trunk_kept() -> None:
    model, ids = families.build("llama", torch.float32), list(range(1, 25))

    def kept(ids: list[int], **settings: Any) -> int:
        result = Attributor(model, None, HeatConfig(curvature="none", **settings)).attribute(ids, 4)
        return int(result.metadata["trunk_bytes"])

    assert 0 < kept(ids[:12]) < kept(ids)
    assert kept(ids, window=12, tail=4) == kept(ids[:12])


def test_rows_of_a_batch_keep_its_bytes() -> None:
    """A narrow model takes more rows; a wide one no fewer than what keeps matrices efficient."""
    assert [cpu_rows(width) for width in (32, 144, 288, 4096)] == [1024, 1024, 512, 512]


def test_layers_that_may_keep_state_run_one_batch_at_a_time(two_threads: None) -> None:
    model = families.build("llama", torch.float32)
    assert view(model, 4).concurrent
    layer: nn.Module = model.model.layers[1].mlp.down_proj
    with layer.register_forward_hook(lambda *call: None):
        assert not view(model, 4).concurrent
        result = Attributor(model, None, HeatConfig(probes=1)).attribute([1, 2, 3], 4)
        assert dict(result.metadata["workers"]) == {"information": 1, "curvature": 1}
    assert view(model, 4).concurrent
    with model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *call: None):
        assert not view(model, 4).concurrent


def test_interrupting_one_of_several_threads_leaves_nothing_behind(two_threads: None) -> None:
    model = families.build("llama", torch.float32)

    def interrupt(component: str, done: int, total: int) -> None:
        if component == "curvature" and 0 < done < total:
            raise KeyboardInterrupt

    config = HeatConfig(probes=4, token_budget=8)
    with pytest.raises(KeyboardInterrupt):
        Attributor(model, None, config).attribute(list(range(1, 24)), 4, progress=interrupt)
    assert not any(thread.name.startswith("heat_fast") for thread in threading.enumerate())
    assert torch.get_num_threads() == 2

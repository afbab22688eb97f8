"""Progress is told in floating-point operations, so that its share is a share of the time."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import families
import heat_fast
from heat_fast import InputError
from heat_fast.decoder import view
from heat_fast.decoder.linear import Linear
from heat_fast.progress import bars
from heat_fast.work import Work

LENGTH = 9
PROBES = 2

SETTINGS: dict[str, dict[str, Any]] = {
    "block": {},
    "coded": {"estimator": "coded", "codes": 5},
    "all_codes": {"estimator": "coded", "codes": 99},
    "row": {"estimator": "row"},
    "low_rank": {"variant": "lr", "rank": 7},
    "low_rank_two_passes": {"variant": "lr", "rank": 7, "passes": 2},
    "low_rank_by_token": {"variant": "lr", "rank": 3, "rank_scope": "token"},
    "gauss_newton": {"curvature": "gauss_newton"},
    "grad_squared": {"variant": "gs"},
    "none": {"curvature": "none"},
    "input_path": {"rollout": "input_path"},
    "layers": {"layers": 2, "rollout": "input_path"},
    "many_probes": {"probes": 30, "estimator": "row"},  # the head's Hessian is formed
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
Calls = dict[str, list[tuple[int, int]]]


def record(name: str, targets: int, **settings: Any) -> tuple[Calls, Any]:
    """`(done, total)` of every call, by component, and the result."""
    calls: Calls = {}
    result = heat_fast.attribute(
        families.build(name),
        None,
        families.prompt_ids(name, LENGTH),
        [4, 6, 8][:targets],
        progress=lambda part, done, total: calls.setdefault(part, []).append((done, total)),
        **{"probes": PROBES, **settings},
    )
    return calls, result


class Enumerated:
    """The operations of a Llama, row by row and pair by pair, as `heat_fast.work` defines them."""

    def __init__(self, config: Any, tokens: int, targets: int, swept: int | None) -> None:
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        self.keys = 2 * config.num_key_value_heads * config.head_dim * width
        self.rest = (2 * heads + 3 * config.intermediate_size) * width
        self.count, self.heads, self.width = config.num_attention_heads, heads, width
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.swept = swept or self.layers
        self.tokens, self.targets = tokens, targets
        self.logits = 2 * width * config.vocab_size

    def block(self, start: int, stop: int, query: int, all_keys: int, own_keys: int) -> int:
        """Rows `start..stop-1`, those from `query` on with attention products of `2 H D` each."""
        total = 0
        for row in range(start, stop):
            total += 2 * self.keys
            if row >= query:
                products = all_keys * (row + 1) + own_keys * (row - start + 1)
                total += 2 * self.rest + 2 * self.heads * products
        return total

    def blocks(
        self, start: int, stop: int, query: int, all_keys: int, own_keys: int = 0
    ) -> list[int]:
        """All blocks from the top; the last has queries from row `query` on."""
        low = self.block(start, stop, start, all_keys, own_keys)
        return [self.block(start, stop, query, all_keys, own_keys)] + [low] * (self.layers - 1)

    def expected(self, rollout: str, starts: list[int], probes: int) -> dict[str, list[int]]:
        """The work of every step of a run with one sequence per batch."""
        tokens, targets = self.tokens, self.targets
        stop = tokens + targets - 1
        trunk = [*self.blocks(0, stop, tokens - 1, 2)[::-1], targets * self.logits]
        gate = []
        for visited in range(self.swept):
            rows = targets * (1 if rollout == "value_path" else visited + 1)
            queries = range(tokens - 1 if visited == 0 else 0, stop)
            seen = sum(row + 1 for row in queries)
            flow = 2 * self.count * seen * (self.heads // self.count + rows)
            gate.append(2 * self.heads * self.width * stop + flow)
        # In the first block all rows but the replaced one keep the trunk's queries, keys, values.
        kept = 2 * (self.keys + self.heads * self.width)
        branches = [
            sum(self.blocks(start, stop, tokens - 1, 2)) - kept * (stop - start - 1)
            for start in range(tokens)
        ]
        formed = 2 * probes > self.width
        head_gradient = 2 * self.logits + (2 * self.width * self.logits if formed else 0)
        head = 2 * self.width**2 if formed else 2 * self.logits
        curvature = []
        for end in range(tokens, tokens + targets):
            curvature += [head_gradient, *self.blocks(0, end, end - 1, 5)[: self.swept]]
        for start in starts:
            product = sum(self.blocks(start, stop, tokens - 1, 2, 2)[: self.swept]) + targets * head
            for end in range(tokens, tokens + targets):
                product += sum(self.blocks(start, end, end - 1, 2, 6)[: self.swept])
            curvature.append(product)
        return {
            "trunk": [*trunk, sum(trunk)],
            "gate": gate,
            "information": [*branches, tokens * targets * self.logits],
            "curvature": curvature,
        }


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("name", ["block", "coded", "row", "input_path", "layers", "many_probes"])
def test_every_step_is_the_work_that_it_did(name: str, targets: int) -> None:
    """One sequence per batch; the work of its rows and pairs is counted one by one."""
    settings = SETTINGS[name]
    calls, _ = record("llama", targets, token_budget=1, **settings)
    starts = {
        "coded": [0] * 5 * PROBES,
        "row": [0] * PROBES,
        "many_probes": [0] * 30,
    }.get(name, [token for token in range(LENGTH) for _ in range(PROBES)])
    config = families.build("llama").config
    oracle = Enumerated(config, LENGTH, targets, settings.get("layers"))
    expected = oracle.expected(settings.get("rollout", "value_path"), starts, len(starts))
    for component, work in expected.items():
        done = [done for done, _ in calls[component]]
        assert done[0] == 0
        assert [after - before for before, after in pairwise(done)] == work, component
        assert {total for _, total in calls[component]} == {sum(work)}, component


@every_setting
@pytest.mark.parametrize(("name", "targets"), [("llama", 3), ("gemma2", 1), ("gpt_neox", 2)])
def test_progress_goes_from_nothing_to_all(
    name: str, settings: dict[str, Any], targets: int
) -> None:
    """It rises to a total known from the start; batches only join the steps of single items."""
    single, result = record(name, targets, token_budget=1, **settings)
    joined, _ = record(name, targets, token_budget=40, **settings)
    assert set(single) == {"total", "trunk", "gate", "information", "curvature"}
    assert set(result.metadata["seconds"]) == set(single)
    for component, calls in single.items():
        for run in (calls, joined[component]):
            done = [step for step, _ in run]
            assert done == sorted(set(done)), component
            assert done[0] == 0 and done[-1] == run[-1][1], component
            assert {total for _, total in run} == {calls[0][1]}, component
        assert {step for step, _ in joined[component]} <= {step for step, _ in calls}
    assert single["total"] == [(0, 1), (1, 1)]
    cost = heat_fast.cost.flops(
        view(families.build(name), LENGTH + targets - 1),
        LENGTH,
        targets,
        heat_fast.HeatConfig(**{"probes": PROBES, **settings}),
    )
    for component in ("gate", "information", "curvature"):
        assert cost[component] == single[component][-1][1], component
        assert cost[component] == result.metadata["flops"][component], component


def test_heads_taken_one_by_one_count_as_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = record("llama", 2, rollout="input_path", curvature="none")
    monkeypatch.setattr("heat_fast.gate.ROLLOUT_ELEMENTS", 1)
    split, actual = record("llama", 2, rollout="input_path", curvature="none")
    assert split["gate"][-1] == whole["gate"][-1]
    assert len(split["gate"]) - 1 == 2 * (len(whole["gate"]) - 1)  # two key-value heads
    torch.testing.assert_close(actual.gate, expected.gate, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"probes": "auto", "confidence": 0.01, "top_k": 2},
        {"estimator": "coded", "codes": "auto"},
        {"estimator": "coded", "codes": "auto", "probes": "auto", "probes_max": 9},
        {"estimator": "row", "probes": "auto", "confidence": 0.9999, "probes_max": 16},
    ],
    ids=["probes", "codes", "both", "row"],
)
def test_an_automatic_total_is_a_bound_that_falls_to_what_was_needed(
    settings: dict[str, Any],
) -> None:
    calls, result = record("llama", 2, token_budget=1, **settings)
    steps = calls["curvature"]
    done, totals = [step[0] for step in steps], [step[1] for step in steps]
    assert done == sorted(done) and totals == sorted(totals, reverse=True)
    assert done[-1] == totals[-1]
    # The same work by numbers of probes and codes that are known beforehand.
    work = Work(view(families.build("llama"), LENGTH + 1), LENGTH, 2)
    products = result.metadata["counts"]["hvp"] // 2
    adjoints = sum(sum(work.adjoint(target)) for target in (0, 1))
    most = heat_fast.curvature.product_count(
        heat_fast.HeatConfig(**{"probes": PROBES, **settings}), LENGTH, work.width
    )
    starts = range(LENGTH) if settings.get("estimator") is None else [0]
    each = products // len(starts)
    spent = sum(each * work.product([0, 1], most, start) for start in starts)
    assert done[-1] == adjoints + 2 * work.head_gradient(most) + spent


def test_the_automatic_total_of_a_low_rank_approximation_falls_too() -> None:
    """To the work of the same number of probes, known beforehand."""
    lenient = {"probes": "auto", "confidence": 0.01, "top_k": 2}
    calls, _ = record("llama", 2, variant="lr", rank=7, **lenient)
    totals = [total for _, total in calls["curvature"]]
    fixed = heat_fast.HeatConfig(variant="lr", rank=7, probes=heat_fast.curvature.FIRST_PROBES)
    decoder = view(families.build("llama"), LENGTH + 1)
    assert calls["curvature"][-1][0] == totals[-1] < totals[0]
    assert totals[-1] == heat_fast.cost.flops(decoder, LENGTH, 2, fixed)["curvature"]


class Counter(TorchDispatchMode):
    """torch's own count of the operations that were run."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


@pytest.mark.parametrize(("name", "estimator"), [("llama", "block"), ("phi3", "coded")])
def test_the_share_done_is_the_share_that_torch_counts(name: str, estimator: str) -> None:
    """At every step of information and curvature.

    torch counts the masked half of attention too, up to twice what is its share a here: the shares
    then differ by at most a.
    """
    model, ids = families.build(name), families.prompt_ids(name, 24)
    seen: dict[str, list[tuple[int, int, int]]] = {}
    with Counter() as counter:
        heat_fast.attribute(
            model,
            None,
            ids,
            5,
            probes=1,
            token_budget=1,
            kernels="reference",  # whose products torch sees
            progress=lambda part, *at: seen.setdefault(part, []).append((*at, counter.total)),
            **SETTINGS[estimator],
        )
    work = Work(view(model, 24), 24, 1)
    plain = 2 * sum(sizes.shared + sizes.queried for sizes in work.shapes[:-1]) * 24
    attention = 1 - plain / (work.trunk() - work.logits)
    for component in ("information", "curvature"):
        first, last = seen[component][0][2], seen[component][-1][2]
        for done, total, counted in seen[component]:
            assert abs(done / total - (counted - first) / (last - first)) <= attention, component


def test_a_layer_that_does_not_tell_its_width_is_asked() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 7)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.inner(self.dropout(x))
            return output

    layer = Linear(Odd())
    state = torch.get_rng_state()
    assert layer.out_features(torch.zeros(1, 5)) == 7
    assert torch.equal(torch.get_rng_state(), state)


# --- the bars -----------------------------------------------------------------------------------


class Clock:
    """A clock that a test turns by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def drawn(bounded: tuple[str, ...] = ()) -> Iterator[Any]:
    """The callback, the clock and, at last, what the console holds."""
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, get_time=clock)
    with bars(bounded=bounded, console=console) as progress:
        yield progress, clock
    yield file.getvalue()


def shown_last(text: str, component: str) -> str:
    """The bar of a component as it was drawn last."""
    return [line for line in text.splitlines() if component in line][-1]


def test_a_bar_tells_share_elapsed_and_remaining_time() -> None:
    """A quarter took 10 s, so 30 s are left then, and 28 s two seconds later."""
    steps = drawn()
    progress, clock = next(steps)
    progress("information", 0, 4_000)
    clock.now = 10.0
    progress("information", 1_000, 4_000)
    clock.now = 12.0
    last = shown_last(next(steps), "information")
    assert "25%" in last
    assert "0:00:12" in last and "0:00:28 left" in last


def test_a_bar_survives_batches_of_hours_and_a_total_that_falls() -> None:
    """15 units took four hours; of what was a hundred, 30 are needed."""
    steps = drawn()
    progress, clock = next(steps)
    progress("curvature", 0, 100)
    clock.now = 7_200.0
    progress("curvature", 10, 100)
    clock.now = 14_400.0
    progress("curvature", 15, 100)
    progress("curvature", 15, 30)
    last = shown_last(next(steps), "curvature")
    assert "50%" in last and "4:00:00 left" in last


def test_a_bar_of_a_bound_says_at_most() -> None:
    steps = drawn(bounded=("curvature",))
    progress, clock = next(steps)
    progress("total", 0, 1)
    progress("information", 0, 10)
    progress("curvature", 0, 100)
    clock.now = 7_200.0
    progress("information", 5, 10)
    progress("curvature", 25, 100)
    text = next(steps)
    assert "at most 6:00:00 left" in shown_last(text, "curvature")
    assert " 2:00:00 left" in shown_last(text, "information").replace("\x1b[36m", " ")
    assert "at most" not in shown_last(text, "information")
    assert "total" not in text


def test_a_bar_before_its_first_batch_promises_nothing() -> None:
    steps = drawn()
    progress, clock = next(steps)
    progress("gate", 0, 10)
    clock.now = 5.0
    assert "-:--:-- left" in next(steps)


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def as_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be called by the test itself: between a fixture and it, pytest sets its own streams."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def attribute(**settings: Any) -> Any:
    ids = families.prompt_ids("llama", LENGTH)
    return heat_fast.attribute(families.build("llama"), None, ids, 4, probes=1, **settings)


def test_bars_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = as_terminal(monkeypatch)
    quiet = attribute()
    assert terminal.getvalue() == ""
    shown = attribute(progress=True)
    assert torch.equal(quiet.scores, shown.scores)
    for component in ("trunk", "gate", "information", "curvature"):
        assert component in terminal.getvalue()


def test_bars_draw_nothing_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    attribute(progress=True)
    assert stream.getvalue() == ""


def test_an_interrupted_bar_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cursor is shown again, and the streams are the caller's."""
    terminal = as_terminal(monkeypatch)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heat_fast.pipeline.information", interrupt)
    output = sys.stdout
    with pytest.raises(KeyboardInterrupt):
        attribute(progress=True)
    assert sys.stdout is output and sys.stderr is terminal
    text = terminal.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("progress", ["yes", 1])
def test_progress_of_another_type_is_refused(progress: Any) -> None:
    with pytest.raises(InputError, match="expected True, or a callable"):
        attribute(progress=progress)

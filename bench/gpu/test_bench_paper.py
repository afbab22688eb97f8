"""The paper's tables of runtime (9, 10, 12 and 15 to 18) on this GPU, random weights, bfloat16.

The rows, models and settings are those of `paper_floor.py`. A component that does not end within
`SAMPLE` seconds is stopped, and its time is what was done, in counted FLOPs, multiplied up: such
components are named in `sampled`. A model that does not fit keeps its first blocks alone; its times
are multiplied by the FLOPs of the whole model over those of what was run, and `blocks` says so.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paper_floor import A100, MODELS, TABLES
from sizes import SMALL, size
from transformers import AutoModelForCausalLM

from heat_fast import Attributor, HeatConfig
from heat_fast.ceilings import Ceilings
from heat_fast.cost import bytes_moved, flops
from heat_fast.decoder import view

SAMPLE = 0.2 if SMALL else 4.0
# Memory is the same in the next batches.
GLANCE = SAMPLE / 8
DTYPE = torch.bfloat16
#: Token rows that share one reading of the weights, in the floor's bytes.
ROWS_OF_A_BATCH = 4096
#: The share of the device's free memory that a model may take.
ROOM = 0.7

ROWS = [
    pytest.param(model, tokens, settings, seconds / examples, id=f"{number}-{name}")
    for number, model, tokens, examples, lines in TABLES
    for name, seconds, settings in lines
]


class Enough(Exception):
    """A sample of a component has been taken."""


class Sample:
    """A progress callback: seconds spent in each component, and what was done of it.

    Windows come one after the other, so a component's time is the sum over its visits: that between
    two reports is of the component which makes the second, unless that has only begun again.
    """

    def __init__(self, stop_at: str, limit: float) -> None:
        self.stop_at, self.limit = stop_at, limit
        #: Per component: seconds, FLOPs done, FLOPs in all, whether it was stopped.
        self.found: dict[str, tuple[float, int, int, bool]] = {}
        self._before: tuple[str, float] = "", 0.0

    def __call__(self, component: str, done: int, total: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        visited, before = self._before
        self._before = component, now
        if component == "total":
            return
        seconds = self.found.get(component, (0.0,))[0]
        if visited == component:
            seconds += now - before
        stopped = component == self.stop_at and seconds > self.limit and done < total
        self.found[component] = seconds, done, total, stopped
        if stopped:
            raise Enough


def measured(
    model: Any, ids: list[int], config: HeatConfig, limit: float = SAMPLE
) -> dict[str, tuple[float, bool]]:
    """Seconds of each component, and whether they were multiplied up from a sample."""
    parts: dict[str, tuple[float, bool]] = {}
    # Information first, alone; then curvature, past a few branches of the information.
    for last, settings in (
        ("information", config.replace(curvature="none", estimator="block", codes="auto")),
        ("curvature", config.replace(coverage=0.01)),
    ):
        sample = Sample(last, limit)
        with contextlib.suppress(Enough):
            Attributor(model, None, settings).attribute(ids, 7, progress=sample)
        for component, (seconds, done, total, stopped) in sample.found.items():
            if component not in parts and not (last == "information" and component == "curvature"):
                parts[component] = seconds * total / max(1, done), stopped
    return parts


@pytest.fixture(scope="module")
def models() -> Iterator[Callable[[str, torch.device], tuple[Any, int]]]:
    """`models(name, device)`: a model of random weights and its blocks; one at a time."""
    held: dict[str, tuple[Any, int]] = {}

    def make(name: str, device: torch.device) -> tuple[Any, int]:
        if name not in held:
            held.clear()
            gc.collect()
            config = tiny(MODELS[name]) if SMALL else MODELS[name]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                config = fitting(config, torch.cuda.mem_get_info()[0])
            torch.manual_seed(0)
            with device:
                model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
            held[name] = model, config.num_hidden_layers
        return held[name]

    yield make
    held.clear()


def changed(config: Any, **fields: Any) -> Any:
    """The configuration with other sizes."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def fitting(config: Any, free: int) -> Any:
    """The configuration with as many blocks as take `ROOM` of the free bytes."""
    sizes = []
    for blocks in (1, 2):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                changed(config, num_hidden_layers=blocks), dtype=DTYPE
            )
        sizes.append(sum(each.nbytes for each in model.parameters()))
    block = sizes[1] - sizes[0]
    most = int((ROOM * free - (sizes[0] - block)) // block)
    return changed(config, num_hidden_layers=min(config.num_hidden_layers, most))


def tiny(config: Any) -> Any:
    """The same architecture, small enough for any machine."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 500,
        "pad_token_id": None,
    }
    some = {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16, "rotary_dim": 8}
    some = {name: value for name, value in some.items() if getattr(config, name, None)}
    return changed(config, **sizes, **some)


@pytest.mark.parametrize(("name", "tokens", "settings", "paper_seconds"), ROWS)
def test_row(
    name: str,
    tokens: int,
    settings: dict[str, Any],
    paper_seconds: float,
    models: Callable[[str, torch.device], tuple[Any, int]],
    device: torch.device,
    ceilings: Callable[[torch.dtype], Ceilings],
    timed: Callable[..., Any],
    peak: Callable[[Callable[[], Any]], tuple[Any, int | None]],
    row: dict[str, Any],
) -> None:
    """Seconds per example with one probe, beside the paper's and the floor."""
    model, blocks = models(name, device)
    tokens = size(tokens)
    chosen = {key: value for key, value in settings.items() if key != "variant"}
    if SMALL:
        chosen |= {"window": tokens // 2, "tail": 8} if "window" in chosen else {}
        chosen |= {"layers": 1} if "layers" in chosen else {}
        chosen |= {"rank": 4} if "rank" in chosen else {}
    config = HeatConfig.preset(settings["variant"], probes=1, **chosen)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(500, (tokens,), generator=generator).tolist()
    warm = Attributor(model, None, config.replace(coverage=0.01))
    warm.attribute(ids[: max(8, tokens // 8)], 7)  # kernels are compiled and tuned
    parts = timed(lambda: measured(model, ids, config), rounds=1, warmup=0)
    with torch.device("meta"):
        whole = view(AutoModelForCausalLM.from_config(MODELS[name]), tokens)
    here = view(model, tokens)
    run, all_blocks = flops(here, tokens, 1, config), flops(whole, tokens, 1, config)
    moved = bytes_moved(here, tokens, 1, config, ROWS_OF_A_BATCH)
    ceiling = ceilings(DTYPE)
    # Blocks that were left out are paid for in proportion to their FLOPs.
    shares = {part: 1.0 if SMALL else all_blocks[part] / max(1, run[part]) for part in parts}
    seconds = {part: taken * shares[part] for part, (taken, _) in parts.items()}
    floor = ceiling.floor(run, moved)
    total = sum(seconds.values())
    row.update(
        model=name,
        tokens=tokens,
        settings=settings,
        blocks=[blocks, MODELS[name].num_hidden_layers],
        seconds={**seconds, "total": total},
        sampled=[part for part, (_, stopped) in parts.items() if stopped],
        paper_seconds=paper_seconds,
        floor_seconds={part: floor[part] * shares[part] for part in parts},
        share_of_floor=sum(floor[part] * shares[part] for part in parts) / total,
        a100_seconds=sum(all_blocks.values()) / A100,
        flops=all_blocks,
        ceilings={"flop_rate": ceiling.flop_rate, "byte_rate": ceiling.byte_rate},
        peak_bytes=peak(lambda: measured(model, ids, config, GLANCE))[1],
    )
    assert total > 0

"""``heat-fast bench``: an attribution of a given length on the user's own model, measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heat_fast.cli import options
from heat_fast.cli.common import check_places, megabytes, standard_output, write_json
from heat_fast.cli.models import load_model
from heat_fast.config import HeatConfig
from heat_fast.memory import forget_peak, resident

if TYPE_CHECKING:
    import torch


def bench(
    config: HeatConfig,
    debug: bool,
    model: options.Model = None,
    tokens: options.Tokens = 128,
    targets: options.Targets = 1,
    repeat: Annotated[
        int, typer.Option(metavar="N", min=1, help="Runs; the fastest is shown.")
    ] = 1,
    json_path: options.Json = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Attribute random tokens and tell seconds, FLOPs, bytes and memory, beside what they must be.

    A component's floor is the longer of the times that its FLOPs and its bytes take at the rates of
    a large matrix product and a copy, measured in the same process.

    Example: heat-fast bench --model ./my-model --tokens 256 --estimator coded --probes 4
    """
    check_places({"--json": json_path}, streams=("--json",))
    loaded = load_model(model, device, dtype, debug=debug)
    values = _measure(loaded.model, tokens, targets, config, repeat)
    if json_path is not None:
        write_json(values, json_path)
    if json_path != "-":
        with standard_output():
            _print(values)


def _measure(
    model: Any, tokens: int, targets: int, config: HeatConfig, repeat: int
) -> dict[str, Any]:
    import torch

    from heat_fast.attributor import Attributor
    from heat_fast.ceilings import measure
    from heat_fast.cost import estimate
    from heat_fast.forward import vocabularies

    told = estimate(model, tokens, targets, config)
    embed = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(config.seed)
    # A vocabulary may have fewer outputs than embeddings; a prompt may repeat a token.
    vocabulary, outputs = vocabularies(model)
    ids = torch.randint(vocabulary, (tokens + targets,), generator=generator).tolist()
    goals = [each % outputs for each in ids[tokens:]]
    attributor = Attributor(model, None, config)
    attributor.attribute(ids[: min(tokens, 8)], goals[:1])  # the first run pays for caches
    runs = []
    for _ in range(repeat):
        before = _start_of_peak(embed.device)
        metadata: Any = attributor.attribute(ids[:tokens], goals).metadata
        runs.append((metadata["seconds"], _peak(embed.device, before)))
    seconds = min((each for each, _ in runs), key=lambda each: float(each["total"]))
    ceilings = measure(embed.device, embed.dtype)
    # What coverage, say, left out was not done, nor were its bytes moved: the same share of them.
    flops = {name: min(most, metadata["flops"].get(name, 0)) for name, most in told.flops.items()}
    moved = {
        name: round(count * flops[name] / told.flops[name]) if told.flops[name] else count
        for name, count in told.bytes_moved.items()
    }
    floor = ceilings.floor(flops, moved)
    peaks = [peak for _, peak in runs if peak is not None]
    return {
        "tokens": tokens,
        "targets": targets,
        "seconds": dict(seconds),
        "flops": flops,
        "bytes_moved": moved,
        "ceilings": asdict(ceilings),
        "floor_seconds": {**floor, "total": sum(floor.values())},
        "estimated_seconds": told.seconds,
        "peak_bytes": max(peaks) if peaks else None,
        "estimated_peak_bytes": told.peak_bytes,
        "device": metadata["device"],
        "dtype": metadata["dtype"],
        "counts": dict(metadata["counts"]),
        "implementation": dict(metadata["implementation"]),
        "versions": dict(metadata["versions"]),
    }


# --- memory ---------------------------------------------------------------------------------------


def _start_of_peak(device: torch.device) -> int | None:
    """What is in use, with the record of the most forgotten; None where that cannot be done."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resident("VmRSS") if forget_peak() else None


def _peak(device: torch.device, before: int | None) -> int | None:
    """The most that was in use beyond `before`, bytes."""
    import torch

    if before is None:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return max(0, resident("VmHWM") - before)


# --- the table ------------------------------------------------------------------------------------


def _print(values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    seconds, floor = values["seconds"], values["floor_seconds"]
    flops, moved = (
        {**values[name], "total": sum(values[name].values())} for name in ("flops", "bytes_moved")
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("component", "seconds", "share", "FLOPs", "bytes", "GFLOP/s", "of the floor"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for name, count in flops.items():
        took = seconds.get(name, 0.0)
        speed = f"{count / took / 1e9:.3g}" if took else "-"
        share = f"{took / seconds['total']:.0%}" if seconds["total"] else "-"
        reached = f"{floor[name] / took:.0%}" if took else "-"
        cells = (name, f"{took:.3f}", share, f"{count:.3g}", f"{moved[name]:.3g}", speed, reached)
        table.add_row(*map(Text, cells))
    console = Console()
    console.print(table)
    peak, told = values["peak_bytes"], values["estimated_seconds"]
    console.print(
        f"\n{values['tokens']:,} prompt and {values['targets']:,} target tokens, "
        f"{values['device']} {values['dtype']}, {values['counts']['hvp']:,} products\n"
        f"floor: {values['floor_seconds']['total']:.3g} s at "
        f"{values['ceilings']['flop_rate'] / 1e9:,.0f} GFLOP/s and "
        f"{values['ceilings']['byte_rate'] / 1e9:,.1f} GB/s, measured here\n"
        f"estimated beforehand: {told:.3g} s, {megabytes(values['estimated_peak_bytes'])} beyond "
        "the model\n"
        f"most memory beyond the model: {'unknown' if peak is None else megabytes(peak)}",
        highlight=False,
    )

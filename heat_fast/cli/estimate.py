"""``heat-fast estimate``: what an attribution costs, beforehand."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from heat_fast.cli import options
from heat_fast.cli.common import check_places, megabytes, standard_output, write_json
from heat_fast.cli.models import load_model
from heat_fast.config import HeatConfig

if TYPE_CHECKING:
    from heat_fast.cost import Estimate


def estimate(
    config: HeatConfig,
    debug: bool,
    model: options.Model = None,
    tokens: options.Tokens = 512,
    targets: options.Targets = 1,
    time: Annotated[
        bool, typer.Option("--time/--no-time", help="Time a short prompt to tell seconds too.")
    ] = True,
    json_path: options.Json = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Tell products, FLOPs, memory and seconds of an attribution before it is run.

    Example: heat-fast estimate --model ./my-model --tokens 1024 --variant gs
    """
    check_places({"--json": json_path}, streams=("--json",))
    loaded = load_model(model, device, dtype, debug=debug)
    from heat_fast.cost import estimate as tell

    told = tell(loaded.model, tokens, targets, config, calibrate=time)
    if json_path is not None:
        write_json({**dataclasses.asdict(told), "total_flops": told.total_flops}, json_path)
    if json_path != "-":
        with standard_output() as stream:
            stream.write(_words(told, config))


def _words(told: Estimate, config: HeatConfig) -> str:
    screens = (config.coverage, config.branch_tolerance, config.window and config.window_tolerance)
    fewer = any(each is not None for each in screens)
    most = "at most " if fewer or "auto" in (config.probes, config.codes) else ""
    lines = {
        "Hessian-vector products": f"{most}{told.hvp:,}",
        "masked prompts": f"{'at most ' if fewer else ''}{told.branches:,} of "
        f"{told.branch_tokens:,} tokens",
        **{f"FLOPs, {name}": f"{value:.3g}" for name, value in told.flops.items()},
        "FLOPs in all": f"{most}{told.total_flops:.3g}",
        "bytes moved, at least": f"{sum(told.bytes_moved.values()):.3g}",
        "memory beyond the model": megabytes(told.peak_bytes),
        "time": "not timed" if told.seconds is None else f"{most}about {told.seconds:.3g} s",
    }
    width = max(map(len, lines))
    return "".join(f"{name:{width}}  {value}\n" for name, value in lines.items())

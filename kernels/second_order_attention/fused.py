"""Both tangents in kernels that keep a tile in registers from its scores to its sums.

For float16 and bfloat16, heads up to 128 wide. Two kernels own a tile of the rows of `[Q, G]` of
one key-value head, for a group of probes, and walk over the keys: they make `O.` and `Q_.`. A third
owns a tile of keys and walks over the rows: `K_.` and `V_.`. Every number is written by one
program: no atomics, and the same result in every run. A tile's `P`, `dP` and `dS` are formed once
for the program's probes.

What a row's tangents are centred by, `m = rowsum(P o S.)`, is known only after its last key. Both
row kernels sum with another centre `n`, near it where the first tile holds most of the weight (the
first token of a context often does), and put it right at the end, as `P` and `dS` are the primal's:

    sum_j P. X + P X. = sum_j (P o (S. - n)) X + P X. - (m - n) sum_j P X

`m - n` is `rowsum(P o (S. - n))`, less `n` times what a row of `P` lacks of 1 (a sink's share).
The kernel of the keys is handed `m`, `D` and `D.` of every row.

The kernels are in `tangent.py` and `adjoint.py`, what they share in `primitives.py`, the sizes that
they are shipped with in `tiles.py`; here they are launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from heat_fast import gpu
from heat_fast.kernels.branch_attention.native import heads_like
from heat_fast.kernels.branch_attention.triton import REGISTERS, compiled_options, padded
from heat_fast.kernels.compile import Variant
from heat_fast.kernels.second_order_attention import tiles
from heat_fast.kernels.second_order_attention.adjoint import (
    adjoint_rows_kernel,
    adjoint_tangent_keys_kernel,
    adjoint_tangent_rows_kernel,
    shift_tangent_kernel,
)
from heat_fast.kernels.second_order_attention.reference import Primal
from heat_fast.kernels.second_order_attention.tangent import attention_tangent_kernel

#: What of `compiled_options` is compiled with a sink as well: gpt-oss.
SUNK = ("bf16", 64, True)

#: The widest head whose rows and their sums fit into registers.
WIDEST = 128


def _rows_first(x: Tensor) -> Tensor:
    """`[Hk, ..., G, Q, D] -> [Hk, ..., Q, G, D]`, contiguous: the rows that a program owns."""
    return x.transpose(-2, -3).contiguous()


def _trunk(primal: Primal) -> list[Tensor]:
    """Query, key and value as the kernels take them."""
    return [_rows_first(primal.query), primal.key.contiguous(), primal.value.contiguous()]


def _statistics(primal: Primal) -> tuple[Tensor, Tensor]:
    """Normaliser and share of the sink, `[Hk, Q, G]`; where there is none it is never read."""
    normaliser = primal.normaliser.transpose(-1, -2).contiguous()
    if primal.sunk is None:
        return normaliser, normaliser
    return normaliser, primal.sunk.transpose(-1, -2).contiguous()


def _sizes(primal: Primal, batch: int) -> tuple[float, ...]:
    heads, group, queries, _ = primal.query.shape
    masking, stop = primal.masking, primal.key.shape[1]
    window, softcap = masking.window or 0, masking.softcap or 0.0
    places = (primal.start, stop, window)
    return heads, batch, group, queries, *places, masking.scale, softcap


def _constants(width: int, tile: tiles.Tile, windowed: bool, capped: bool) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return {
        "WIDTH": width,
        "PADDED": padded(width),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PROBES": tile.probes,
        "WINDOWED": windowed,
        "CAPPED": capped,
    }


def _launch(primal: Primal, tile: tiles.Tile) -> dict[str, Any]:
    """Those constants, and how many threads run a program."""
    masking, width = primal.masking, primal.query.shape[-1]
    windowed, capped = masking.window is not None, masking.softcap is not None
    return _constants(width, tile, windowed, capped) | {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": REGISTERS,
    }


def attention_tangent(primal: Primal, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the reference; summed in float32."""
    heads, batch, group, queries, width = query.shape
    result = heads_like(query, width)
    tile = tiles.of(tiles.TANGENT, query.device, width)
    normaliser, sunk = _statistics(primal)
    blocks = triton.cdiv(queries * group, tile.rows) * triton.cdiv(batch, tile.probes)
    with gpu.on(query):
        attention_tangent_kernel[(blocks * heads,)](
            *_trunk(primal),
            _rows_first(primal.output),
            _rows_first(query),
            key.contiguous(),
            value.contiguous(),
            result,
            normaliser,
            sunk,
            *result.stride()[:-1],
            *_sizes(primal, batch),
            SUNK=primal.sunk is not None,
            **_launch(primal, tile),
        )
    return result


def attention_adjoint_tangent(
    primal: Primal,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    output_bar: Tensor,
    output_bar_dot: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, summed in float32; results of the given dtype."""
    heads, batch, group, queries, width = query.shape
    count = queries * group
    trunk, (normaliser, sunk) = _trunk(primal), _statistics(primal)
    primal_output, query, output, output_bar, output_bar_dot = (
        _rows_first(x) for x in (primal.output, query, output, output_bar, output_bar_dot)
    )
    key, value = key.contiguous(), value.contiguous()
    shift, pulled = (
        torch.empty(heads, count, *last, dtype=torch.float32, device=query.device)
        for last in ((), (width,))
    )
    shift_dot, mean = shift.new_empty(2, heads, batch, count)
    results = [torch.empty_like(x, dtype=dtype) for x in (query, key, value)]
    moved = [output_bar, query, key, value, output_bar_dot]
    sizes = _sizes(primal, batch)
    with gpu.on(query):
        tile = tiles.of(tiles.PRIMAL, query.device, width)
        adjoint_rows_kernel[(triton.cdiv(count, tile.rows) * heads,)](
            *trunk,
            primal_output,
            output_bar,
            normaliser,
            shift,
            pulled,
            *sizes,
            **_launch(primal, tile),
        )
        shift_tangent_kernel[(triton.cdiv(count, tiles.SHIFT_ROWS) * heads * batch,)](
            primal_output,
            output_bar,
            output,
            output_bar_dot,
            shift_dot,
            heads,
            batch,
            count,
            WIDTH=width,
            PADDED=padded(width),
            ROWS=tiles.SHIFT_ROWS,
        )
        tile = tiles.of(tiles.ROWS, query.device, width)
        blocks = triton.cdiv(count, tile.rows) * triton.cdiv(batch, tile.probes)
        adjoint_tangent_rows_kernel[(blocks * heads,)](
            *trunk,
            *moved,
            results[0],
            normaliser,
            shift,
            pulled,
            shift_dot,
            mean,
            sunk,
            *sizes,
            SUNK=primal.sunk is not None,
            **_launch(primal, tile),
        )
        tile = tiles.of(tiles.KEYS, query.device, width)
        blocks = triton.cdiv(key.shape[2], tile.columns) * triton.cdiv(batch, tile.probes)
        adjoint_tangent_keys_kernel[(blocks * heads,)](
            *trunk,
            *moved,
            *results[1:],
            normaliser,
            shift,
            shift_dot,
            mean,
            *sizes,
            **_launch(primal, tile),
        )
    return results[0].transpose(-2, -3), results[1], results[2]


def options() -> Iterator[tuple[str, int, bool]]:
    """What of `compiled_options` these kernels serve."""
    for dtype, width, masked in compiled_options():
        if dtype != "fp32" and width <= WIDEST:
            yield dtype, width, masked


def variants(capability: int) -> Iterator[Variant]:
    """Every kernel as it is launched on an architecture."""
    kernels = (
        (attention_tangent_kernel, tiles.TANGENT),
        (adjoint_rows_kernel, tiles.PRIMAL),
        (adjoint_tangent_rows_kernel, tiles.ROWS),
        (adjoint_tangent_keys_kernel, tiles.KEYS),
    )
    served = [(option, False) for option in options()] + [(SUNK, True)]
    for kernel, table in kernels:
        names = kernel.arg_names
        numbers = names.index("heads")
        floats = ("normaliser", "shift", "pulled", "shift_dot", "mean", "sunk")
        for (dtype, width, masked), sunk in served:
            if sunk and "SUNK" not in names:
                continue
            tile = tiles.of(table, capability, width)
            label = f"{dtype} D {width}{', masked' if masked else ''}{', sink' if sunk else ''}"
            yield Variant(
                kernel,
                label,
                {
                    **dict.fromkeys(names[:numbers], f"*{dtype}"),
                    **{name: "*fp32" for name in floats if name in names},
                    **{name: "i32:16" for name in names if name.startswith("result_")},
                    **dict.fromkeys(names[numbers : names.index("scale")], "i32"),
                    "scale": "fp32",
                    "softcap": "fp32",
                },
                _constants(width, tile, masked, masked)
                | ({"SUNK": sunk} if "SUNK" in names else {}),
                tile.warps,
                tile.stages,
                {"maxnreg": REGISTERS},
            )
    names = shift_tangent_kernel.arg_names
    for dtype, width, masked in options():
        if masked:
            yield Variant(
                shift_tangent_kernel,
                f"{dtype} D {width}",
                {
                    **dict.fromkeys(names[:4], f"*{dtype}"),
                    "shift_dot": "*fp32",
                    **dict.fromkeys(names[5:8], "i32"),
                },
                {"WIDTH": width, "PADDED": padded(width), "ROWS": tiles.SHIFT_ROWS},
            )

"""The GPU kernels against unfused torch, at the shapes of real models.

Bytes and FLOPs are counted from the shapes (each kernel's README); their rates are shares of
ceilings that are measured in the same process: a copy of 1 GB, and a matrix product of order 8192
in the inputs' dtype. Peak memory is what a call allocates beyond its inputs. `ratio` is eager's
time over the kernel's; eager is the plain formula, which `cases.py` spells out, or the reference;
for second-order attention it is autograd's double backward through attention written out, timed on
as many heads as fit and multiplied: heads are independent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attention_cases
import cases
import pytest
import torch
from measuring import difference, seconds, with_peak
from sizes import SMALL

from heat_fast.ceilings import Ceilings

OPERATIONS = {
    "second_order_attention": attention_cases.second_order,
    "branch_attention": attention_cases.branches,
    "attention_flow": cases.flow,
    "value_output_norms": cases.value_norms,
    "masked_kl": cases.divergence,
    "dense_probes": cases.dense_probes,
    "coded_reduction": cases.coded,
    "row_norms": cases.norms_of_rows,
    "low_rank_block_norms": cases.low_rank_norms,
}
#: Of these the eager formula is compiled too, at one length: it takes long to start.
FORMULAS = ("attention_flow", "value_output_norms", "masked_kl")
COMPILED_AT = cases.LENGTHS[len(cases.LENGTHS) // 2]
#: What models in float32 are served by as well.
IN_FLOAT32 = ("second_order_attention", "branch_attention")
ROUNDS, EAGER_ROUNDS = (1, 1) if SMALL else (15, 5)

RUNS = [
    (operation, model, length, cases.HALF)
    for length in cases.LENGTHS
    for operation in OPERATIONS
    for model in cases.MODELS
] + [
    (operation, model, COMPILED_AT, "float32") for operation in IN_FLOAT32 for model in cases.MODELS
]


@pytest.mark.parametrize(("operation", "model", "length", "dtype"), RUNS)
def test_kernel(
    operation: str,
    model: str,
    length: int,
    dtype: str,
    device: torch.device,
    ceilings: Callable[[torch.dtype], Ceilings],
    timed: Callable[..., Any],
    row: dict[str, Any],
    benchmark: Any,
) -> None:
    """Seconds, ratio to eager, shares of the ceilings, peak memory, and agreement."""
    torch.manual_seed(0)
    inputs = cases.Inputs(device, getattr(torch, dtype))
    case = OPERATIONS[operation](cases.MODELS[model], length, inputs)
    ceiling = ceilings(inputs.dtype)
    found = timed(case.kernel, rounds=ROUNDS, held=True)
    taken = benchmark.stats.stats.median
    kept: dict[str, Any] = {
        "operation": operation,
        "model": model,
        "length": length,
        "dtype": dtype,
        "seconds": taken,
        "bytes": case.bytes,
        "flops": case.flops,
        "ceilings": {"bytes": ceiling.byte_rate, "flops": ceiling.flop_rate},
        "share_of_bytes": case.bytes / taken / ceiling.byte_rate,
        "share_of_flops": case.flops / taken / ceiling.flop_rate or None,
        "peak_bytes": with_peak(case.kernel)[1],
    }
    try:
        differs = difference(case.eager(), found)
        kept |= {
            "error": differs,
            "eager_seconds": case.share * seconds(case.eager, EAGER_ROUNDS),
            "eager_peak_bytes": case.share * (with_peak(case.eager)[1] or 0) or None,
        }
        kept["ratio"] = kept["eager_seconds"] / taken
    except torch.OutOfMemoryError:
        differs, kept["eager"] = 0.0, "out of memory"
    torch.cuda.empty_cache()
    assert differs <= case.rtol
    row.update(kept)


@pytest.mark.parametrize("model", cases.MODELS)
@pytest.mark.parametrize("operation", FORMULAS)
def test_compiled(
    operation: str,
    model: str,
    device: torch.device,
    timed: Callable[..., Any],
    row: dict[str, Any],
    benchmark: Any,
) -> None:
    """The eager formula through `torch.compile`."""
    if device.type != "cuda":
        pytest.skip("torch.compile's kernels are timed on a GPU")
    torch.manual_seed(0)
    inputs = cases.Inputs(device, getattr(torch, cases.HALF))
    case = OPERATIONS[operation](cases.MODELS[model], COMPILED_AT, inputs)
    timed(torch.compile(case.eager, dynamic=False), rounds=EAGER_ROUNDS, held=True)
    row.update(
        operation=f"{operation}, torch.compile",
        model=model,
        length=COMPILED_AT,
        dtype=cases.HALF,
        seconds=benchmark.stats.stats.median,
    )

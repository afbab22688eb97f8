"""The GPU kernels against unfused PyTorch, at the shapes of real models.

    python bench/gpu/kernels.py                  all operations, models and lengths
    python bench/gpu/kernels.py --quick          one length, fewer repetitions

Times are medians of CUDA events with the second-level cache flushed before every call. Bytes and
FLOPs are counted from the shapes (each kernel's README); their rates are shares of ceilings that
are measured in the same run: a copy of 1 GB, and a matrix product of order 8192 in the inputs'
dtype. Peak memory is what a call allocates beyond its inputs. `ratio` is eager's time over the
kernel's; eager is the plain formula, which the module spells out, or the reference. An operation
that fails is reported, and the others still run. Writes `bench/results/<gpu>/kernels.json` and
`kernels.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import folder, peak_bytes, seconds
from torch import Tensor

from heat_fast.kernels import masked_kl, rademacher, value_norm_rollout
from heat_fast.kernels.branch_attention import Masking
from heat_fast.kernels.low_rank import block_norms


@dataclass(frozen=True)
class Model:
    """The shapes that count: width, query heads, key-value heads, head width, vocabulary."""

    name: str
    width: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int


MODELS = [
    Model("GPT-J-6B", 4096, 16, 16, 256, 50400),
    Model("Qwen2.5-3B", 2048, 16, 2, 128, 151936),
    Model("Phi-3-medium", 5120, 40, 10, 128, 32064),
    Model("Llama-3.1-70B", 8192, 64, 8, 128, 128256),
]
LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True)
class Case:
    """One operation at one shape: the kernel, eager PyTorch, and what the kernel has to do."""

    kernel: Callable[[], Any]
    eager: Callable[[], Any]
    bytes: float
    flops: float
    rtol: float
    compiled: Callable[[], Any] | None = None


def ceilings_of(repetitions: int) -> dict[str, float]:
    """Bytes/s of a copy and FLOP/s of a large matrix product."""
    pair = torch.zeros(2, 1 << 28, dtype=torch.float32, device="cuda")
    found = {"bytes": pair.nbytes / seconds(lambda: pair[0].copy_(pair[1]), repetitions)}
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(8192, 8192, device="cuda").to(dtype)
        taken = seconds(lambda matrix=matrix: matrix @ matrix, repetitions)
        found[str(dtype).removeprefix("torch.")] = 2 * 8192**3 / taken
    return found


def value_norms(model: Model, length: int, dtype: torch.dtype) -> Case:
    """`|V W_O|_1`: eager takes one product per head, as a plain implementation would."""
    group = model.heads // model.key_heads
    value = torch.randn(model.key_heads, length, model.head, device="cuda").to(dtype)
    weight = torch.randn(model.width, model.heads * model.head, device="cuda").to(dtype)

    def eager() -> Tensor:
        parts = weight.unflatten(1, (model.key_heads, group, model.head))
        norms = [
            (value[head] @ parts[:, head, member].t()).float().abs().sum(-1)
            for head in range(model.key_heads)
            for member in range(group)
        ]
        return torch.stack(norms).view(model.key_heads, group, length)

    def kernel() -> Tensor:
        return value_norm_rollout.value_output_norms(value, weight, torch.float32, impl="triton")

    moved = value.nbytes + weight.nbytes + 4 * model.heads * length
    flops = 2.0 * length * model.width * model.heads * model.head
    return Case(kernel, eager, moved, flops, 1e-2)


def flow(model: Model, length: int, dtype: torch.dtype) -> Case:
    """The column sweep of one target, over a block whose every row counts."""
    group = model.heads // model.key_heads
    shape = model.key_heads, group, length, model.head
    query = torch.randn(shape, device="cuda").to(dtype)
    key = torch.randn(model.key_heads, length, model.head, device="cuda").to(dtype)
    rho = torch.rand(1, length, device="cuda")
    masking = Masking(model.head**-0.5)
    hidden = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)

    def scores() -> Tensor:
        raw = (query.flatten(1, 2) @ key.mT).float() * masking.scale
        return raw.view(*shape[:2], length, length).masked_fill(hidden, float("-inf"))

    normaliser = scores().logsumexp(-1)

    def eager() -> Tensor:
        return rho @ (scores() - normaliser[..., None]).exp()

    def kernel() -> Tensor:
        return value_norm_rollout.attention_flow(
            query, key, normaliser, rho, masking, impl="triton"
        )

    moved = query.nbytes + key.nbytes + 4 * length * (2 * model.heads + 1)
    flops = 2.0 * model.heads * model.head * length * (length + 1) / 2
    return Case(kernel, eager, moved, flops, 2e-2, torch.compile(eager, dynamic=False))


def divergence(model: Model, length: int, dtype: torch.dtype) -> Case:
    """As many branches as tokens, from final hidden states."""
    branches = length
    hidden = torch.randn(branches, model.width, device="cuda").to(dtype) / model.width**0.5
    weight = torch.randn(model.vocabulary, model.width, device="cuda").to(dtype)
    trunk = (hidden[:1] @ weight.t()).float()
    log_probs, normaliser = trunk.log_softmax(-1), trunk.logsumexp(-1)
    target = torch.tensor([7], device="cuda")
    step = 1 << 15

    def eager() -> tuple[Tensor, Tensor]:
        log_q = (hidden @ weight.t()).float().log_softmax(-1)
        drop = log_probs[:, target] - log_q[:, target]
        return (log_probs.exp() * (log_probs - log_q)).sum(-1, keepdim=True), drop

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        for low in range(0, model.vocabulary, step):
            part = slice(low, min(low + step, model.vocabulary))
            yield part, (hidden @ weight[part].t())[:, None]

    def kernel() -> tuple[Tensor, Tensor]:
        return masked_kl.masked_kl_streamed(log_probs, normaliser, chunks(), target, impl="triton")

    logits = 2 * branches * model.vocabulary
    moved = weight.nbytes + hidden.nbytes + 2 * logits + log_probs.nbytes
    flops = 2.0 * branches * model.vocabulary * model.width
    return Case(kernel, eager, moved, flops, 2e-2)


def dense_probes(model: Model, length: int, dtype: torch.dtype) -> Case:
    """Coded probes written into the tangent buffer, 8 at a time."""
    samples = torch.zeros(1, dtype=torch.int64, device="cuda")
    codes = torch.arange(8, device="cuda")
    arguments = length, length, model.width, dtype, codes

    def call(impl: str) -> Tensor:
        return rademacher.dense_probes(0, samples, *arguments, impl=impl)

    moved = 8 * length * model.width * dtype.itemsize
    return Case(lambda: call("triton"), lambda: call("reference"), moved, 0, 0)


def coded(model: Model, length: int, dtype: torch.dtype) -> Case:
    """Un-signing and the moments of 8 codes' products."""
    rows = torch.randn(8, length, model.width, device="cuda").to(dtype)
    codes = torch.arange(8, device="cuda")

    def call(impl: str) -> tuple[Tensor, Tensor, Tensor]:
        sums = rademacher.coded_sums(rows, codes, length, impl=impl)
        return rademacher.coded_moments(*sums, 8, 4096, impl=impl)

    moved = rows.nbytes + 4 * 4 * length * model.width
    return Case(lambda: call("triton"), lambda: call("reference"), moved, 0, 1e-3)


def norms_of_rows(model: Model, length: int, dtype: torch.dtype) -> Case:
    """`|x|_1` of the rows of 8 dense products."""
    rows = torch.randn(8, length, model.width, device="cuda").to(dtype)

    def call(impl: str) -> Tensor:
        return rademacher.row_norms(rows, impl=impl)

    moved = rows.nbytes + 4 * 8 * length
    return Case(lambda: call("triton"), lambda: call("reference"), moved, 0, 1e-3)


def low_rank_norms(model: Model, length: int, dtype: torch.dtype) -> Case:
    """Block norms of 10 probes from factors of rank 64, in float32 whatever the model's dtype."""
    vectors = torch.randn(length, model.width, 64, device="cuda") / (length * model.width) ** 0.5
    values = torch.randn(1, 64, device="cuda")
    samples = torch.arange(10, device="cuda")

    def call(impl: str) -> Tensor:
        return block_norms(vectors, values, 0, samples, impl=impl)

    moved = vectors.nbytes + 4 * 10 * length
    flops = 4.0 * 10 * 64 * length * model.width
    return Case(lambda: call("triton"), lambda: call("reference"), moved, flops, 1e-3)


OPERATIONS: dict[str, Callable[[Model, int, torch.dtype], Case]] = {
    "value_output_norms": value_norms,
    "attention_flow": flow,
    "masked_kl": divergence,
    "dense_probes": dense_probes,
    "coded_reduction": coded,
    "row_norms": norms_of_rows,
    "low_rank_block_norms": low_rank_norms,
}


def error(expected: Any, found: Any) -> float:
    """The largest difference of two results, as a share of the largest entry."""
    if isinstance(expected, tuple):
        return max(error(*pair) for pair in zip(expected, found, strict=True))
    scale = float(expected.abs().max())
    return float((expected.float() - found.float()).abs().max()) / max(scale, 1e-30)


def measured(
    case: Case, ceilings: dict[str, float], dtype: torch.dtype, repetitions: int, compiled: bool
) -> dict[str, Any]:
    """Times, memory and rates of one case."""
    top = ceilings[str(dtype).removeprefix("torch.")]
    few = max(3, repetitions // 3)
    taken = seconds(case.kernel, repetitions)
    found: dict[str, Any] = {
        "seconds": taken,
        "bytes": case.bytes,
        "flops": case.flops,
        "share_of_bytes": case.bytes / taken / ceilings["bytes"],
        "share_of_flops": case.flops / taken / top,
        "peak_bytes": peak_bytes(case.kernel),
    }
    try:
        differs = error(case.eager(), case.kernel())
        eager = seconds(case.eager, few)
        found |= {
            "eager_seconds": eager,
            "ratio": eager / taken,
            "eager_peak_bytes": peak_bytes(case.eager),
            "error": differs,
            "agrees": differs <= case.rtol,
        }
    except torch.OutOfMemoryError:
        found["eager"] = "out of memory"
        torch.cuda.empty_cache()
    if compiled and case.compiled is not None:
        found["compiled_seconds"] = seconds(case.compiled, few)
    return found


_COLUMNS = ("ms", "eager ms", "ratio", "% bytes", "% FLOPs", "MB", "eager MB", "error")


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    ceilings = ", ".join(f"{name} {value:.3g}/s" for name, value in report["ceilings"].items())
    lines = [
        f"# GPU kernels on {report['gpu']}\n",
        f"torch {report['torch']}, triton {report['triton']}; ceilings measured in the same run: "
        f"{ceilings}. By `bench/gpu/kernels.py`, which tells what the columns mean.\n",
        "| operation | model | N | dtype | " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * (4 + len(_COLUMNS)),
    ]
    for row in report["rows"]:
        where = f"| {row['operation']} | {row['model']} | {row['length']} | {row['dtype']} |"
        if "failure" in row:
            lines.append(f"{where} failed: {row['failure']} |" + " |" * (len(_COLUMNS) - 1))
            continue
        met = "eager" not in row
        cells = (
            f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * row['eager_seconds']:.3f}" if met else row["eager"],
            f"{row['ratio']:.1f}" if met else "",
            f"{100 * row['share_of_bytes']:.0f}",
            f"{100 * row['share_of_flops']:.0f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['eager_peak_bytes'] / 1e6:.1f}" if met else "",
            f"{row['error']:.1e}" + ("" if row["agrees"] else " (!)") if met else "",
        )
        lines.append(f"{where} " + " | ".join(cells) + " |")
    compiled = [row for row in report["rows"] if "compiled_seconds" in row]
    if compiled:
        lines.append("\n`torch.compile` of the eager formula, ms:\n")
        lines += [
            f"- {row['operation']}, {row['model']}, N = {row['length']}: "
            f"{1e3 * row['compiled_seconds']:.3f}"
            for row in compiled
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what was asked for; 1 if something failed or disagrees."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="N = 1024 alone, few repetitions")
    parser.add_argument("--length", type=int, action="append", help="lengths, by default all")
    parser.add_argument("--op", action="append", choices=list(OPERATIONS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow to start)")
    parser.add_argument("--seconds", type=float, default=200, help="start no case after this time")
    parser.add_argument("--out", type=Path, help="folder to write to")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the kernels are timed on a GPU")
    import triton

    began = time.monotonic()
    torch.manual_seed(0)
    repetitions = 5 if chosen.quick else 15
    dtype = getattr(torch, chosen.dtype)
    ceilings = ceilings_of(repetitions)
    if chosen.dtype == "float16":
        ceilings["float16"] = ceilings["bfloat16"]
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": ceilings,
        "rows": [],
    }
    print({name: f"{value:.3g}" for name, value in ceilings.items()}, flush=True)
    place = chosen.out or folder()
    place.mkdir(parents=True, exist_ok=True)
    bad = 0
    for length in chosen.length or ((1024,) if chosen.quick else LENGTHS):
        for operation in chosen.op or OPERATIONS:
            for model in MODELS:
                if time.monotonic() - began > chosen.seconds:
                    print(f"left out for lack of time: {operation} {model.name} {length}")
                    continue
                row: dict[str, Any] = {
                    "operation": operation,
                    "model": model.name,
                    "length": length,
                    "dtype": chosen.dtype,
                }
                try:
                    case = OPERATIONS[operation](model, length, dtype)
                    row |= measured(case, ceilings, dtype, repetitions, chosen.compile)
                    bad += not row.get("agrees", True)
                    print(
                        f"{operation} {model.name} {length}: {1e3 * row['seconds']:.3f} ms, "
                        f"x{row.get('ratio', 0):.1f}, {100 * row['share_of_bytes']:.0f}% bytes, "
                        f"{100 * row['share_of_flops']:.0f}% FLOPs, "
                        f"error {row.get('error', 0):.1e}",
                        flush=True,
                    )
                except Exception as failure:  # the other operations' figures are still wanted
                    row["failure"] = f"{type(failure).__name__}: {str(failure)[:200]}"
                    traceback.print_exc(limit=3)
                    bad += 1
                report["rows"].append(row)
                case = None  # its tensors, before the next ones are made
                torch.cuda.empty_cache()
        (place / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
        (place / "kernels.md").write_text(table(report))
    print(f"{len(report['rows'])} cases, {bad} failed or disagree; written to {place}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

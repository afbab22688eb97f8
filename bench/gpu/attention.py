"""Second-order and branch attention on a GPU against PyTorch's math path.

    python bench/gpu/attention.py                   all models and lengths, in under two minutes
    python bench/gpu/attention.py --dtype float32 --length 1024

The math path of second order is autograd's: attention written out, its gradient with
`create_graph`, and one double backward per probe for the tangent of the adjoint (a probe's tangent
of the output is the gradient of the gradient's product with a dummy adjoint). Its primal graph is
built once and shared by all probes, as ours is. It is timed on as many heads as fit
(`heads_timed`) and multiplied: heads are independent. Branch attention is held against the
reference with whole matrices in place of tiles.

Times are medians of CUDA events with the second-level cache flushed; FLOPs are counted as in the
READMEs of the operations, and their rate is a share of a matrix product's of order 8192 in the same
dtype and run. Peak memory is what a call allocates beyond its inputs. Writes
`bench/results/<gpu>/attention.json` and `attention.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import folder, peak_bytes, seconds
from torch import Tensor

from heat_fast.kernels.branch_attention import Masking, branch_attention
from heat_fast.kernels.branch_attention import reference as branch_reference
from heat_fast.kernels.second_order_attention import (
    Primal,
    attention_adjoint_tangent,
    attention_tangent,
)

#: Name: query heads, key-value heads, head width.
MODELS = {
    "GPT-J-6B": (16, 16, 256),
    "Qwen2.5-3B": (16, 2, 128),
    "Phi-3-medium": (40, 10, 128),
    "Llama-3.1-70B": (64, 8, 128),
}
LENGTHS = (512, 1024, 2048)
#: The math path keeps about this many matrices of scores for a head; it is given this much memory.
MATRICES, BUDGET = 60, 24 << 30


def math_path(primal: Primal, dots: list[Tensor], bar: Tensor, bar_dot: Tensor) -> list[Tensor]:
    """`O.`, `Q_.`, `K_.`, `V_.` of every probe by double backward through attention written out."""
    length, masking = primal.key.shape[1], primal.masking
    inputs = [x.detach().requires_grad_() for x in (primal.query, primal.key, primal.value)]
    adjoint = bar.detach().requires_grad_()
    hidden = torch.ones(length, length, dtype=torch.bool, device=bar.device).triu(1)
    scores = inputs[0] @ inputs[1][:, None].mT * masking.scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    output = weights @ inputs[2][:, None]
    pulled = torch.autograd.grad(output, inputs, adjoint, create_graph=True)
    results: list[list[Tensor]] = []
    for probe in range(dots[0].shape[1]):
        # <pulled, dot> + <output, bar_dot>: its gradient in the adjoint is O., in the inputs X_.
        moved = [pulled[i] for i in range(3)]
        seeds = [dot[:, probe] for dot in dots]
        found = torch.autograd.grad(
            [*moved, output],
            [adjoint, *inputs],
            [*seeds, bar_dot[:, probe]],
            retain_graph=True,
        )
        results.append(list(found))
    return [torch.stack(parts, 1) for parts in zip(*results, strict=True)]


def second_order(
    shape: tuple[int, int, int], length: int, probes: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Tangent and tangent of the adjoint together, as one Hessian-vector product takes them."""
    heads, key_heads, width = shape
    group = heads // key_heads

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda").to(dtype)

    query, bar = normal(key_heads, group, length, width), normal(key_heads, group, length, width)
    key, value = normal(key_heads, length, width), normal(key_heads, length, width)
    masking = Masking(width**-0.5)
    none = key[:, :0]
    output, normaliser = branch_attention(
        query[:, None], key[:, None], value[:, None], none, none, masking, impl="triton"
    )
    primal = Primal(query, key, value, normaliser[:, 0], output[:, 0], 0, masking)
    dots = [
        normal(key_heads, probes, group, length, width),
        normal(key_heads, probes, length, width),
        normal(key_heads, probes, length, width),
    ]
    bar_dot = normal(key_heads, probes, group, length, width)

    def tangent() -> Tensor:
        return attention_tangent(primal, *dots, impl="triton")

    moved = tangent()

    def adjoint() -> tuple[Tensor, ...]:
        return attention_adjoint_tangent(primal, *dots, moved, bar, bar_dot, impl="triton")

    pairs = heads * length * (length + 1) / 2
    up, down = seconds(tangent, 7), seconds(adjoint, 7)
    ours = max(peak_bytes(tangent), peak_bytes(adjoint))
    found: dict[str, Any] = {
        "tangent_seconds": up,
        "adjoint_tangent_seconds": down,
        "tangent_flops": 2 * width * pairs * (1 + 4 * probes),
        "adjoint_tangent_flops": 2 * width * pairs * (2 + 10 * probes),
        "peak_bytes": ours,
    }
    each = MATRICES * group * length * length * dtype.itemsize
    timed = max(1, min(key_heads, BUDGET // each))
    while key_heads % timed:
        timed -= 1
    part = Primal(
        query[:timed],
        key[:timed],
        value[:timed],
        normaliser[:timed, 0],
        output[:timed, 0],
        0,
        masking,
    )
    arguments = part, [x[:timed] for x in dots], bar[:timed], bar_dot[:timed]
    try:
        theirs = math_path(*arguments)
        mine = [x[:timed] for x in (moved, *adjoint())]
        errors = [
            float((x.float() - y.float()).abs().max() / x.float().abs().max().clamp(min=1e-30))
            for x, y in zip(theirs, mine, strict=True)
        ]
        del theirs, mine
        share = key_heads // timed
        math_seconds = seconds(lambda: math_path(*arguments), 3) * share
        math_peak = peak_bytes(lambda: math_path(*arguments)) * share
        found |= {
            "heads_timed": timed * group,
            "math_seconds": math_seconds,
            "math_peak_bytes": math_peak,
            "ratio": math_seconds / (up + down),
            "memory_ratio": math_peak / max(ours, 1),
            "differences": errors,
        }
    except torch.OutOfMemoryError:
        found["math"] = "out of memory"
    return found


def branches(
    shape: tuple[int, int, int], length: int, count: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Branches that share the first half of the context."""
    heads, key_heads, width = shape
    group, own = heads // key_heads, length // 2
    query = torch.randn(key_heads, count, group, own, width, device="cuda").to(dtype)
    pair = torch.randn(2, key_heads, count, own, width, device="cuda").to(dtype)
    below = torch.randn(2, key_heads, length - own, width, device="cuda").to(dtype)

    def call(impl: str) -> tuple[Tensor, Tensor]:
        return branch_attention(query, *pair, *below, Masking(width**-0.5), impl=impl)

    def whole() -> tuple[Tensor, Tensor]:
        before = branch_reference.TILE_ELEMENTS
        branch_reference.TILE_ELEMENTS = 1 << 60
        try:
            return call("reference")
        finally:
            branch_reference.TILE_ELEMENTS = before

    taken = seconds(lambda: call("triton"), 7)
    ours = peak_bytes(lambda: call("triton"))
    seen = own * (length - own) + own * (own + 1) / 2
    found = {
        "tangent_seconds": taken,
        "tangent_flops": 4.0 * heads * count * width * seen,
        "peak_bytes": ours,
    }
    try:
        found |= {"math_seconds": seconds(whole, 3), "math_peak_bytes": peak_bytes(whole)}
        found["ratio"] = found["math_seconds"] / taken
        found["memory_ratio"] = found["math_peak_bytes"] / max(ours, 1)
    except torch.OutOfMemoryError:
        found["math"] = "out of memory"
    return found


OPERATIONS = {"second_order_attention": second_order, "branch_attention": branches}


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"# Attention on {report['gpu']}\n",
        f"torch {report['torch']}, triton {report['triton']}, {report['dtype']}, "
        f"{report['probes']} probes or branches. A matrix product of order 8192 ran at "
        f"{report['ceiling'] / 1e12:.0f} TFLOP/s in the same run. By `bench/gpu/attention.py`.\n",
        "| operation | model | N | ms | math path ms | ratio | TFLOP/s | % of product | MB | "
        "math path MB | ratio |",
        "|" + "---|" * 11,
    ]
    for row in report["rows"]:
        start = f"| {row['operation']} | {row['model']} | {row['length']} | "
        if "failure" in row:
            lines.append(f"{start}failed: {row['failure']} |" + " |" * 7)
            continue
        taken = row["tangent_seconds"] + row.get("adjoint_tangent_seconds", 0.0)
        rate = (row["tangent_flops"] + row.get("adjoint_tangent_flops", 0.0)) / taken
        known = "math_seconds" in row
        lines.append(
            start
            + f"{1e3 * taken:.2f} | "
            + (f"{1e3 * row['math_seconds']:.2f} | {row['ratio']:.1f} | " if known else "- | - | ")
            + f"{rate / 1e12:.0f} | {100 * rate / report['ceiling']:.0f} | "
            + f"{row['peak_bytes'] / 1e6:.0f} | "
            + (
                f"{row['math_peak_bytes'] / 1e6:.0f} | {row['memory_ratio']:.1f} |"
                if known
                else "- | - |"
            )
        )
    return "\n".join(lines) + "\n"


def run(
    dtype: torch.dtype = torch.bfloat16,
    probes: int = 4,
    lengths: tuple[int, ...] = LENGTHS,
    limit: float = 110.0,
) -> dict[str, Any]:
    """Time everything; no case is started after `limit` seconds."""
    import triton

    began = time.monotonic()
    torch.manual_seed(0)
    matrix = torch.randn(8192, 8192, device="cuda").to(dtype)
    ceiling = 2 * 8192**3 / seconds(lambda: matrix @ matrix, 7)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "probes": probes,
        "ceiling": ceiling,
        "rows": [],
    }
    # The longest first: they are what the targets are about.
    for length in sorted(lengths, reverse=True):
        for operation, measure in OPERATIONS.items():
            for model, shape in MODELS.items():
                row: dict[str, Any] = {"operation": operation, "model": model, "length": length}
                if time.monotonic() - began > limit:
                    row["failure"] = "left out for lack of time"
                else:
                    try:
                        row |= measure(shape, length, probes, dtype)
                    except Exception as error:  # the other cases are still wanted
                        row["failure"] = f"{type(error).__name__}: {str(error)[:160]}"
                    torch.cuda.empty_cache()
                report["rows"].append(row)
                print({k: v for k, v in row.items() if not k.endswith("flops")}, flush=True)
    return report


def main() -> int:
    """Run, print and write; 1 if a case failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--out", type=Path, help="folder to write to")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the kernels are timed on a GPU")
    report = run(
        getattr(torch, chosen.dtype),
        chosen.probes,
        tuple(chosen.length or LENGTHS),
        chosen.seconds,
    )
    place = chosen.out or folder()
    place.mkdir(parents=True, exist_ok=True)
    name = "attention" if chosen.dtype == "bfloat16" else f"attention-{chosen.dtype}"
    (place / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (place / f"{name}.md").write_text(table(report))
    print(table(report))
    return 1 if any("failure" in row for row in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())

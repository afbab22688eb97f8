"""The engine on a GPU against the authors' algorithm: `python bench/gpu/engine.py [--lengths 256]`.

A random-weight Llama of 1.2 billion parameters (the shape of Llama-3.2-1B), one target. The
authors' algorithm is timed on a sample of its tokens and multiplied: each costs the same, since
each runs the whole context. Times are of whole runs between synchronisations, the best of two after
a warm-up. Writes `bench/results/<gpu>/engine.json` and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from baselines import authors  # noqa: E402

from heat_fast import Attributor, HeatConfig  # noqa: E402
from heat_fast.cost import flops as count_flops  # noqa: E402
from heat_fast.decoder import view  # noqa: E402
from heat_fast.kernels.rademacher import rademacher  # noqa: E402

SAMPLE = 4
PROBES = 2
RUNS: dict[str, dict[str, Any]] = {
    "curvature none": {"curvature": "none"},
    "coded, 32 products": {"estimator": "coded", "probes": 2, "codes": 16},
    "lr, rank 64": {"variant": "lr", "rank": 64, "probes": 2},
    "block, 2 probes": {"probes": PROBES},
}


def llama(dtype: torch.dtype) -> Any:
    """The model, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(dtype).eval()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds between synchronisations."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    value = run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, value


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product, the ceiling that shares are taken of."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    for _ in range(2):
        left @ right
    seconds, _ = timed(lambda: [left @ right for _ in range(4)])
    return 4 * 2 * 8192**3 / seconds


def ours(model: Any, ids: list[int], settings: dict[str, Any], rate: float) -> dict[str, Any]:
    """The better of two runs: seconds, peak memory beyond the model, counted FLOPs."""
    attributor = Attributor(model, None, HeatConfig(**settings))
    resting = torch.cuda.memory_allocated()
    attributor.attribute(ids, 7)
    torch.cuda.reset_peak_memory_stats()
    seconds, result = min(
        (timed(lambda: attributor.attribute(ids, 7)) for _ in range(2)), key=lambda pair: pair[0]
    )
    peak = torch.cuda.max_memory_allocated() - resting
    flops = count_flops(view(model, len(ids)), len(ids), 1, HeatConfig(**settings))
    total = sum(flops.values())
    return {
        "seconds": seconds,
        "timings": dict(result.metadata["seconds"]),
        "peak_bytes": peak,
        "flops": flops,
        "share_of_matmul_rate": total / seconds / rate,
        "implementation": result.metadata["implementation"],
        "token_budget": result.metadata["token_budget"],
    }


def theirs(model: Any, ids: list[int]) -> dict[str, Any]:
    """The authors' algorithm, from `SAMPLE` tokens."""
    embeddings = model.get_input_embeddings()(torch.tensor(ids, device="cuda")).detach()
    length, width = embeddings.shape
    signs = rademacher(
        0, torch.arange(PROBES, device="cuda")[:, None], torch.arange(length, device="cuda"), width
    ).to(embeddings.dtype)
    authors.curvature(model, embeddings, 7, signs, range(1))
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    curvature, _ = timed(lambda: authors.curvature(model, embeddings, 7, signs, range(SAMPLE)))
    authors.information(model, embeddings, range(2))
    information, _ = timed(lambda: authors.information(model, embeddings, range(4 * SAMPLE)))
    return {
        "curvature": curvature * length / SAMPLE,
        "information": information * length / (4 * SAMPLE),
        "seconds": curvature * length / SAMPLE + information * length / (4 * SAMPLE),
        "peak_bytes": torch.cuda.max_memory_allocated() - resting,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=None, help="another file for the JSON")
    options = parser.parse_args()
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    out = options.out or ROOT / "bench" / "results" / name / "engine.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "sampled_tokens": SAMPLE,
        "runs": [],
    }
    print("| dtype | N | run | seconds | authors / ours | share of matmul rate | peak, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (getattr(torch, name) for name in options.dtypes):
        model, rate = llama(dtype), matmul_rate(dtype)
        for length in options.lengths:
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(128256, (length,), generator=generator).tolist()
            base = theirs(model, ids)
            head = {"dtype": str(dtype), "tokens": length}
            report["runs"].append({**head, "run": "authors", **base})
            print(f"| {dtype} | {length} | authors | {base['seconds']:.1f} | 1 | | "
                  f"{base['peak_bytes'] / 1e6:.0f} |")  # fmt: skip
            for label, settings in RUNS.items():
                try:
                    row = ours(model, ids, settings, rate)
                except Exception as error:  # the others' figures are worth having
                    report["runs"].append({**head, "run": label, "error": repr(error)})
                    print(f"| {dtype} | {length} | {label} | {type(error).__name__}: {error} |")
                    continue
                other = base["information"] if label == "curvature none" else base["seconds"]
                report["runs"].append(
                    {**head, "run": label, "ratio": other / row["seconds"], **row}
                )
                print(
                    f"| {dtype} | {length} | {label} | {row['seconds']:.3f} | "
                    f"{other / row['seconds']:.1f} | {row['share_of_matmul_rate']:.2f} | "
                    f"{row['peak_bytes'] / 1e6:.0f} | {row['timings']}",
                    flush=True,
                )
            out.write_text(json.dumps({**report, "matmul_rate": rate}, indent=1) + "\n")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

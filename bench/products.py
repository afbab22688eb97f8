"""What `heat_fast/decoder/product.py` gains on this CPU: `python bench/products.py [--write NAME]`.

Rates of float32 products with a weight, read both ways, beside torch's own, one thread, best of
several; and whole attributions (`gs`, in processes of their own) with the products taken and with
torch's: seconds, and peak memory beyond the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from scaling import processor
from sizes import SMALL

from heat_fast.decoder.product import affine, passed_over_by_mkl, product

HERE = Path(__file__).resolve().parent
#: Rows, inputs and outputs of a layer.
LAYERS = [(32, 288, 768), (512, 288, 768), (512, 896, 4864), (512, 4864, 896), (2048, 576, 1536)]
#: Prompt tokens, shape of the model, dtype.
RUNS = [(128, "half", "float32"), (128, "half", "bfloat16"), (512, "llama", "bfloat16")]


if SMALL:
    LAYERS, RUNS = LAYERS[:1], [(9, "tiny", "bfloat16")]


def seconds(call: Callable[[], object]) -> float:
    """The best of as many calls as half a second has room for."""
    call()
    best, end = float("inf"), time.perf_counter() + 0.5
    while (begin := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def rates(rows: int, inputs: int, outputs: int) -> dict[str, Any]:
    """GFLOP/s of a layer and of its adjoint, here and by torch."""
    x, weight, y = (
        torch.randn(*shape) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    calls = {
        "forward": lambda: affine(x, weight, None),
        "forward_torch": lambda: torch.nn.functional.linear(x, weight),
        "adjoint": lambda: product(y, weight),
        "adjoint_torch": lambda: y @ weight,
    }
    work = 2e-9 * rows * inputs * outputs
    return {
        "layer": [rows, inputs, outputs],
        **{name: work / seconds(call) for name, call in calls.items()},
    }


def attribution(tokens: int, shape: str, dtype: str) -> dict[str, Any]:
    """Seconds and bytes beyond the model of one attribution, here and with torch's products."""
    found: dict[str, Any] = {"tokens": tokens, "shape": shape, "dtype": dtype}
    for name, plain in (("", []), ("_torch", ["plain"])):
        command = [sys.executable, str(HERE / "peak_memory.py"), str(tokens), '{"variant": "gs"}']
        run = subprocess.run(
            [*command, shape, "1", dtype, *plain], check=True, stdout=subprocess.PIPE, text=True
        )
        told = json.loads(run.stdout)
        found[f"seconds{name}"] = told["seconds"]["total"]
        found[f"bytes{name}"] = told["peak"] - told["model"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Products with weights beside torch's own.")
    parser.add_argument("--write", metavar="NAME", help="results/NAME.json")
    name = parser.parse_args().write
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layers = [rates(*layer) for layer in LAYERS]
    report = {
        "machine": processor(),
        "onednn_for_float32": passed_over_by_mkl(),
        "threads": threads,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "layers": layers,
        "attributions": [attribution(*run) for run in RUNS],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if name:
        (HERE / "results" / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

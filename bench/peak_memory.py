"""Peak resident memory of one attribution of a random-weight Llama, in a process of its own.

    python bench/peak_memory.py 1024 '{"estimator": "coded", "codes": 8, "probes": 4}' \\
        [llama [1 [bfloat16 [plain]]]]

prints, as JSON in bytes: what the process held before the model (interpreter, torch, and all that a
first attribution of a tiny model loads); the model; the trunk as the engine counts it; the most
that was resident during the attribution beyond the first; what `heat_fast.estimate` told; counts,
FLOPs and seconds. The last arguments: one of the shapes of `models.py`, how many targets, the
dtype, and whether products with the weights are torch's own, their rows as they come.
"""

from __future__ import annotations

import json
import resource
import sys

import torch
from models import prompt_ids, random_llama

from heat_fast import Attributor, HeatConfig, estimate, load_demo_model
from heat_fast.decoder import product
from heat_fast.memory import forget_peak, resident
from heat_fast.planner import trim_heap


def main() -> None:
    settings = json.loads(sys.argv[2])
    shape = sys.argv[3] if len(sys.argv) > 3 else "llama"
    targets = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    dtype = getattr(torch, sys.argv[5]) if len(sys.argv) > 5 else torch.float32
    if len(sys.argv) > 6:
        product.passed_over_by_mkl = lambda: False
        product.filled_rows = lambda rows: rows
    tokens = int(sys.argv[1])
    config = HeatConfig.preset(settings.pop("variant", "full"), **settings)
    demo = load_demo_model(1)
    Attributor(demo.model, None, config.replace(layers=None)).attribute([5, 6, 7], 8)
    del demo
    baseline = resident("VmRSS")
    model = random_llama(shape, dtype)
    trim_heap()  # what making the model in float32 left
    reset = forget_peak()
    result = Attributor(model, None, config).attribute(prompt_ids(tokens, shape), [7] * targets)
    peak = resident("VmHWM") if reset else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = estimate(model, tokens, targets, config, calibrate=False)
    report = {
        "baseline": baseline,
        "model": sum(value.nbytes for value in model.parameters()),
        "trunk": result.metadata["trunk_bytes"],
        "peak": peak - baseline,
        "estimated": told.peak_bytes,
        "flops": dict(told.flops),
        "counts": dict(result.metadata["counts"]),
        "seconds": dict(result.metadata["seconds"]),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""This tree against an earlier revision, taking turns: `make bench-compare BASE=<rev>`.

The base is checked out in a worktree of its own, its extension compiled there if csrc/ differs,
else taken from here. Every round runs both in processes of their own, the order alternating, so
that what else the machine does falls on both. Printed per workload: median and quartiles of base
over this tree; above 1 this tree is faster. It judges nothing: the exit status is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
WORKLOADS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # Prompt tokens, target tokens, settings.
    "information, N=128": (128, 1, {"curvature": "none"}),
    "coded, 64 products, N=128": (128, 1, {"estimator": "coded", "codes": 8, "probes": 8}),
    "block, 1 probe, N=64": (64, 1, {"probes": 1}),
    "low rank, N=64": (64, 1, {"variant": "lr", "rank": 32}),
    "windows, N=192": (192, 1, {"variant": "win", "window": 96, "curvature": "none"}),
    "response of 8, coded": (64, 8, {"estimator": "coded", "codes": 4, "probes": 2}),
}


def measure() -> None:
    """Seconds of every workload by the package of this process, as JSON, and where it lies."""
    sys.path.insert(0, str(REPOSITORY / "bench"))
    from models import prompt_ids, random_llama

    import heat_fast
    from heat_fast import Attributor, HeatConfig

    model = random_llama("llama")
    seconds: dict[str, float | None] = {}
    for name, (tokens, targets, settings) in WORKLOADS.items():
        chosen = dict(settings)
        try:
            config = HeatConfig.preset(chosen.pop("variant", "full"), **chosen)
        except heat_fast.HeatError:  # a setting that the revision does not have
            seconds[name] = None
            continue
        attributor = Attributor(model, None, config)
        attributor.attribute(prompt_ids(16), 7)  # the first run pays for caches
        took = []
        for _ in range(2):
            begin = time.perf_counter()
            attributor.attribute(prompt_ids(tokens), [7] * targets)
            took.append(time.perf_counter() - begin)
        seconds[name] = min(took)
    print(json.dumps({"package": heat_fast.__file__, "seconds": seconds}))


def run(tree: Path) -> dict[str, float | None]:
    """`measure` by the package of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    outcome = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
    )
    told = json.loads(outcome.stdout.splitlines()[-1])
    if tree not in Path(told["package"]).resolve().parents:
        raise SystemExit(f"{told['package']} was imported: expected the package of {tree}")
    seconds: dict[str, float | None] = told["seconds"]
    return seconds


def git(*arguments: str) -> str:
    """Output of git in the repository."""
    outcome = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
    )
    if outcome.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {outcome.stderr.strip()}")
    return outcome.stdout.strip()


def build(tree: Path, revision: str) -> None:
    """Give a worktree its extension."""
    if not git("diff", "--stat", revision, "--", "csrc", "setup.py"):
        for binary in (REPOSITORY / "heat_fast").glob("_native*.so"):
            shutil.copy(binary, tree / "heat_fast")
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True)


def compare(
    base: Callable[[], Any], mine: Callable[[], Any], rounds: int
) -> dict[str, list[float]]:
    """Base over mine in every round, by workload."""
    ratios: dict[str, list[float]] = {name: [] for name in WORKLOADS}
    for number in range(rounds):
        first, second = (base, mine) if number % 2 == 0 else (mine, base)
        one, other = first(), second()
        theirs, ours = (one, other) if number % 2 == 0 else (other, one)
        for name, values in ratios.items():
            if theirs[name] and ours[name]:
                values.append(theirs[name] / ours[name])
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="a revision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
        return
    if not arguments.base or arguments.rounds < 2:
        parser.error("expected a revision to compare with, and at least 2 rounds")
    # Let `finally` remove the worktree when the run is stopped from outside.
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))
    revision = git("rev-parse", "--verify", f"{arguments.base}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "base"
        git("worktree", "add", "--detach", str(tree), revision)
        try:
            build(tree, revision)
            ratios = compare(lambda: run(tree), lambda: run(REPOSITORY), arguments.rounds)
        finally:
            git("worktree", "remove", "--force", str(tree))
    width = max(map(len, WORKLOADS))
    print(f"{revision[:12]} over this tree, {arguments.rounds} rounds: median (quartiles)")
    for name, values in ratios.items():
        if len(values) < 2:
            print(f"{name:<{width}}  the base does not have it")
            continue
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        print(f"{name:<{width}}  {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()

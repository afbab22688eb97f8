"""What the benchmarks share: models, prompts, the machine's own ceiling, and a table of ratios.

A speed is only stated beside another one measured in the same run: as a ratio to the authors'
algorithm, or as a share of the floor (counted FLOPs over the matrix-product rate measured here).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heat_fast import ceilings

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = Path(os.environ.get("HEAT_FAST_MODELS", REPOSITORY.parent / "shared" / "data" / "models"))
sys.path[:0] = [str(REPOSITORY / "bench"), str(REPOSITORY / "bench" / "gpu")]
os.environ["HF_HUB_OFFLINE"] = "1"


class Summary:
    """Lines of comparison, printed after the run and kept in the JSON of the benchmarks."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, what: str, value: str) -> None:
        """Keep one comparison."""
        self.rows.append((what, value))


_SUMMARY = Summary()


@pytest.fixture(scope="session")
def summary() -> Summary:
    """Where a benchmark leaves its comparison."""
    return _SUMMARY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _SUMMARY.rows:
        terminalreporter.section("comparisons in this run")
        width = max(len(what) for what, _ in _SUMMARY.rows)
        for what, value in _SUMMARY.rows:
            terminalreporter.line(f"{what:<{width}}  {value}")


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    import transformers

    output_json["heat_fast"] = {
        "revision": revision,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "comparisons": [list(row) for row in _SUMMARY.rows],
    }


@pytest.fixture(scope="session")
def random_llama() -> Any:
    """The random-weight Llama of `models.py`."""
    from models import random_llama

    return random_llama()


@pytest.fixture(scope="session")
def stories() -> tuple[Any, Any]:
    """The 3M-parameter story model and its tokenizer, where they lie on disk."""
    path = MODELS / "stories3M"
    if not (path / "config.json").is_file():
        pytest.skip(f"no model at {path} (HEAT_FAST_MODELS names the folder to look in)")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def prompt_ids() -> Callable[[int], list[int]]:
    """`prompt_ids(n)`: n random token ids for the random-weight model, the same in every run."""
    from models import prompt_ids

    return prompt_ids


@pytest.fixture(scope="session")
def matmul_rate() -> Callable[[], float]:
    """FLOP/s of this process' matrix products, 512 rows by the random model's weights, right now.

    The best of many runs: a ceiling, measured with the threads the benchmarks use.
    """

    def measure() -> float:
        return ceilings.matmul_rate(torch.device("cpu"), torch.float32, (512, 288, 768))

    return measure

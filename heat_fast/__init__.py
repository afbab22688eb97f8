"""Token attribution for decoder-only language models, by attention flow, curvature and information.

For each token of a prompt, how much it contributed to what the model says next::

    score[i] = gate[i] * (beta * curvature[i] + gamma * information[i])

Names are looked up on first use (PEP 562), so ``import heat_fast`` by itself loads neither
torch nor transformers.

Example:
    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model()
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, demo.examples[0].prompt)
    >>> result.scores.shape == (len(result.tokens),)
    True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from heat_fast._version import __version__

if TYPE_CHECKING:
    from heat_fast import baselines as baselines
    from heat_fast import datasets as datasets
    from heat_fast import demo as demo
    from heat_fast import metrics as metrics
    from heat_fast.attributor import Attributor, attribute
    from heat_fast.calibration import Calibration, calibrate
    from heat_fast.comparison import Comparison, compare_results
    from heat_fast.config import HeatConfig
    from heat_fast.cost import Estimate, estimate
    from heat_fast.demo import load_demo_model
    from heat_fast.error_bounds import Bounds, bounds
    from heat_fast.errors import (
        ConfigError,
        HeatError,
        InputError,
        MissingPackageError,
        NumericalError,
        OutputError,
        UnsupportedModelError,
    )
    from heat_fast.generation import generate_and_attribute
    from heat_fast.native import build_info
    from heat_fast.result import Attribution
    from heat_fast.spans import Span
    from heat_fast.storage import from_dict, load, read_jsonl, write_jsonl
    from heat_fast.tables import read_parquet, write_parquet

__all__ = [
    "Attribution",
    "Attributor",
    "Bounds",
    "Calibration",
    "Comparison",
    "ConfigError",
    "Estimate",
    "HeatConfig",
    "HeatError",
    "InputError",
    "MissingPackageError",
    "NumericalError",
    "OutputError",
    "Span",
    "UnsupportedModelError",
    "__version__",
    "attribute",
    "bounds",
    "build_info",
    "calibrate",
    "compare_results",
    "estimate",
    "from_dict",
    "generate_and_attribute",
    "load",
    "load_demo_model",
    "read_jsonl",
    "read_parquet",
    "write_jsonl",
    "write_parquet",
]

# public name -> module that defines it
_HOME = {
    "Attribution": "heat_fast.result",
    "Attributor": "heat_fast.attributor",
    "Bounds": "heat_fast.error_bounds",
    "Calibration": "heat_fast.calibration",
    "Comparison": "heat_fast.comparison",
    "ConfigError": "heat_fast.errors",
    "Estimate": "heat_fast.cost",
    "HeatConfig": "heat_fast.config",
    "HeatError": "heat_fast.errors",
    "InputError": "heat_fast.errors",
    "MissingPackageError": "heat_fast.errors",
    "NumericalError": "heat_fast.errors",
    "OutputError": "heat_fast.errors",
    "Span": "heat_fast.spans",
    "UnsupportedModelError": "heat_fast.errors",
    "attribute": "heat_fast.attributor",
    "bounds": "heat_fast.error_bounds",
    "calibrate": "heat_fast.calibration",
    "compare_results": "heat_fast.comparison",
    "build_info": "heat_fast.native",
    "estimate": "heat_fast.cost",
    "from_dict": "heat_fast.storage",
    "generate_and_attribute": "heat_fast.generation",
    "load": "heat_fast.storage",
    "load_demo_model": "heat_fast.demo",
    "read_jsonl": "heat_fast.storage",
    "read_parquet": "heat_fast.tables",
    "write_jsonl": "heat_fast.storage",
    "write_parquet": "heat_fast.tables",
}

# Reachable as attributes without an import statement of their own.
_SUBMODULES = frozenset({"baselines", "datasets", "demo", "metrics"})

# A type checker that saw __getattr__ would accept any attribute of the module.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _SUBMODULES:
            return import_module(f"{__name__}.{name}")
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})

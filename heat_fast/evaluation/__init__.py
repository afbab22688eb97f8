"""Models x data x methods x metrics from one TOML file: resumable runs, tables, significance."""

from heat_fast.evaluation.cells import Cell, holm, stability, summarise
from heat_fast.evaluation.plan import Plan, load_plan, presets
from heat_fast.evaluation.plots import write_plots
from heat_fast.evaluation.run import evaluate
from heat_fast.evaluation.tables import write_tables

__all__ = [
    "Cell",
    "Plan",
    "evaluate",
    "holm",
    "load_plan",
    "presets",
    "stability",
    "summarise",
    "write_plots",
    "write_tables",
]

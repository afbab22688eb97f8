"""Models x data x methods x metrics from one TOML file: resumable runs, tables, significance."""

from heat_fast.evaluation.plan import Plan, load_plan, presets
from heat_fast.evaluation.run import evaluate
from heat_fast.evaluation.tables import Cell, holm, summarise, write_tables

__all__ = ["Cell", "Plan", "evaluate", "holm", "load_plan", "presets", "summarise", "write_tables"]

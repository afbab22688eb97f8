"""The run: one line per attribution, written as soon as it is measured; what is there is kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from heat_fast._version import __version__
from heat_fast.datasets import encode
from heat_fast.errors import HeatError, InputError
from heat_fast.evaluation.measures import MEASURES, Asked, Inapplicable
from heat_fast.evaluation.plan import Method, Plan, make_method, read_data, read_model

ROWS, PLAN = "rows.jsonl", "plan.json"
#: `progress(done, total)`.
Progress = Callable[[int, int], None]


def evaluate(
    plan: Plan, output: str | os.PathLike[str], progress: Progress = lambda done, total: None
) -> list[dict[str, Any]]:
    """Run a plan into a folder; a run that was stopped goes on where it was.

    Every example's first target token is explained. A row holds model, data, method, example,
    `values` by metric, `skipped` (metric: reason), `seconds`, and `error` where the attribution
    failed; rows are appended to `rows.jsonl` and flushed to the disk one by one. Returns all rows
    in the order of the plan.

    Raises `InputError` where the folder holds the results of another plan.
    """
    folder = Path(output)
    _claim(folder, plan)
    known = {_key(row): row for row in _rows(folder / ROWS)}
    methods = {each.label: make_method(each) for each in plan.methods}
    data = {each.label: list(read_data(each, plan.folder)) for each in plan.data}
    total = len(plan.models) * len(plan.methods) * sum(map(len, data.values()))
    done, found = 0, []
    with _appending(folder / ROWS) as append:
        for model in plan.models:
            loaded: tuple[Any, Any] | None = None  # only where something is left to do
            for label, examples in data.items():
                for example in examples:
                    asked: Asked | None = None
                    for method, run in methods.items():
                        key = (model.label, label, method, example.id)
                        if key not in known:
                            loaded = loaded or read_model(model, plan.folder)
                            row: dict[str, Any] = dict(zip(_FIELDS, key, strict=True))
                            try:
                                asked = asked or Asked(loaded[0], encode(example, loaded[1]))
                                row.update(_measure(plan, asked, run, loaded[1]))
                            except HeatError as error:
                                row.update(values={}, skipped={}, error=str(error))
                            append(row)
                            known[key] = row
                        found.append(known[key])
                        done += 1
                        progress(done, total)
    return found


def _measure(plan: Plan, asked: Asked, run: Method, tokenizer: Any) -> dict[str, Any]:
    encoded = asked.encoded
    result = run(asked.model, tokenizer, list(encoded.token_ids), [encoded.target_id])
    values: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for metric in plan.metrics:
        try:
            measured = MEASURES[metric.name].measure(asked, result.scores, metric.settings)
            values[metric.label] = measured.value
        except (Inapplicable, InputError) as reason:
            skipped[metric.label] = str(reason)
    return {
        "values": values,
        "skipped": skipped,
        "seconds": result.metadata["seconds"]["total"],
        "error": None,
    }


_FIELDS = ("model", "data", "method", "example")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[field] for field in _FIELDS)


def _claim(folder: Path, plan: Plan) -> None:
    """Keep the plan in the folder, or see that it is the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, resolved = folder / PLAN, json.loads(json.dumps(plan.resolved()))
    if kept.exists():
        if json.loads(kept.read_text())["plan"] != resolved:
            raise InputError(
                f"{str(folder)!r} holds the results of another plan: expected the same, to go on "
                "with it. Choose another folder, or remove this one."
            )
        return
    import transformers

    versions = {
        "heat_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    kept.write_text(json.dumps({"plan": resolved, "versions": versions}, indent=1) + "\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; a last line that was cut off is taken out."""
    if not path.exists():
        return []
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(whole) + bool(whole))
    return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def _appending(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    with path.open("a", encoding="utf-8") as file:

        def append(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        yield append

"""The run: one line per attribution, written as soon as it is measured; what is there is kept."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from heat_fast.datasets import Example, encode
from heat_fast.errors import HeatError, InputError
from heat_fast.evaluation.measures import MEASURES, Asked, Attributed, Inapplicable, Method
from heat_fast.evaluation.plan import Entry, Plan, make_method, model_names, read_data, read_model
from heat_fast.forward import check_in_memory
from heat_fast.journal import Journal
from heat_fast.provenance import versions
from heat_fast.rows import digest_of

ROWS, PLAN = "rows.jsonl", "plan.json"
#: `progress(done, total)`.
Progress = Callable[[int, int], None]


def evaluate(
    plan: Plan,
    output: str | os.PathLike[str],
    progress: Progress = lambda done, total: None,
    load: Callable[[str | None], tuple[Any, Any]] = read_model,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> list[dict[str, Any]]:
    """Run a plan into a folder; a run that was stopped goes on where it was.

    Of every example the first target token is explained, all of them where the data set has
    `targets = "all"`, or the token that the model decodes. A row holds model, data, method,
    example, `targets`, `values` by metric, `skipped` (metric: reason), `seconds`, `device`,
    `dtype`, `digest` of the example, and `error` where the attribution failed; rows are appended to
    `rows.jsonl` and flushed to the disk one by one. A run that goes on tries again what failed: of
    rows of one attribution the last counts. Where two decodings give the same token, its row is
    measured once. Returns all rows in the order of the plan.

    load: model and tokenizer of a folder or hub name, or of None, the embedded model; by default
    they are loaded onto the CPU.
    device, dtype: where and in what it loads them ("cuda", "float64"), where that is asked for:
    a run with nothing left to do loads none, and is held to these.

    Raises `InputError` where a model's folder is not there, where the folder holds the results of
    another plan, of examples that have changed since, or rows of a model on another device or in
    another dtype than it is now, and where it cannot be written; `OutputError` where another run is
    writing into the folder, or there is no room left for a row.
    """
    references = {each.label: each.settings.get("reference", each.label) for each in plan.data}

    def explained(row: dict[str, Any]) -> tuple[Any, ...]:
        """What rows of different decodings may have in common."""
        of = row["model"], references[row["data"]], row["method"], row["example"]
        return *of, tuple(row["targets"])

    folder, names = Path(output), model_names(plan)
    with closing(_open(folder)) as journal:
        _keep(plan, folder)
        known = {_key(row): row for row in journal.read()}
        # Failures are not shared: each has its own reason.
        measured = {
            explained(row): row
            for row in known.values()
            if row.get("targets") and row["error"] is None
        }
        methods = {each.label: make_method(each) for each in plan.methods}
        data = {each.label: list(read_data(each, plan.folder)) for each in plan.data}
        digests = {(d, each.id): _digest(each) for d, found in data.items() for each in found}
        for kept in known.values():
            _check_place(folder, kept, device, dtype)
            _check_example(folder, kept, digests)
        total = len(plan.models) * len(plan.methods) * sum(map(len, data.values()))
        done, found = 0, []
        for model in plan.models:
            loaded: tuple[Any, Any] | None = None  # only where something is left to do
            for entry in plan.data:
                for example in data[entry.label]:
                    asked: Asked | HeatError | None = None
                    for method, run in methods.items():
                        key = (model.label, entry.label, method, example.id)
                        before = known.get(key)
                        if before is None or before["error"] is not None:
                            if loaded is None:
                                loaded = load(names[model.label])
                                now = _place_of(loaded[0])
                                for kept in known.values():
                                    if kept["model"] == model.label:
                                        _check_place(folder, kept, *now)
                            asked = asked or _ask(entry, example, *loaded)
                            row: dict[str, Any] = dict(zip(_FIELDS, key, strict=True))
                            row["targets"] = (
                                [] if isinstance(asked, HeatError) else list(asked.targets)
                            )
                            same = measured.get(explained(row))
                            row |= _taken(same) if same else _measure(plan, asked, run)
                            row["digest"] = digests[entry.label, example.id]
                            if row != before:  # else it failed as before
                                journal.append(json.dumps(row) + "\n")
                            known[key] = row
                            if row["targets"] and row["error"] is None:
                                measured[explained(row)] = row
                        found.append(known[key])
                        done += 1
                        progress(done, total)
    return found


def _place_of(model: Any) -> tuple[str, str]:
    """Device and dtype of a model."""
    dtype = model.get_input_embeddings().weight.dtype
    return str(check_in_memory(model)), str(dtype).removeprefix("torch.")


def _check_place(folder: Path, row: dict[str, Any], device: str | None, dtype: str | None) -> None:
    """See that a row was measured on the device and in the dtype of now, where they are known."""
    if "device" not in row or "dtype" not in row:  # it failed
        return
    moved = device is not None and device not in (row["device"], row["device"].partition(":")[0])
    if moved or dtype not in (None, row["dtype"]):
        raise InputError(
            f"{str(folder)!r} holds rows of {row['model']} on {row['device']} in {row['dtype']}, "
            f"now it is on {device or row['device']} in {dtype or row['dtype']}: expected the "
            f"same, so that rows can be compared. Go on with device {row['device']} and dtype "
            f"{row['dtype']}, or choose another folder."
        )


def _check_example(folder: Path, row: dict[str, Any], digests: dict[tuple[str, str], str]) -> None:
    """See that an example is the one that its row was measured on; what failed may change."""
    now = digests.get((row["data"], row["example"]))
    if now is not None and row["error"] is None and row.get("digest", now) != now:
        raise InputError(
            f"{str(folder)!r} holds rows of another {row['example']!r} of {row['data']}: expected "
            "the examples that they were measured on. Choose another folder, or bring the data "
            "back."
        )


def _digest(example: Example) -> str:
    """What tells an example from another of the same id."""
    text = json.dumps(asdict(example), sort_keys=True, default=str)
    return digest_of(text.encode())


def _taken(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (*_FIELDS, "targets")}


def _ask(entry: Entry, example: Example, model: Any, tokenizer: Any) -> Asked | HeatError:
    """An example with the tokens to be explained, or why there are none."""
    try:
        encoded = encode(example, tokenizer)
        every, decoding = encoded.target_ids, entry.settings.get("decoding")
        targets = every if entry.settings.get("targets") == "all" else every[:1]
        if decoding is not None:
            targets = _decode(model, tokenizer, example.id, encoded.token_ids, dict(decoding))
    except HeatError as error:
        return error
    return Asked(model, tokenizer, example, encoded, targets)


def _decode(
    model: Any, tokenizer: Any, name: str, prompt: Any, settings: dict[str, Any]
) -> tuple[int, ...]:
    """The model's next token, drawn as the settings say; the likeliest where they are empty.

    Random numbers are an example's own, and the same in every setting. What the model's generation
    settings say besides does not count.
    """
    from heat_fast.attributor import Attributor
    from heat_fast.generation import PLAIN, PLAIN_SAMPLING, generate

    arguments = {**PLAIN_SAMPLING, **settings} if settings else PLAIN
    seed = zlib.crc32(f"{arguments.pop('seed', 0)}/{name}".encode()) if settings else 0
    attributor = Attributor(model, tokenizer)
    return tuple(
        generate(attributor, list(prompt), max_new_tokens=1, arguments=arguments, seed=seed)
    )


def _measure(plan: Plan, asked: Asked | HeatError, method: Method) -> dict[str, Any]:
    values: dict[str, float] = {}
    skipped: dict[str, str] = {}
    try:
        if isinstance(asked, HeatError):
            raise asked
        prompt = list(asked.encoded.token_ids)
        result = method(asked.model, asked.tokenizer, prompt, list(asked.targets))
    except HeatError as error:
        return {"values": values, "skipped": skipped, "seconds": None, "error": str(error)}
    one = Attributed(asked, method, result)
    for metric in plan.metrics:
        try:
            measured = MEASURES[metric.name].measure(one, metric.settings)
            values[metric.label] = measured.value
        except (Inapplicable, HeatError) as reason:
            skipped[metric.label] = str(reason)
    told = result.metadata
    return {
        "values": values,
        "skipped": skipped,
        "seconds": told["seconds"]["total"],
        "device": told["device"],
        "dtype": told["dtype"],
        "error": None,
    }


_FIELDS = ("model", "data", "method", "example")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[field] for field in _FIELDS)


def _open(folder: Path) -> Journal:
    """The rows of a folder, new or of an earlier run, which is this run's alone until closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ROWS).touch()  # tells of the folder, before the journal would of its file
        # Rows may go into a file that is there; tables and figures will be new.
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"cannot write into {str(folder)!r} ({error.strerror}): expected a folder, new or of "
            "an earlier run. Choose another."
        ) from error
    return Journal(folder / ROWS, f"the folder {str(folder)!r}")


def claim(folder: Path, plan: Plan) -> None:
    """See that a run of the plan may begin in the folder; raises as `evaluate` does."""
    model_names(plan)
    with closing(_open(folder)):
        _keep(plan, folder)


def _keep(plan: Plan, folder: Path) -> None:
    """Keep the plan in the folder, or see that it is that of the rows that are there."""
    kept, resolved = folder / PLAN, json.loads(json.dumps(plan.resolved()))
    if kept.exists() and (folder / ROWS).stat().st_size:
        if json.loads(kept.read_text())["plan"] != resolved:
            raise InputError(
                f"{str(folder)!r} holds the results of another plan: expected the same, to go on "
                "with it. Choose another folder, or remove this one."
            )
        return
    fresh = kept.with_suffix(".new")
    fresh.write_text(json.dumps({"plan": resolved, "versions": versions()}, indent=1) + "\n")
    fresh.replace(kept)

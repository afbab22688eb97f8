"""The TOML of an evaluation, checked: which models, data, methods and metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heat_fast import baselines, datasets
from heat_fast.config import PRESETS, HeatConfig, suggest
from heat_fast.errors import InputError
from heat_fast.evaluation.measures import MEASURES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAT = "heat-"
_PRESETS = Path(__file__).parent / "presets"
#: Keys of the tables of a plan; methods and metrics take settings besides.
_KEYS = {
    "models": {"name", "path"},
    "data": {"name", "path", "limit", "seed", "label", "narratives"},
    "methods": {"name", "label"},
    "metrics": {"name", "label"},
}


@dataclass(frozen=True)
class Entry:
    """A model, data set, method or metric: its name, what tables call it, its settings."""

    name: str
    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """All that is evaluated with all: `len(models) * len(data) * len(methods)` attributions each.

    `folder`: what relative paths are relative to.
    """

    models: tuple[Entry, ...]
    data: tuple[Entry, ...]
    methods: tuple[Entry, ...]
    metrics: tuple[Entry, ...]
    folder: Path

    def resolved(self) -> dict[str, Any]:
        """What a run keeps beside its results, and compares when it goes on."""
        return {name: [asdict(each) for each in getattr(self, name)] for name in _KEYS}


def presets() -> dict[str, Path]:
    """The plans that come with the package, by name."""
    return {path.stem: path for path in sorted(_PRESETS.glob("*.toml"))}


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and check a plan; a name of `presets()` stands for its file.

    Raises `InputError` for a file that cannot be read, unknown keys, names and settings.

    >>> [each.name for each in load_plan("quick").models]
    ['embedded']
    """
    place = presets().get(str(path), Path(path))
    try:
        found = tomllib.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the plan {str(path)!r}: {error}. Expected a TOML file, or one of "
            f"{', '.join(presets())}. Check the path."
        ) from error
    _known("plan", found, _KEYS)
    parts = {name: _entries(name, found.get(name)) for name in _KEYS}
    for each in parts["methods"]:
        make_method(each)
    for each in parts["metrics"]:
        _known("metrics", [each.name], MEASURES)
        _known(f"[[metrics]] {each.name}", each.settings, MEASURES[each.name].settings)
    for each in parts["data"]:
        _known("data", [each.name], (*_FILES, "synthetic", "curated"))
    return Plan(**parts, folder=place.resolve().parent)


def _known(what: str, names: Any, known: Any) -> None:
    for name in names:
        if name not in known:
            raise InputError(
                f"{what} has {name!r}: expected one of {', '.join(sorted(known))}. "
                f"{suggest(str(name), known)}"
            )


def _entries(table: str, rows: Any) -> tuple[Entry, ...]:
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"the plan has no [[{table}]]: expected at least one. Write [[{table}]] and a name."
        )
    found: dict[str, Entry] = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise InputError(f"an entry of [[{table}]] has no name: expected one. Add name = ....")
        settings = {key: value for key, value in row.items() if key not in ("name", "label")}
        if table in ("models", "data"):
            _known(f"[[{table}]] {row['name']}", row, _KEYS[table])
        entry = Entry(row["name"], str(row.get("label", row["name"])), settings)
        if entry.label in found:
            raise InputError(
                f"[[{table}]] has two entries {entry.label!r}: expected different ones. Give one a "
                "label."
            )
        found[entry.label] = entry
    return tuple(found.values())


# --- what the entries stand for -------------------------------------------------------------------

Method = Callable[[Any, Any, Any, Any], Any]


def make_method(entry: Entry) -> Method:
    """A preset of HEAT or a baseline: `method(model, tokenizer, prompt, target)`."""
    if not entry.name.startswith(HEAT):
        known = [*(HEAT + name for name in PRESETS), *baselines.names()]
        _known("methods", [entry.name], known)
        return baselines.get(entry.name, **entry.settings)
    config = HeatConfig.preset(entry.name.removeprefix(HEAT), **entry.settings)

    def run(model: Any, tokenizer: Any, prompt: Any, target: Any) -> Any:
        from heat_fast.attributor import Attributor

        return Attributor(model, tokenizer, config).attribute(prompt, target)

    return run


_FILES = ("longra", "tellmewhy", "wikibio", "sciq", "narrativeqa", "authors")


def read_data(entry: Entry, folder: Path) -> Sequence[datasets.Example]:
    """The examples of a data set; environment variables in its path are filled in."""
    settings = dict(entry.settings)
    limit = settings.get("limit")
    if entry.name == "synthetic":
        return datasets.synthetic(limit or 100, settings.get("seed", 0))
    path = _place(settings.get("path"), folder)
    if entry.name == "curated":
        stories = datasets.narratives(_place(settings.get("narratives"), folder))
        questions = datasets.sciq(path)
        return datasets.curated(stories, questions, count=limit, seed=settings.get("seed", 0))
    return datasets.load(entry.name, path, limit=limit)


def read_model(entry: Entry, folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name; without a path, the embedded ones."""
    path = entry.settings.get("path")
    if path is None:
        from heat_fast.demo import load_demo_model

        demo = load_demo_model(1)
        return demo.model, demo.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _place(path, folder)
    name = str(place) if place is not None and place.exists() else path
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    return model, AutoTokenizer.from_pretrained(name)


def _place(path: str | None, folder: Path) -> Path | None:
    return None if path is None else folder / os.path.expandvars(path)

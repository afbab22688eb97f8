"""The TOML of an evaluation, checked: which models, data, methods and metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from heat_fast import baselines, datasets
from heat_fast.checks import nearest
from heat_fast.combine import Components, combine
from heat_fast.config import PRESETS, HeatConfig
from heat_fast.errors import ConfigError, InputError
from heat_fast.evaluation.measures import MEASURES, Method
from heat_fast.files import check_model_folder
from heat_fast.metrics import DECODING_GRID
from heat_fast.result import Attribution

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAT = "heat-"
_PRESETS = Path(__file__).parent / "presets"
#: Keys of the tables of a plan; methods and metrics take settings besides.
_KEYS = {
    "models": {"name", "path"},
    "data": {"name", "path", "limit", "seed", "label", "narratives", "targets", "decodings"},
    "methods": {"name", "label"},
    "metrics": {"name", "label"},
}


@dataclass(frozen=True)
class Entry:
    """A model, data set, method or metric: its name, what tables call it, its settings."""

    name: str
    label: str
    settings: Mapping[str, Any]


#: What `decodings` of a data set can be called, instead of a list of settings: the HEAT paper's
#: grid (Tables 3 and 11), and the two beside greedy decoding of its Table 14.
DECODINGS: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "grid": DECODING_GRID,
    "few": ({"top_p": 0.9}, {"temperature": 0.8}),
}
#: Which part of an attribution by HEAT is evaluated: the score, a component by itself, or
#: `beta * curvature + gamma * information` without the gate.
PARTS: Final = ("score", "gate", "curvature", "information", "ungated")


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


def load_plan(
    path: str | os.PathLike[str],
    *,
    models: Sequence[str] = (),
    data: Sequence[str] = (),
    limit: int | None = None,
) -> Plan:
    """Read and check a plan; a name of `presets()` stands for its file.

    models, data: take the place of the plan's own; folders or hub names, and `name=path` of a data
    set, `curated=path,narratives=path`, or `synthetic` or `restated`. limit: the most examples of
    each data set; without it that of the plan's first.

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
    if models:
        found["models"] = [_model(each, len(models) > 1) for each in models]
    if data:
        # What is explained of every example stays as the plan has it.
        own = _entries("data", found.get("data"))[0].settings
        kept = {name: own[name] for name in ("targets", "decodings", "limit") if name in own}
        found["data"] = [{**kept, **_data(each)} for each in data]
    parts = {name: _entries(name, found.get(name)) for name in _KEYS}
    if limit is not None:
        parts["data"] = tuple(
            replace(each, settings={**each.settings, "limit": limit}) for each in parts["data"]
        )
    for each in parts["methods"]:
        try:
            make_method(each)
        except ConfigError as error:
            raise InputError(f"[[methods]] {each.label}: {error}") from error
    for each in parts["metrics"]:
        _known("metrics", [each.name], MEASURES)
        _known(f"[[metrics]] {each.name}", each.settings, MEASURES[each.name].settings)
    for each in parts["data"]:
        _known("data", [each.name], (*_FILES, *_GENERATED, "curated"))
        if "narratives" in each.settings and each.name != "curated":
            raise InputError(
                f"{each.label} has narratives: expected them only of curated, whose prompts begin "
                "with one. Leave them out."
            )
        _known(f"targets of {each.label}", [each.settings.get("targets", "first")], _TARGETS)
        limited = each.settings.get("limit", 1)
        if isinstance(limited, bool) or not isinstance(limited, int) or limited < 1:
            raise InputError(
                f"limit of {each.label} is {limited!r}: expected a whole number of at least 1. "
                "Correct it, or leave it out."
            )
    parts["data"] = tuple(decoded for each in parts["data"] for decoded in _decoded(each))
    _different("data", parts["data"])
    return Plan(**parts, folder=place.resolve().parent)


def _model(given: str, several: bool) -> dict[str, str]:
    place = _absolute(given)
    here = os.path.exists(os.path.expandvars(place))
    name = given if several else Path(place).name
    return {"name": name, "path": place if here else given}


def _data(given: str) -> dict[str, str]:
    name, equals, files = given.partition("=")
    path, second, stories = files.partition(",narratives=")
    halves = bool(equals) != bool(path) or bool(second) != bool(stories)
    if halves or (path and name in _GENERATED):
        raise InputError(
            f"--data {given}: expected NAME=PATH, curated=PATH,narratives=PATH, or synthetic or "
            "restated alone. Correct it."
        )
    found = {"path": path, "narratives": stories}
    return {"name": name, **{key: _absolute(each) for key, each in found.items() if each}}


def _absolute(path: str) -> str:
    """Relative to where the command runs, not to the plan; variables stay as they are."""
    return path if path.startswith("$") else os.path.abspath(os.path.expanduser(path))


def _decoded(entry: Entry) -> list[Entry]:
    """A data set as often as its next tokens are decoded: greedily, then by each setting."""
    settings = dict(entry.settings)
    chosen = settings.pop("decodings", None)
    if chosen is None:
        return [entry]
    if settings.get("targets") == "all":
        raise InputError(
            f'{entry.label} has targets = "all" and decodings: expected one of them, since one '
            "decoded token is explained. Leave the other out."
        )
    if isinstance(chosen, str):
        _known(f"decodings of {entry.label}", [chosen], DECODINGS)
        chosen = DECODINGS[chosen]
    if not isinstance(chosen, (list, tuple)):
        chosen = [chosen]
    found = [replace(entry, settings={**settings, "decoding": {}})]
    for one in chosen:
        if not isinstance(one, Mapping) or not one:
            raise InputError(
                f"decodings of {entry.label} hold {one!r}: expected {', '.join(DECODINGS)}, or a "
                "list of settings such as { temperature = 0.8 }. Correct it."
            )
        _known(f"decodings of {entry.label}", one, _DECODING)
        told = ", ".join(f"{name} {value}" for name, value in one.items())
        found.append(
            replace(
                entry,
                label=f"{entry.label}: {told}",
                settings={**settings, "decoding": dict(one), "reference": entry.label},
            )
        )
    return found


def _known(what: str, names: Any, known: Any) -> None:
    for name in names:
        if name not in known:
            raise InputError(
                f"{what} has {name!r}: expected one of {', '.join(sorted(known))}. "
                f"{nearest(str(name), known)}"
            )


def _entries(table: str, rows: Any) -> tuple[Entry, ...]:
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"the plan has no [[{table}]]: expected at least one. Write [[{table}]] and a name."
        )
    found = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise InputError(f"an entry of [[{table}]] has no name: expected one. Add name = ....")
        settings = {key: value for key, value in row.items() if key not in ("name", "label")}
        if table in ("models", "data"):
            _known(f"[[{table}]] {row['name']}", row, _KEYS[table])
            for key in ("path", "narratives"):
                if not isinstance(row.get(key, ""), str):
                    raise InputError(
                        f"{key} of [[{table}]] {row['name']} is {row[key]!r}: expected the name of "
                        "a file or folder, in quotes. Correct it."
                    )
        found.append(Entry(row["name"], str(row.get("label", row["name"])), settings))
    _different(table, found)
    return tuple(found)


def _different(table: str, entries: Sequence[Entry]) -> None:
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(
                f"[[{table}]] has two entries {label!r}: expected different ones. Give one a label."
            )


# --- what the entries stand for -------------------------------------------------------------------


def make_method(entry: Entry) -> Method:
    """A preset of HEAT or a baseline: `method(model, tokenizer, prompt, target)`."""
    settings = dict(entry.settings)
    if not entry.name.startswith(HEAT):
        known = [*(HEAT + name for name in PRESETS), *baselines.names()]
        _known("methods", [entry.name], known)
        return baselines.get(entry.name, **settings)
    part = settings.pop("part", "score")
    _known(f"part of {entry.label}", [part], PARTS)
    config = HeatConfig.preset(entry.name.removeprefix(HEAT), **settings)

    def run(model: Any, tokenizer: Any, prompt: Any, target: Any) -> Attribution:
        from heat_fast.attributor import Attributor

        result = Attributor(model, tokenizer, config).attribute(prompt, target)
        if part == "score":
            return result
        scores = _ungated(result, config) if part == "ungated" else getattr(result, part)
        return replace(result, target_scores=scores)

    return run


def _ungated(result: Attribution, config: HeatConfig) -> Tensor:
    """The scores `[T, N]` with a gate of 1."""
    parts = Components(
        torch.ones_like(result.gate),
        result.curvature,
        result.information,
        result.log_prob_drop,
        result.gradient_norm,
    )
    return combine(parts, config)[0]


_TARGETS = ("first", "all")
_DECODING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "seed")
_GENERATED = {"synthetic": datasets.synthetic, "restated": datasets.restated}
_FILES = ("longra", "tellmewhy", "wikibio", "sciq", "narrativeqa", "authors")


def read_data(entry: Entry, folder: Path) -> Sequence[datasets.Example]:
    """The examples of a data set; environment variables in its path are filled in."""
    settings = dict(entry.settings)
    limit = settings.get("limit")
    if entry.name in _GENERATED:
        return _GENERATED[entry.name](limit or 100, settings.get("seed", 0))
    path = _place(settings.get("path"), folder)
    if entry.name == "curated":
        stories = datasets.narratives(_place(settings.get("narratives"), folder))
        questions = datasets.sciq(path)
        return datasets.curated(stories, questions, count=limit, seed=settings.get("seed", 0))
    return datasets.load(entry.name, path, limit=limit)


def model_names(plan: Plan) -> dict[str, str | None]:
    """The folders or hub names of the models by label; None for the embedded one.

    Raises `InputError` where there is no such folder.
    """
    return {each.label: _model_name(each, plan.folder) for each in plan.models}


def _model_name(entry: Entry, folder: Path) -> str | None:
    path = entry.settings.get("path")
    place = _place(path, folder)
    if place is None:
        return None
    name = str(place) if place.exists() else os.path.expandvars(str(path))
    check_model_folder(name)
    return name


def read_model(name: str | None) -> tuple[Any, Any]:
    """Model and tokenizer by one of `model_names`, on the CPU."""
    if name is None:
        from heat_fast.demo import load_demo_model

        demo = load_demo_model(1)
        return demo.model, demo.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load the model {name!r}: {error}. Expected a folder written by "
            "save_pretrained() or a hub id that can be reached. Check the name."
        ) from error


def _place(path: str | None, folder: Path) -> Path | None:
    if path is None:
        return None
    place = os.path.expandvars(path)
    if "$" in place:
        raise InputError(
            f"the path {path!r} names an environment variable that is not set: expected a "
            "folder. Set the variable, or write the path out."
        )
    return folder / place

"""Means, standard errors and paired significance of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heat_fast.errors import InputError, MissingPackageError
from heat_fast.evaluation.measures import MEASURES
from heat_fast.evaluation.plan import Plan
from heat_fast.metrics import Measurement, decoding_stability, log_ratio


@dataclass(frozen=True)
class Cell:
    """One method by one metric on one data set of one model.

    p: of the paired Wilcoxon signed-rank test against the first method, two-sided, corrected by
    Holm's method over all tests of the evaluation; None for the first method, and where no pair
    differs. best: the best mean of its column.
    """

    model: str
    data: str
    method: str
    metric: str
    count: int
    mean: float
    stderr: float | None
    p: float | None
    best: bool


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: `max_{j <= i} min(1, (m - j) p_j)` in rising order.

    (Holm 1979.)

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    found, least = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[at]))
        found[at] = least
    return found


#: Model, data set, method, metric.
Key = tuple[str, str, str, str]


def _collected(rows: Sequence[dict[str, Any]]) -> dict[Key, dict[str, float]]:
    """Values by example."""
    found: dict[Key, dict[str, float]] = {}
    for row in rows:
        for metric, value in row["values"].items():
            key = (row["model"], row["data"], row["method"], metric)
            found.setdefault(key, {})[row["example"]] = value
    return found


def summarise(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """The cells of all tables. Examples lacking a value are left out.

    Soft-NC and Soft-NS have a second column where the plan has the method "random": the log of
    their ratio to it (`heat_fast.metrics.log_ratio`), with the significance of the values
    themselves. Data sets decoded otherwise than greedily are left to `stability`.
    """
    shown = {each.label for each in plan.data if "reference" not in each.settings}
    values = {key: of for key, of in _collected(rows).items() if key[1] in shown}
    first = plan.methods[0].label
    tests = {}
    for key, found in values.items():
        rival = values.get((*key[:2], first, key[3]), {})
        apart = [found[name] - rival[name] for name in found if name in rival]
        if key[2] != first and any(apart):
            tests[key] = _wilcoxon(apart)
    p = dict(zip(tests, holm(list(tests.values())), strict=True))
    measured = {key: Measurement.of(list(found.values())) for key, found in values.items()}
    better = {each.label: MEASURES[each.name].better for each in plan.metrics}
    for raw, ratio in _log_ratios(plan, values).items():
        column = _RATIO.format(raw[3])
        key = (*raw[:3], column)
        measured[key] = ratio
        better[column] = "higher"
        if raw in p:
            p[key] = p[raw]
    return _cells(measured, better, p)


def _cells(
    measured: Mapping[Key, Measurement], better: Mapping[str, str], p: Mapping[Key, float]
) -> list[Cell]:
    best: dict[tuple[str, str, str], float] = {}
    for (model, data, _, metric), own in measured.items():
        pick = max if better[metric] == "higher" else min
        best[model, data, metric] = pick(own.value, best.get((model, data, metric), own.value))
    return [
        Cell(
            *key,
            count=len(own),
            mean=own.value,
            stderr=own.stderr if own.stderr is None or math.isfinite(own.stderr) else None,
            p=p.get(key),
            best=own.value == best[key[0], key[1], key[3]],
        )
        for key, own in measured.items()
    ]


def grouped(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells by model and data set: those of one table."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model, cell.data), []).append(cell)
    return found


_RATIO = "log ({} / random)"


def columns(plan: Plan) -> list[str]:
    """The columns of a table, as far as it has them."""
    found = []
    for each in plan.metrics:
        found.append(each.label)
        if MEASURES[each.name].chance:
            found.append(_RATIO.format(each.label))
    return found


def _log_ratios(plan: Plan, values: Mapping[Key, Mapping[str, float]]) -> dict[Key, Measurement]:
    """Of the values of a key, the log of their ratio to chance."""
    chance = next((each.label for each in plan.methods if each.name == "random"), None)
    wanted = {each.label for each in plan.metrics if MEASURES[each.name].chance}
    found = {}
    for key, own in values.items():
        model, data, method, metric = key
        rival = values.get((model, data, str(chance), metric), {})
        shared = [name for name in own if name in rival]
        if metric not in wanted or method == chance or not shared:
            continue
        try:
            found[key] = log_ratio(
                *(Measurement.of([each[name] for name in shared]) for each in (own, rival))
            )
        except InputError:
            continue  # both means are 0: there is no ratio
    return found


def stability(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """The largest relative change of each metric over decoding settings, in percent.

    For the data sets with `decodings`; `mean` is the change (`heat_fast.metrics.
    decoding_stability`), its reference greedy decoding. Only examples with a value in every setting
    count; what has a reference of 0 is left out.
    """
    values, found = _collected(rows), {}
    for key, own in values.items():
        model, data, method, metric = key
        others = [
            values.get((model, each.label, method, metric), {})
            for each in plan.data
            if each.settings.get("reference") == data
        ]
        shared = [name for name in own if all(name in other for other in others)]
        if not others or not shared:
            continue
        greedy, *rest = (Measurement.of([one[name] for name in shared]) for one in (own, *others))
        try:
            found[key] = decoding_stability(greedy, rest)
        except InputError:
            continue  # the reference is 0
    return _cells(found, dict.fromkeys((each.label for each in plan.metrics), "lower"), {})


def _wilcoxon(apart: Sequence[float]) -> float:
    try:
        from scipy.stats import wilcoxon
    except ImportError as error:
        raise MissingPackageError.of(
            "scipy",
            error,
            "for significance",
            "Install it with pip install 'heat-fast[evaluation]'.",
        ) from error
    # Pairs without a difference count half to either side.
    return float(wilcoxon(apart, zero_method="zsplit").pvalue)

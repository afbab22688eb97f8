"""Measured log-probability drops, as calibration and the comparison of two targets need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heat_fast.errors import InputError
from heat_fast.metadata import plain
from heat_fast.result import Attribution


def check_drops(results: Sequence[Attribution]) -> None:
    """Raise InputError unless every drop was measured exactly, in one context, and by one masking.

    Drops in windows are weighed and of contexts of their own, `coverage` leaves some out, and
    `branch_tolerance` measures a run of which parts are frozen. Results of one model are asked for,
    as far as they tell which it was.
    """
    for number, result in enumerate(results):
        check_attribution(result, f"result {number}")
        found = _obstacle(result)
        if found is not None:
            raise InputError(
                f"result {number} {found}: expected every token's drop, measured exactly in the "
                "whole context. Attribute without window, coverage and branch_tolerance."
            )
        first = results[0]
        for name in ("masking", "sentinel_token"):
            both = [each.metadata["config"].get(name) for each in (first, result)]
            if both[0] != both[1]:
                raise InputError(
                    f"results 0 and {number} have {name}={both[0]!r} and {both[1]!r}: expected the "
                    "same, for their drops are compared. Attribute one of them again."
                )
        check_model(first.metadata, result.metadata, f"results 0 and {number}")


def check_attribution(given: Any, name: str) -> None:
    """Raise InputError for anything but an attribution."""
    if not isinstance(given, Attribution):
        raise InputError(
            f"{name} is {type(given).__name__}: expected an Attribution. Pass what "
            "heat_fast.attribute returns."
        )


def check_model(one: Any, other: Any, who: str) -> None:
    """Raise InputError where two records of a model tell of different weights or adapters."""
    for name in ("weights", "adapters"):
        told = [plain({name: each[name]})[name] for each in (one, other) if name in each]
        if len(told) == 2 and told[0] != told[1]:
            raise InputError(
                f"{who} are of models with different {name} ({told[0]!r} and {told[1]!r}): "
                "expected one model. Attribute again with it."
            )


def _obstacle(result: Attribution) -> str | None:
    """Why a result's drops are not those of single tokens masked in the whole context."""
    config = result.metadata.get("config", {})
    if "masking" not in config or "log_prob_drop" not in result.measured:
        return "has no measured drops"
    if len(result.metadata.get("windows", {"stretches": ()})["stretches"]) > 1:
        return "is of several windows"
    if result.information_skipped is not None or config.get("coverage") is not None:
        return "leaves information out (coverage)"
    if config.get("branch_tolerance") is not None:
        return f"has branch_tolerance={config['branch_tolerance']}"
    return None

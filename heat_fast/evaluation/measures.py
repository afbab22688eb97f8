"""What is measured of one attribution: every metric of `heat_fast.metrics` on one example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from torch import Tensor

from heat_fast import metrics
from heat_fast.datasets import EncodedExample
from heat_fast.metrics import Case, Measurement


class Inapplicable(Exception):
    """A metric cannot be taken of this example; the message tells why."""


@dataclass
class Asked:
    """An example of a model; what all methods share is made once."""

    model: Any
    encoded: EncodedExample

    @cached_property
    def effects(self) -> Tensor:
        """Patch effects `[N]`."""
        case = Case(self.encoded.token_ids, self.encoded.target_id, [0.0] * len(self))
        return metrics.patch_effects(self.model, [case])[0]

    def __len__(self) -> int:
        return len(self.encoded.token_ids)

    def part(self, name: str) -> tuple[int, ...]:
        """Tokens of "evidence", "distractor" or "support"."""
        found: tuple[int, ...] = getattr(self.encoded, name)
        if not found:
            raise Inapplicable(f"no {name} is known")
        return found


#: `measure(asked, scores, settings)`.
Measure = Callable[[Asked, Tensor, Mapping[str, Any]], Measurement]


@dataclass(frozen=True)
class Known:
    """How a metric is taken, and which way is better."""

    measure: Measure
    better: Literal["higher", "lower"]


def _perturbing(function: Any, positive: bool) -> Measure:
    def measure(asked: Asked, scores: Tensor, settings: Mapping[str, Any]) -> Measurement:
        encoded = asked.encoded
        case = Case(encoded.token_ids, encoded.target_id, scores.abs() if positive else scores)
        found: Measurement = function(asked.model, [case], **settings)
        return found

    return measure


def _dsa(asked: Asked, scores: Tensor, settings: Mapping[str, Any]) -> Measurement:
    gold, first, second = (asked.part(name) for name in ("evidence", "distractor", "support"))
    # A token at a border may belong to both: it bears the answer.
    apart = [token for token in first if token not in second]
    return metrics.dsa([scores.abs()], [gold], [apart], [second], **settings)


def _token_f1(asked: Asked, scores: Tensor, settings: Mapping[str, Any]) -> Measurement:
    return metrics.token_f1([scores], [asked.part("evidence")], **settings)


def _patched(function: Any) -> Measure:
    def measure(asked: Asked, scores: Tensor, settings: Mapping[str, Any]) -> Measurement:
        found: Measurement = function([scores], [asked.effects], **settings)
        return found

    return measure


#: By name. Shares of a total (soft_*, dsa, snippet_delta) are taken of absolute scores.
MEASURES: Final[dict[str, Known]] = {
    "soft_nc": Known(_perturbing(metrics.soft_nc, True), "higher"),
    "soft_ns": Known(_perturbing(metrics.soft_ns, True), "higher"),
    "comprehensiveness": Known(_perturbing(metrics.comprehensiveness, False), "higher"),
    "sufficiency": Known(_perturbing(metrics.sufficiency, False), "lower"),
    "aopc_fractions": Known(_perturbing(metrics.aopc_fractions, False), "higher"),
    "aopc_order": Known(_perturbing(metrics.aopc_order, False), "higher"),
    "dsa": Known(_dsa, "higher"),
    "token_f1": Known(_token_f1, "higher"),
    "patch_corr": Known(_patched(metrics.patch_corr), "higher"),
    "intervention_at_k": Known(_patched(metrics.intervention_at_k), "higher"),
    "misattribution": Known(_patched(metrics.misattribution), "lower"),
    "filter_delta": Known(_perturbing(metrics.filter_delta, False), "higher"),
    "snippet_delta": Known(_perturbing(metrics.snippet_delta, True), "higher"),
}

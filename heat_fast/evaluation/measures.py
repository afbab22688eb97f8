"""What is measured of one attribution: every metric of `heat_fast.metrics` on one example."""

from __future__ import annotations

import inspect
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


Better = Literal["higher", "lower"]
#: `measure(asked, scores, settings)`.
Measure = Callable[[Asked, Tensor, Mapping[str, Any]], Measurement]


@dataclass(frozen=True)
class Known:
    """A metric: its function, how it is taken of one example, and which way is better."""

    function: Callable[..., Measurement]
    measure: Measure
    better: Better = "higher"

    @property
    def settings(self) -> list[str]:
        """What a plan can set: the function's keywords."""
        every = inspect.signature(self.function).parameters.values()
        return [each.name for each in every if each.kind is each.KEYWORD_ONLY]


def _perturbing(function: Any, better: Better = "higher", *, positive: bool = False) -> Known:
    def measure(asked: Asked, scores: Tensor, settings: Mapping[str, Any]) -> Measurement:
        encoded = asked.encoded
        case = Case(encoded.token_ids, encoded.target_id, scores.abs() if positive else scores)
        found: Measurement = function(asked.model, [case], **settings)
        return found

    return Known(function, measure, better)


def _patched(function: Any, better: Better = "higher") -> Known:
    def measure(asked: Asked, scores: Tensor, settings: Mapping[str, Any]) -> Measurement:
        found: Measurement = function([scores], [asked.effects], **settings)
        return found

    return Known(function, measure, better)


def _dsa(asked: Asked, scores: Tensor, settings: Mapping[str, Any]) -> Measurement:
    gold, first, second = (asked.part(name) for name in ("evidence", "distractor", "support"))
    # A token at a border may belong to both: it bears the answer.
    apart = [token for token in first if token not in second]
    return metrics.dsa([scores.abs()], [gold], [apart], [second], **settings)


def _token_f1(asked: Asked, scores: Tensor, settings: Mapping[str, Any]) -> Measurement:
    return metrics.token_f1([scores], [asked.part("evidence")], **settings)


#: By name. Shares of a total (soft_*, dsa, snippet_delta) are taken of absolute scores.
MEASURES: Final[dict[str, Known]] = {
    "soft_nc": _perturbing(metrics.soft_nc, positive=True),
    "soft_ns": _perturbing(metrics.soft_ns, positive=True),
    "comprehensiveness": _perturbing(metrics.comprehensiveness),
    "sufficiency": _perturbing(metrics.sufficiency, "lower"),
    "aopc_fractions": _perturbing(metrics.aopc_fractions),
    "aopc_order": _perturbing(metrics.aopc_order),
    "dsa": Known(metrics.dsa, _dsa),
    "token_f1": Known(metrics.token_f1, _token_f1),
    "patch_corr": _patched(metrics.patch_corr),
    "intervention_at_k": _patched(metrics.intervention_at_k),
    "misattribution": _patched(metrics.misattribution, "lower"),
    "filter_delta": _perturbing(metrics.filter_delta),
    "snippet_delta": _perturbing(metrics.snippet_delta, positive=True),
}

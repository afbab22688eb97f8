"""What is measured of one attribution: every metric of `heat_fast.metrics` on one example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from torch import Tensor

from heat_fast import metrics
from heat_fast.datasets import EncodedExample, Example, encode
from heat_fast.metrics import Case, Measurement
from heat_fast.result import Attribution

#: `method(model, tokenizer, prompt, target)`.
Method = Callable[[Any, Any, Any, Any], Attribution]


class Inapplicable(Exception):
    """A metric cannot be taken of this example; the message tells why."""


@dataclass
class Asked:
    """An example of a model; what all methods share is made once.

    targets: the tokens that are explained; the metrics that ask the model look at the first.
    """

    model: Any
    tokenizer: Any
    example: Example
    encoded: EncodedExample
    targets: tuple[int, ...]

    @cached_property
    def effects(self) -> Tensor:
        """Patch effects `[N]`."""
        case = Case(self.encoded.token_ids, self.targets[0], [0.0] * len(self))
        return metrics.patch_effects(self.model, [case])[0]

    @cached_property
    def swapped(self) -> EncodedExample:
        """The prompt with its answer exchanged for another, in as many tokens."""
        found = self._other("swapped")
        if len(found.token_ids) != len(self):
            raise Inapplicable("the prompt with its answer exchanged has another number of tokens")
        return found

    @cached_property
    def rephrased(self) -> tuple[EncodedExample, list[tuple[int, int]]]:
        """The prompt in other words or another order, and pairs of tokens that are the same."""
        found = self._other("rephrased")
        spans = self.example.extra["rephrased"].get("spans", ())
        if not spans:
            raise Inapplicable("no spans tell which parts of the rephrased prompt are the same")
        # Where a token ends: whether the white space before it belongs to it depends on its place.
        places = {pair[1]: at for at, pair in enumerate(found.prompt.offsets or ()) if pair}
        pairs = []
        for index, pair in enumerate(self.encoded.prompt.offsets or ()):
            for (start, stop), (other, _) in spans:
                if pair and start < pair[1] <= stop and pair[1] - start + other in places:
                    pairs.append((index, places[pair[1] - start + other]))
        return found, pairs

    def _other(self, name: str) -> EncodedExample:
        form = self.example.extra.get(name)
        if form is None:
            raise Inapplicable(f"no {name} prompt is known")
        return encode(Example(self.example.id, form["prompt"], form["target"]), self.tokenizer)

    def __len__(self) -> int:
        return len(self.encoded.token_ids)

    def part(self, name: str) -> tuple[int, ...]:
        """Tokens of "evidence", "distractor" or "support"."""
        found: tuple[int, ...] = getattr(self.encoded, name)
        if not found:
            raise Inapplicable(f"no {name} is known")
        return found


@dataclass
class Attributed:
    """An example with its attribution by a method, and the method, to be asked again."""

    asked: Asked
    method: Method
    result: Attribution

    @property
    def scores(self) -> Tensor:
        """Scores `[N]`, of several targets together."""
        return self.result.scores

    def case(self, *, positive: bool = False) -> Case:
        """What the first target is explained by."""
        scores = self.result.target_scores[0]
        asked = self.asked
        return Case(asked.encoded.token_ids, asked.targets[0], scores.abs() if positive else scores)

    def again(self, token_ids: Sequence[int], target: int) -> Tensor:
        """Scores `[N]` of another prompt by the same method."""
        asked = self.asked
        return self.method(asked.model, asked.tokenizer, list(token_ids), [target]).scores


Better = Literal["higher", "lower"]
#: `measure(attributed, settings)`.
Measure = Callable[[Attributed, Mapping[str, Any]], Measurement]


@dataclass(frozen=True)
class Known:
    """A metric: its function, how it is taken of one example, and which way is better.

    chance: whether tables also tell the log of its ratio to the method "random".
    """

    function: Callable[..., Any]
    measure: Measure
    better: Better = "higher"
    chance: bool = False

    @property
    def settings(self) -> list[str]:
        """What a plan can set: the function's keywords."""
        every = inspect.signature(self.function).parameters.values()
        return [each.name for each in every if each.kind is each.KEYWORD_ONLY]


def _perturbing(
    function: Any, better: Better = "higher", *, positive: bool = False, chance: bool = False
) -> Known:
    def measure(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
        found: Measurement = function(one.asked.model, [one.case(positive=positive)], **settings)
        return found

    return Known(function, measure, better, chance)


def _patched(function: Any, better: Better = "higher") -> Known:
    def measure(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
        case = one.case()
        found: Measurement = function([case.scores], [one.asked.effects], **settings)
        return found

    return Known(function, measure, better)


def _dsa(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
    asked = one.asked
    gold, first, second = (asked.part(name) for name in ("evidence", "distractor", "support"))
    # A token at a border may belong to both: it bears the answer.
    apart = [token for token in first if token not in second]
    return metrics.dsa([one.scores.abs()], [gold], [apart], [second], **settings)


def _token_f1(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
    return metrics.token_f1([one.scores], [one.asked.part("evidence")], **settings)


def _span(which: Literal["precision", "recall", "f1"]) -> Known:
    def measure(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
        spans = [(token, token + 1) for token in one.asked.part("evidence")]
        found: Measurement = getattr(metrics.span_scores([one.scores], [spans], **settings), which)
        return found

    return Known(metrics.span_scores, measure)


def _sensitivity(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
    asked = one.asked

    def attribute(_: Any, token_ids: Sequence[int], target: int) -> Tensor:
        return one.again(token_ids, target)

    prompts = [(asked.encoded.token_ids, asked.targets[0])]
    return metrics.sensitivity(asked.model, attribute, prompts, **{"normalize": True, **settings})


def _rephrased(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
    other, pairs = one.asked.rephrased
    scores = one.again(other.token_ids, one.asked.targets[0])
    return metrics.active_passive([one.case().scores], [scores], [pairs], **settings)


def _causal_pass(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
    other, gold = one.asked.swapped, one.asked.part("evidence")
    scores = one.again(other.token_ids, other.target_id)
    return metrics.causal_pass_at_k([scores], [gold], **settings)


def _counterfactual(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
    other = one.asked.swapped
    foils = [(other.token_ids, other.target_id)]
    return metrics.aopc_counterfactual(one.asked.model, [one.case()], foils, **settings)


def _leakage(one: Attributed, settings: Mapping[str, Any]) -> Measurement:
    windows: Any = one.result.metadata.get("windows")
    if not windows:
        raise Inapplicable("the prompt was not cut into windows")
    if windows["leakage"] is None and len(windows["stretches"]) > 1:
        raise Inapplicable("no two windows in a row were swept")
    return metrics.window_leakage([one.result], **settings)


#: By name. Shares of a total (soft_*, dsa, snippet_delta) are taken of absolute scores.
MEASURES: Final[dict[str, Known]] = {
    "soft_nc": _perturbing(metrics.soft_nc, positive=True, chance=True),
    "soft_ns": _perturbing(metrics.soft_ns, positive=True, chance=True),
    "comprehensiveness": _perturbing(metrics.comprehensiveness),
    "sufficiency": _perturbing(metrics.sufficiency, "lower"),
    "aopc_fractions": _perturbing(metrics.aopc_fractions),
    "aopc_order": _perturbing(metrics.aopc_order),
    "aopc_counterfactual": Known(metrics.aopc_order, _counterfactual),
    "dsa": Known(metrics.dsa, _dsa),
    "token_f1": Known(metrics.token_f1, _token_f1),
    "span_precision": _span("precision"),
    "span_recall": _span("recall"),
    "span_f1": _span("f1"),
    "sensitivity": Known(metrics.sensitivity, _sensitivity, "lower"),
    "rephrasing": Known(metrics.active_passive, _rephrased),
    "window_leakage": Known(metrics.window_leakage, _leakage, "lower"),
    "causal_pass_at_k": Known(metrics.causal_pass_at_k, _causal_pass),
    "patch_corr": _patched(metrics.patch_corr),
    "intervention_at_k": _patched(metrics.intervention_at_k),
    "misattribution": _patched(metrics.misattribution, "lower"),
    "filter_delta": _perturbing(metrics.filter_delta),
    "snippet_delta": _perturbing(metrics.snippet_delta, positive=True),
}

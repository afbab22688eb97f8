"""Two attributions of one prompt, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from heat_fast.drops import check_attribution, check_drops
from heat_fast.errors import InputError
from heat_fast.ranks import spearman
from heat_fast.result import Attribution

__all__ = ["Comparison", "compare_results"]

#: What is correlated, by the name it is shown with.
_COMPARED = {
    "score": "target_scores",
    "gate": "gate",
    "curvature": "curvature",
    "information": "information",
}


@dataclass(frozen=True)
class Comparison:
    """How far two attributions of a prompt agree.

    correlations: Spearman's rank correlation over the prompt tokens, -1 to 1, of the score and of
    each component over all targets; None where one of the two is the same for all tokens.
    """

    left: Attribution
    right: Attribution
    correlations: Mapping[str, float | None]

    def overlap(self, k: int = 10) -> float:
        """Share of the k leading tokens that are leading in both, 0 to 1."""
        left, right = ({row.index for row in each.top(k)} for each in (self.left, self.right))
        return len(left & right) / len(left)

    def same_targets(self) -> bool:
        """Whether both explain the same target tokens."""
        return self.left.target_ids == self.right.target_ids

    def log_odds_drop(self) -> Tensor:
        """Why the left target rather than the right one: `[N]`, nats, float32.

            drop[i] = log P(left) / P(right)  -  the same with token i masked

        Positive for tokens that speak for the left target, negative for those that speak for the
        right. Of a target of several tokens, P is that of all of them. Each part was measured in
        its own attribution, so that no approximation is in it.

        Raises InputError where they are of different models, follow different responses or were
        masked differently, and where drops were not measured, or not exactly: windows, `coverage`,
        `branch_tolerance`.

        Example:
            >>> import heat_fast
            >>> demo = heat_fast.load_demo_model()
            >>> config = heat_fast.HeatConfig.preset("gs")
            >>> attributor = heat_fast.Attributor(demo.model, demo.tokenizer, config)
            >>> prompt, answers = demo.examples[0].prompt, (" Fenston", " Quilston")
            >>> one, other = (attributor.attribute(prompt, answer) for answer in answers)
            >>> odds = compare_results(one, other).log_odds_drop()
            >>> one.tokens[int(odds.argmax())]  # the passage: "The mountain of Mirmora is Fenston."
            ' mountain'
        """
        check_drops((self.left, self.right))
        before = [len(each.lead_ids) for each in (self.left, self.right)]
        if self.left.lead_ids != self.right.lead_ids:
            raise InputError(
                f"the targets follow different responses, of {before[0]} and {before[1]} tokens: "
                "expected the same before both. Attribute targets that begin alike, or at once."
            )
        return self.left.log_prob_drop.sum(0) - self.right.log_prob_drop.sum(0)


def compare_results(left: Attribution, right: Attribution) -> Comparison:
    """Compare two attributions of the same prompt tokens; their targets may differ.

    Raises InputError where the prompts do, and for anything but attributions.

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model()
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, "Maria slept.", probes=1)
    >>> round(compare_results(result, result).correlations["score"], 6)
    1.0
    """
    for name, given in (("left", left), ("right", right)):
        check_attribution(given, name)
    if left.token_ids != right.token_ids:
        raise InputError(
            f"the two results are of different prompts, of {len(left)} and {len(right)} tokens"
            f"{_first_difference(left, right)}: expected the same tokens. Attribute one prompt "
            "twice."
        )
    found = {
        shown: spearman(left.aggregated(name), right.aggregated(name))
        for shown, name in _COMPARED.items()
    }
    return Comparison(left, right, found)


def _first_difference(left: Attribution, right: Attribution) -> str:
    pairs = enumerate(zip(left.token_ids, right.token_ids, strict=False))
    place = next((place for place, (one, other) in pairs if one != other), None)
    if place is None:
        return ""
    return f", the first that differ being {left.tokens[place]!r} and {right.tokens[place]!r}"

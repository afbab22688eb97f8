"""Two attributions of one prompt, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


def compare_results(left: Attribution, right: Attribution) -> Comparison:
    """Compare two attributions of the same prompt tokens; their targets may differ.

    Raises InputError where the prompts do.

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model()
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, "Maria slept.", probes=1)
    >>> round(compare_results(result, result).correlations["score"], 6)
    1.0
    """
    if left.token_ids != right.token_ids:
        raise InputError(
            f"the two results are of different prompts, of {len(left)} and {len(right)} tokens: "
            "expected the same tokens. Attribute one prompt twice."
        )
    found = {
        shown: spearman(left.aggregated(name), right.aggregated(name))
        for shown, name in _COMPARED.items()
    }
    return Comparison(left, right, found)

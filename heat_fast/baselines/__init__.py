"""Other attribution methods, called and read like `heat_fast.attribute`.

    baselines.attribute(model, tokenizer, prompt, target, method="integrated_gradients")

A class for each method holds its settings; its docstring gives the equation, the source, what was
chosen where the source is silent, and the cost in forward and backward passes of one sequence.
Every call also makes one or two plain forwards to read the targets.
"""

from __future__ import annotations

from typing import Any

from heat_fast.baselines.base import Baseline, get, names
from heat_fast.baselines.chains import SelfEntailedChains
from heat_fast.baselines.gradients import InputXGradient, IntegratedGradients, TokenGradients
from heat_fast.baselines.learned import LearnedMask
from heat_fast.baselines.perturbation import (
    CausalTracing,
    ContextCite,
    LeaveOneOut,
    Random,
    ReAGent,
)
from heat_fast.baselines.states import (
    AttentionRollout,
    Peering,
    ProgressiveInference,
    TokenDistributionDynamics,
)
from heat_fast.result import Attribution

__all__ = [
    "AttentionRollout",
    "Baseline",
    "CausalTracing",
    "ContextCite",
    "InputXGradient",
    "IntegratedGradients",
    "LearnedMask",
    "LeaveOneOut",
    "Peering",
    "ProgressiveInference",
    "Random",
    "ReAGent",
    "SelfEntailedChains",
    "TokenDistributionDynamics",
    "TokenGradients",
    "attribute",
    "get",
    "names",
]


def attribute(
    model: Any, tokenizer: Any, prompt: Any, target: Any = None, *, method: str, **settings: Any
) -> Attribution:
    """Attribute one prompt by the baseline called `method`; `names()` lists them.

    `settings` are the fields of its class. The other arguments, the result and the errors are
    those of `heat_fast.attribute`; see `Baseline.__call__` for what the result holds.

    Example:
        >>> import heat_fast
        >>> from heat_fast import baselines
        >>> demo = heat_fast.load_demo_model()
        >>> prompt = demo.examples[0].prompt
        >>> result = baselines.attribute(
        ...     demo.model, demo.tokenizer, prompt, method="input_x_gradient"
        ... )
        >>> result.scores.shape == (len(result.tokens),)
        True
    """
    return get(method, **settings)(model, tokenizer, prompt, target)

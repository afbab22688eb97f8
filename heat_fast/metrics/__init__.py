"""Measures of attributions, of any method: faithfulness, alignment, robustness, interventions.

Every one gives a `Measurement`: value, standard error over examples, value of each example.
"""

from heat_fast.metrics._estimate import Measurement
from heat_fast.metrics._model import Case
from heat_fast.metrics.alignment import SpanScores, dsa, span_scores, token_f1
from heat_fast.metrics.deletion import (
    FRACTIONS,
    aopc_counterfactual,
    aopc_fractions,
    aopc_order,
    comprehensiveness,
    sufficiency,
)
from heat_fast.metrics.downstream import filter_delta, snippet, snippet_delta
from heat_fast.metrics.intervention import (
    causal_pass_at_k,
    intervention_at_k,
    misattribution,
    patch_corr,
    patch_effects,
)
from heat_fast.metrics.robustness import (
    DECODING_GRID,
    active_passive,
    align_tokens,
    decoding_stability,
    sensitivity,
    window_leakage,
)
from heat_fast.metrics.soft_masks import log_ratio, random_cases, soft_nc, soft_ns

__all__ = [
    "DECODING_GRID",
    "FRACTIONS",
    "Case",
    "Measurement",
    "SpanScores",
    "active_passive",
    "align_tokens",
    "aopc_counterfactual",
    "aopc_fractions",
    "aopc_order",
    "causal_pass_at_k",
    "comprehensiveness",
    "decoding_stability",
    "dsa",
    "filter_delta",
    "intervention_at_k",
    "log_ratio",
    "misattribution",
    "patch_corr",
    "patch_effects",
    "random_cases",
    "sensitivity",
    "snippet",
    "snippet_delta",
    "soft_nc",
    "soft_ns",
    "span_scores",
    "sufficiency",
    "token_f1",
    "window_leakage",
]

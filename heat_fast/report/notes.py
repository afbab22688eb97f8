"""What a reader has to know beside the numbers: what they mean, what not, and how they were made.

Plain sentences, chosen by the settings that a result was made with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from heat_fast.reading import approximations, escape, parts, shorten
from heat_fast.result import Attribution

__all__ = ["cautions", "facts", "formula", "meaning", "settings", "terms"]

_LONGEST: Final = 240
_CURVATURE: Final = {
    "gauss_newton": "Curvature is the Gauss-Newton approximation of the Hessian.",
    "grad_squared": "Curvature is the squared gradient, which stands in for the Hessian.",
    "none": "Curvature was left out: the score is gate and information alone.",
}
_ESTIMATOR: Final = {
    "coded": "Curvature is an estimate of the definition, from few products with shared probes.",
    "row": "Curvature is the norm over whole rows of the Hessian: another quantity than the "
    "definition's, not to be compared with it.",
    "low_rank": "Curvature comes from a low-rank approximation of the Hessian. It is "
    "underestimated, and most so for tokens of small curvature.",
}


#: Of each part, by its array: its name in formulas, and the setting that weighs it.
_WEIGHED: Final = {
    "curvature": ("curvature", "beta"),
    "information": ("information", "gamma"),
    "gradient_norm": ("gradient", "alpha"),
}
_TERMS: Final = {
    "gate": "how much attention carries from the token to the predicted position, through all "
    "layers",
    "curvature": "how strongly the target's log-probability bends along the token's embedding",
    "information": "how far the next-token distribution moves when the token is masked, in nats",
    "log_prob_drop": "what the target's log-probability loses when the token is masked, in nats; "
    "negative where it gains. It is not part of the score.",
}


def meaning(result: Attribution) -> str:
    """What a high score says."""
    if result.method is not None:
        return (
            f"Scores are those of the method {result.method}: the higher a score, the more the "
            "method ascribes to the token."
        )
    return (
        "A token with a high score lies on paths that carry much attention to the prediction, and "
        "the prediction is sensitive to it."
    )


def formula(result: Attribution) -> str | None:
    """The score in terms of its components, with the weights that were used; None: not HEAT's."""
    if result.method is not None:
        return None
    config, measured = _config(result), result.measured
    terms = [
        f"{config[weight]:g} × {name}"
        for array, (name, weight) in _WEIGHED.items()
        if array in measured and isinstance(config.get(weight), int | float) and config[weight]
    ]
    if not terms:
        return "score = gate × (weighted curvature + weighted information)"
    return f"score = gate × ({' + '.join(terms)})"


def terms(result: Attribution) -> dict[str, str]:
    """What each measured part is, by the name of its array."""
    return {name: text for name, text in _TERMS.items() if name in result.measured}


def cautions(result: Attribution) -> list[str]:
    """What the score does not say, as far as it concerns this result, and what was approximated."""
    config, measured = _config(result), result.measured
    lines = [
        "It is evidence about the model, not a proof of causation, and says nothing about whether "
        "the answer is true.",
    ]
    if bool((result.target_scores < 0).any()):
        lines.append(
            "Scores have both signs: negative ones, in blue, count against the target. Rank and "
            "share follow the magnitude."
        )
    if config.get("masking") == "zero":
        lines.append(
            "The first token is often an attention sink: masking it by zeros changes much more "
            "than its meaning."
        )
    if result.method is None and config.get("normalize") == "sum":
        lines.append("Curvature and information were each scaled to a sum of 1 before mixing.")
    elif {"curvature", "information"} <= {*measured}:
        lines.append(
            "Curvature and information have different scales: curvature grows with the width of "
            "the model, information is in nats. Without scaling one of them can dominate."
        )
    if len(result.target_ids) > 1:
        lines.append(
            "Scores of several target tokens are combined over their rows; a strong token of one "
            "row may be weak in another."
        )
    return lines + _made(result)


def _made(result: Attribution) -> list[str]:
    config = _config(result) if result.method is None else {}
    curvature, estimator = config.get("curvature"), config.get("estimator")
    lines = [_CURVATURE[curvature]] if curvature in _CURVATURE else []
    if curvature == "hessian" and estimator in _ESTIMATOR:
        lines.append(_ESTIMATOR[estimator])
    return lines + [f"{line[0].upper()}{line[1:]}." for line in approximations(result)]


def facts(result: Attribution) -> list[tuple[str, str]]:
    """The few things about a run that a reader looks for first, as name and value."""
    metadata: Any = result.metadata
    counts, seconds = metadata.get("counts", {}), metadata.get("seconds", {}).get("total")
    versions = metadata.get("versions", {})
    rows = [
        ("Model", metadata.get("model")),
        ("Weights", _name(metadata.get("name"))),
        ("Adapters", ", ".join(metadata.get("adapters", ()))),
        ("Device", " ".join(str(metadata[key]) for key in ("device", "dtype") if key in metadata)),
        ("Method", result.method),
        ("Variant", None if result.method else _config(result).get("variant")),
        ("Seed", metadata.get("seed", _config(result).get("seed"))),
        ("Prompt tokens", f"{len(result):,}"),
        ("Target tokens", f"{len(result.target_ids):,}"),
        *parts(result),
        ("Seconds", None if seconds is None else f"{seconds:.2f}"),
        ("Hessian-vector products", f"{counts['hvp']:,}" if "hvp" in counts else None),
        ("Branch tokens", f"{counts['branch_tokens']:,}" if "branch_tokens" in counts else None),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def settings(result: Attribution) -> list[tuple[str, str]]:
    """All metadata, flat: ``("config.beta", "0.5")``. Very long values are cut."""
    return list(_flat("", result.metadata))


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [
            row
            for key, item in value.items()
            for row in _flat(f"{prefix}.{key}" if prefix else str(key), item)
        ]
    if prefix == "":
        return []
    text = _name(value) if prefix == "name" else _plain(value)
    return [(escape(prefix), shorten(escape(text), _LONGEST + 1))]


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None or value == {} else str(value)


def _name(value: Any) -> str:
    """A model's name; of a folder on a disk only its last part, since a page is passed on."""
    text = str(value or "")
    return Path(text).name if Path(text).is_absolute() else text


def _config(result: Attribution) -> dict[str, Any]:
    metadata: Any = result.metadata
    config: dict[str, Any] = metadata.get("config", {})
    return config

"""Weights of curvature and information by what masking really costs (paper Theorem 3).

The score of a set of tokens R is the sum of theirs. `beta` and `gamma` that explain best what the
target's log-probability loses when R is masked are

    argmin_{beta, gamma >= 0}  sum_R ( drop(R) - sum_{i in R} gate_i (beta S_i + gamma I_i) )^2,

a least-squares problem of two unknowns, convex, and with one solution unless both parts are
multiples of each other. Its sets are all single tokens, whose drops every attribution has measured,
and random stretches of the prompt, where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heat_fast.checks import check_whole, is_whole
from heat_fast.combine import Components, combine
from heat_fast.config import HeatConfig
from heat_fast.drops import check_drops, check_model
from heat_fast.errors import InputError
from heat_fast.forward import log_probs, picked, undisturbed
from heat_fast.information import replacement
from heat_fast.provenance import identity
from heat_fast.result import Attribution

#: Settings that may differ between attributions which are calibrated together: they change neither
#: what the parts are nor what they are compared with.
_FREE = ("variant", "beta", "gamma", "seed", "token_budget", "response_chunk", "kernels")


@dataclass(frozen=True)
class Calibration:
    """`beta` and `gamma >= 0`, in nats per unit of their part, and how much they explain.

    `explained`: `1 - sum (drop - score)^2 / sum drop^2` over the `drops` sets that were compared; 0
    is what scores of 0 would explain, 1 an exact account.
    """

    beta: float
    gamma: float
    explained: float
    drops: int


def calibrate(
    results: Attribution | Iterable[Attribution],
    model: Any = None,
    *,
    spans: int = 0,
    seed: int = 0,
) -> Calibration:
    """The `beta` and `gamma` with which scores come nearest to measured drops (paper Theorem 3).

    results: one attribution or several, of one model and with the same settings but for `beta`,
    `gamma` and the seed; the gradient's share stays as `alpha` says. Every target and token is one
    measured drop, in nats. `spans`: as many
    random stretches of 2 to N/2 tokens of each prompt are masked together as well, one forward of
    `model` each.

    Raises InputError where there is nothing to calibrate by: no results, windows (whose parts are
    means over contexts of their own), `coverage` and `branch_tolerance` (which leave drops out, or
    approximate them), settings or models that differ, or `spans` without the model.

    Example:
        >>> import heat_fast
        >>> demo = heat_fast.load_demo_model()
        >>> prompts = [case.prompt for case in demo.examples[:2]]
        >>> attributor = heat_fast.Attributor(demo.model, demo.tokenizer, HeatConfig.preset("gs"))
        >>> found = calibrate([attributor.attribute(prompt) for prompt in prompts])
        >>> weighed = HeatConfig.preset("gs", beta=found.beta, gamma=found.gamma)
    """
    if not isinstance(results, (Attribution, Iterable)):
        raise InputError(
            f"results is {type(results).__name__}: expected an Attribution or several. Pass what "
            "heat_fast.attribute returns."
        )
    results = [results] if isinstance(results, Attribution) else list(results)
    config = _config(results)
    check_whole("seed", seed, least=0)
    if not is_whole(spans) or spans < 0 or (spans and model is None):
        raise InputError(
            f"spans={spans!r} with model={type(model).__name__}: expected a whole number of at "
            "least 0, and the model where stretches are to be masked. Pass both, or spans=0."
        )
    if spans:
        check_model(results[0].metadata, identity(model), "the attributions and the model")
    features, drops = [], []
    generator = torch.Generator().manual_seed(seed)
    for result in results:
        parts = _parts(result, config)
        parts, gradient = parts[:2], config.alpha * parts[2]
        features.append(parts.flatten(1))
        drops.append((result.log_prob_drop - gradient).flatten())
        for stretch, lost in _masked_spans(model, result, config, spans, generator):
            features.append(parts[..., stretch].sum(-1))
            drops.append(lost - gradient[:, stretch].sum(-1))
    return _fit(torch.cat(features, -1).double(), torch.cat(drops).double())


def _config(results: list[Attribution]) -> HeatConfig:
    """The settings that all of them share."""
    if not results:
        raise InputError("no attributions: expected one at least. Attribute a prompt first.")
    check_drops(results)
    for number, result in enumerate(results):
        if result.method is not None:
            raise InputError(
                f"attribution {number} is of the method {result.method!r}: expected those of "
                "heat_fast.attribute, which measure curvature and information. Pass these."
            )
        first, own = (dict(each.metadata["config"]) for each in (results[0], result))
        names = [name for name in own if name not in _FREE and own[name] != first.get(name)]
        if names:
            raise InputError(
                f"attributions 0 and {number} differ in {', '.join(names)}: expected the same "
                "settings. Calibrate them apart."
            )
    return HeatConfig.from_dict(results[0].metadata["config"])


def _parts(result: Attribution, config: HeatConfig) -> Tensor:
    """`gate S`, `gate I` and `gate |grad g|_1`, scaled as the configuration says, `[3, n, N]`."""
    measured = Components(
        result.gate,
        result.curvature,
        result.information,
        result.log_prob_drop,
        result.gradient_norm,
    )
    weights = torch.eye(3).tolist()
    alone = (config.replace(beta=beta, gamma=gamma, alpha=alpha) for beta, gamma, alpha in weights)
    return torch.stack([combine(measured, each)[0] for each in alone])


def _masked_spans(
    model: Any, result: Attribution, config: HeatConfig, spans: int, generator: torch.Generator
) -> Iterator[tuple[slice, Tensor]]:
    """Random stretches of the prompt, and what each target's log-probability loses, `[n]`."""
    count = len(result)
    if not spans or count < 2:
        return
    embed = model.get_input_embeddings()
    device = embed.weight.device
    with undisturbed(model, device):
        embeddings = embed(torch.tensor(result.context_ids, device=device))
        vector = replacement(embed, config.masking, config.sentinel_token, embeddings)

        def predicted(context: Tensor) -> Tensor:
            rows = log_probs(model, context, len(result.target_ids))
            return picked(rows, result.target_ids).cpu().to(result.log_prob_drop)

        whole = predicted(embeddings)
        for _ in range(spans):
            length = int(torch.randint(2, max(3, count // 2 + 1), (), generator=generator))
            start = int(torch.randint(count - length + 1, (), generator=generator))
            stretch = slice(start, start + length)
            masked = embeddings.clone()
            masked[stretch] = vector
            yield stretch, whole - predicted(masked)


def _fit(features: Tensor, drops: Tensor) -> Calibration:
    """Non-negative least squares of `drops [R]` by two `features [2, R]`, in closed form.

    The solution is that without the constraint, or the best of one feature alone, or 0.
    """
    # Parts of very different sizes would make one of them look like rounding.
    size = features.norm(dim=1)
    size = torch.where(size > 0, size, 1.0)
    features = features / size[:, None]
    gram, moment = features @ features.T, features @ drops
    corners = [torch.zeros_like(moment) for _ in range(3)]
    for index in range(2):
        if gram[index, index] > 0:
            corners[index][index] = (moment[index] / gram[index, index]).clamp_min(0)
    free = torch.linalg.lstsq(gram, moment[:, None], driver="gelsd").solution[:, 0]
    if bool((free >= 0).all()):
        corners.append(free)
    best = min(corners, key=lambda each: float((drops - each @ features).square().sum()))
    total = float(drops.square().sum())
    left = float((drops - best @ features).square().sum())
    explained = 1 - left / total if total else 0.0
    best = best / size
    return Calibration(float(best[0]), float(best[1]), explained, len(drops))

"""Agreement with interventions: what the target loses when a token's edges to it are patched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heat_fast.checks import check_whole
from heat_fast.decoder.norm import wide
from heat_fast.errors import InputError
from heat_fast.metrics._estimate import (
    Measurement,
    check_indices,
    check_number,
    check_pairs,
    check_vector,
    leading,
)
from heat_fast.metrics._model import Asker, Case, asking, read
from heat_fast.metrics.alignment import Tokens
from heat_fast.planner import collect
from heat_fast.ranks import spearman
from heat_fast.trunk import require_finite

REFERENCES = ("zero", "mean")


def patch_effects(
    model: Any, cases: Sequence[Case], *, reference: str = "zero", rows: int | None = None
) -> list[Tensor]:
    """What the target's log-probability loses when one token's edges to its position are patched.

        e_i = log P(target) - log P(target | K_i, V_i of every layer from the reference run)

    (HEAT paper, Table 13: residual-stream contributions "along incoming edges to the target token"
    replaced by a reference run's; which run is left open.) In the reference run of token i its
    embedding, and nothing else, is "zero" or the "mean" over the prompt. Only the position that
    predicts sees the patched keys and values; all other rows are those of the clean run, so that
    paths through later tokens stay. The last token has no edge but its own residual stream: its
    effect is that of replacing its embedding. Scores of the cases are not looked at.

    Returns `[N]` in float64 for each case, on the CPU; above 0 where the token helps the target.
    Cost: N runs of the prompt and N single rows on a cache of it; `rows` as in `soft_ns`. Raises
    `InputError` for cases of a single token or longer than the model's context, an unknown
    reference, and ids outside the vocabulary.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model(1).model
    >>> [effects] = patch_effects(model, [Case([5, 6, 7], 9, [1, 2, 3])])
    >>> effects.shape
    torch.Size([3])
    """
    if reference not in REFERENCES:
        raise InputError(
            f"reference is {reference!r}: expected one of {', '.join(REFERENCES)}. Choose one."
        )
    with asking(model, rows) as asker:
        checked = read(cases, asker)
        return [_effects(asker, case, reference, at) for at, (case, _) in enumerate(checked)]


def _effects(asker: Asker, case: Case, reference: str, number: int) -> Tensor:
    embeddings = asker.embeddings(case.token_ids)
    length = len(embeddings)
    if length < 2:
        raise InputError(
            f"case {number} has one token: expected at least 2, so that one has an edge to the "
            "other. Leave the case out."
        )
    replaced = embeddings.mean(0) if reference == "mean" else torch.zeros_like(embeddings[0])
    clean = _cache(asker.model, embeddings[None])
    whole = _log_prob(asker.model, embeddings[None, -1:], clean, case.target)

    def run(first: int, stop: int) -> Tensor:
        tokens = range(first, stop)
        if first == length - 1:
            return _log_prob(asker.model, replaced[None, None], clean, case.target)
        # Whole contexts: rotary frequencies may depend on the length.
        contexts = embeddings[None].repeat(len(tokens), 1, 1)
        for row, token in enumerate(tokens):
            contexts[row, token] = replaced
        patched = []
        for layer, other in zip(clean, _cache(asker.model, contexts), strict=True):
            pair = []
            for kept, found in zip(layer, other, strict=True):
                own = kept.repeat(len(tokens), 1, 1, 1)
                for row, token in enumerate(tokens):
                    own[row, :, token] = found[row, :, token]
                pair.append(own)
            patched.append((pair[0], pair[1]))
        last = embeddings[None, -1:].repeat(len(tokens), 1, 1)
        return _log_prob(asker.model, last, patched, case.target)

    def size(first: int) -> int:
        # The last token is a run of its own.
        return max(1, min(asker.budget.batch(length, length), length - 1 - first))

    return whole - collect(length, asker.budget, size, run)


Cache = list[tuple[Tensor, Tensor]]  # keys and values `[B, Hk, M, D]` of every layer


def _cache(model: Any, embeddings: Tensor) -> Cache:
    """What the rows of `[B, M, d]` but the last leave for the last."""
    from transformers import DynamicCache

    # Without the model's configuration all layers keep all rows, sliding ones too; their masks hide
    # what is too far away.
    cache: Any = DynamicCache()
    model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys[:, :, :-1], layer.values[:, :, :-1]) for layer in cache.layers]


def _log_prob(model: Any, row: Tensor, cache: Cache, target: int) -> Tensor:
    """`log P(target) [B]` after one more row `[B, 1, d]`."""
    from transformers import DynamicCache

    past = DynamicCache()
    for layer, (keys, values) in enumerate(cache):
        past.update(keys, values, layer)
    output = model(inputs_embeds=row, past_key_values=past, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1]
    found = torch.log_softmax(logits.to(wide(logits.dtype)), dim=-1)
    require_finite(found, "the logits of a patched prompt")
    return found[:, target].double().cpu()


def patch_corr(scores: Sequence[Any], effects: Sequence[Any], *, seed: int = 0) -> Measurement:
    """Spearman's rank correlation of scores and patch effects (HEAT paper, Patch-Corr).

    From -1 to 1, higher is better; equal values share the mean of their ranks. For each example
    `scores [N]` and `effects [N]`, as `patch_effects` gives them. Raises `InputError` where either
    is constant, for no ranking can then be told.

    >>> patch_corr([[0.1, 0.9, 0.5]], [[0.0, 2.0, 1.0]]).value
    1.0
    """
    found = []
    for number, (one, other) in enumerate(_read(scores, effects)):
        rho = spearman(one, other)
        if rho is None:
            raise InputError(
                f"the scores or the effects of example {number} are all equal: expected a ranking. "
                "Leave the example out."
            )
        found.append(rho)
    return Measurement.of(found, seed=seed)


def intervention_at_k(
    scores: Sequence[Any], effects: Sequence[Any], *, k: int = 5, seed: int = 0
) -> Measurement:
    """Mean patch effect of the k tokens of the highest scores (HEAT paper, Intervention@5).

    In nats, higher is better; of equal scores the earlier token leads; a shorter prompt counts all
    its tokens. Tokens are patched one at a time: the paper does not say whether it patches them
    together.

    >>> intervention_at_k([[0.1, 0.9, 0.5]], [[0.0, 2.0, 1.0]], k=2).value
    1.5
    """
    count = check_whole("k", k)
    return Measurement.of(
        [float(other[leading(one, count)].mean()) for one, other in _read(scores, effects)],
        seed=seed,
    )


def misattribution(
    scores: Sequence[Any],
    effects: Sequence[Any],
    *,
    k: int = 10,
    threshold: float = 0.01,
    seed: int = 0,
) -> Measurement:
    """Share of the k leading tokens whose patch effect is below a threshold in nats.

    (HEAT paper, misattribution rate: top 10, 0.01.) From 0 to 1, lower is better.

    >>> misattribution([[0.1, 0.9, 0.5]], [[0.0, 2.0, 0.001]], k=2).value
    0.5
    """
    count = check_whole("k", k)
    least = check_number("threshold", threshold, -math.inf, math.inf)
    return Measurement.of(
        [
            float((other[leading(one, count)] < least).double().mean())
            for one, other in _read(scores, effects)
        ],
        seed=seed,
    )


def causal_pass_at_k(
    scores: Sequence[Any], evidence: Sequence[Tokens], *, k: int = 5, seed: int = 0
) -> Measurement:
    """Share of examples with an evidence token among the k leading ones after an intervention.

    (HEAT paper, Causal Pass@5.) From 0 to 1, higher is better. `scores [N]` are those of the
    intervened prompt. The paper patches the values of one middle layer, at a place it does not
    name, from a context with the evidence into one without; a method that sees the prompt alone
    cannot be given such a state. Here the intervention is the prompt's: attribute the distracting
    context with the evidence's tokens put in the place of its own, and pass their indices.

    >>> causal_pass_at_k([[0.1, 0.9, 0.5], [0.9, 0.1, 0.0]], [[1], [2]], k=1).value
    0.5
    """
    count = check_whole("k", k)
    check_pairs(scores=scores, evidence=evidence)
    found = []
    for number, (row, gold) in enumerate(zip(scores, evidence, strict=True)):
        values = check_vector(row, f"example {number}")
        chosen = check_indices(gold, len(values), f"evidence of example {number}")
        found.append(float(bool({*leading(values, count)} & {*chosen})))
    return Measurement.of(found, seed=seed)


def _read(scores: Sequence[Any], effects: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    check_pairs(scores=scores, effects=effects)
    found = []
    for number, (row, other) in enumerate(zip(scores, effects, strict=True)):
        values = check_vector(row, f"example {number}")
        wanted = len(values)
        found.append((values, check_vector(other, f"effects of example {number}", tokens=wanted)))
    return found

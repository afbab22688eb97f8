"""How steady scores are: under noise, rephrasing, other decoding and windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heat_fast.checks import check_whole
from heat_fast.errors import InputError
from heat_fast.metrics._estimate import (
    Measurement,
    bootstrap,
    check_index,
    check_number,
    check_pairs,
    check_vector,
    generator,
)
from heat_fast.metrics._model import Asker, Case
from heat_fast.ranks import spearman

if TYPE_CHECKING:
    from heat_fast.result import Attribution

#: The settings that the HEAT paper decodes with: 54, each with three seeds there.
DECODING_GRID: tuple[dict[str, Any], ...] = tuple(
    {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": penalty}
    for temperature, top_p, top_k, penalty in product(
        (0.2, 0.5, 0.9), (0.8, 0.9, 0.95), (20, 50, 100), (1.0, 1.2)
    )
)


def sensitivity(
    model: Any,
    attribute: Callable[[Any, Sequence[int], int], Any],
    prompts: Sequence[tuple[Sequence[int], int]],
    *,
    noise: float = 0.01,
    samples: int = 8,
    normalize: bool = False,
    seed: int = 0,
) -> Measurement:
    """How far scores move under Gaussian noise on the input embeddings.

        Sensitivity = 1 / N * sum_i sigma_i

    (HEAT paper Eq. 19), `sigma_i` the standard deviation of token i's score over `samples` noisy
    runs, as estimated from a sample (divided by samples - 1). Not negative, lower is better, in
    the unit of the scores: methods are compared with `normalize=True`, which divides every run's
    scores by the sum of their absolute values. `noise`: the standard deviation of the noise, in
    the unit of the embeddings; the paper does not give its own.

    `attribute(model, token_ids, target)` gives the N scores, of any method; `prompts`: ids and the
    target that is explained in all runs. The noise is added to what the embedding layer returns
    for the prompt, by a hook that is gone afterwards; of longer inputs that begin with the prompt,
    to its tokens. Noise depends on `seed`, the example and the sample alone.

    Raises `InputError` for fewer than two samples, for noise that is not positive and for scores
    of the wrong length, not finite, or all 0 where they are normalised.

    >>> import heat_fast, torch
    >>> model = heat_fast.load_demo_model().model
    >>> sensitivity(model, lambda model, ids, target: torch.ones(len(ids)), [([5, 6], 9)]).value
    0.0
    """
    check_whole("samples", samples, 2)
    check_number("noise", noise, 0, float("inf"))
    if len(prompts) == 0:
        raise InputError("no prompt was given: expected at least one. Pass (token_ids, target).")
    asker, found = Asker(model, None), []
    for number, (token_ids, target) in enumerate(prompts):
        where, runs = f"prompt {number}", []
        ids = asker.plain(Case(token_ids, target, None), where).token_ids
        for sample in range(samples):
            shape = len(ids), asker.embed.weight.shape[-1]
            drawn = torch.randn(
                shape, generator=generator(seed, number, sample), dtype=torch.float32
            )
            with _noisy(asker.embed, ids, noise * drawn):
                scores = attribute(model, token_ids, target)
            row = check_vector(scores, where, tokens=len(ids))
            total = float(row.abs().sum())
            if normalize and total == 0:
                raise InputError(
                    f"all scores of prompt {number} are 0: expected some mass to divide by. Pass "
                    "normalize=False, or leave the prompt out."
                )
            runs.append(row / total if normalize else row)
        found.append(float(torch.stack(runs).std(0).mean()))
    return Measurement.of(found, seed=seed)


@contextmanager
def _noisy(embed: Any, token_ids: Sequence[int], noise: Tensor) -> Iterator[None]:
    """Add noise `[N, d]` where the embedding layer is given the prompt."""
    count, wanted = len(token_ids), torch.tensor(list(token_ids))

    def add(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        given = inputs[0]
        if given.shape[-1] < count or not bool((given[..., :count].cpu() == wanted).all()):
            return None
        moved = output.clone()
        moved[..., :count, :] += noise.to(output)
        return moved

    handle = embed.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


Pairs = Sequence[tuple[int, int]]


def align_tokens(tokens: Sequence[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of indices of tokens that read the same in both, ascending in the first.

    Case and surrounding white space do not count (nor the signs that stand for it in tokenizers'
    vocabularies); the k-th occurrence in one belongs to the k-th in the other; tokens that occur in
    one alone, such as an auxiliary verb, have no partner.

    >>> align_tokens(["The", " cat", " ate", " it"], ["It", " was", " the", " cat"])
    [(0, 2), (1, 3), (3, 0)]
    """

    def plain(token: str) -> str:
        return token.strip(" \t\n\u0120\u010a\u2581").lower()

    places: dict[str, list[int]] = {}
    for index, token in enumerate(others):
        places.setdefault(plain(token), []).append(index)
    found = []
    for index, token in enumerate(tokens):
        word = plain(token)
        if word and places.get(word):
            found.append((index, places[word].pop(0)))
    return found


def active_passive(
    scores: Sequence[Any], others: Sequence[Any], pairs: Sequence[Pairs], *, seed: int = 0
) -> Measurement:
    """Rank correlation between the scores of a sentence and of its rephrasing.

        Robustness = rho( score of token i, score of its partner ),   Spearman's

    (HEAT paper Eq. 20). From -1 to 1, higher is better. For each example `scores [N]`, `others
    [N']` and the pairs of corresponding tokens, from `align_tokens` or by hand; the paper does not
    say how it aligns. Equal scores share the mean of their ranks. `seed`: of the bootstrap.

    Raises `InputError` for fewer than two pairs, tokens outside a prompt or paired twice, scores
    that are not finite, and where all scores of one side are equal.

    >>> active_passive([[0.1, 0.2, 0.7]], [[0.6, 0.3, 0.1]], [[(0, 2), (1, 1), (2, 0)]]).value
    1.0
    """
    check_pairs(scores=scores, others=others, pairs=pairs)
    found = []
    for number, (row, other, aligned) in enumerate(zip(scores, others, pairs, strict=True)):
        sides = []
        for side, values in enumerate((row, other)):
            vector = check_vector(values, f"example {number}")
            what = f"alignment of example {number}"
            index = [check_index(pair[side], len(vector), what) for pair in aligned]
            if len(index) < 2 or len(set(index)) < len(index):
                raise InputError(
                    f"the {what} has {len(index)} pairs, of {len(set(index))} tokens: expected at "
                    "least two, each token once. Correct it, or leave the example out."
                )
            sides.append(vector[index])
        correlation = spearman(*sides)
        if correlation is None:
            raise InputError(
                f"all aligned scores of one side of example {number} are equal: expected scores "
                "that can be ranked. Leave the example out."
            )
        found.append(round(correlation, 12))
    return Measurement.of(found, seed=seed)


def decoding_stability(
    reference: Measurement, others: Sequence[Measurement], *, seed: int = 0
) -> Measurement:
    """The largest relative change of a metric over decoding settings, in percent.

        Delta% = 100 * max_s | m_s - m | / | m |

    (HEAT paper, robustness to decoding hyperparameters; its grid is `DECODING_GRID`). Not negative,
    lower is better. `m` is the metric, any of this package, on the answers of one reference setting
    (the paper does not name its own; greedy decoding is a good one), `m_s` on the same examples
    decoded otherwise. The standard error draws the same examples of all settings. `per_example`:
    each example's own largest change, infinite where its reference is 0.

    Raises `InputError` where there is no other setting, the examples differ in number, or the
    reference is 0.

    >>> change = decoding_stability(Measurement.of([2.0]), [Measurement.of([2.1])])
    >>> round(change.value, 6)
    5.0
    """
    if not others or any(len(each) != len(reference) for each in others):
        raise InputError(
            f"{len(others)} other settings, of {[len(each) for each in others]} examples: expected "
            f"at least one, of {len(reference)} each. Measure the same examples in every setting."
        )
    if reference.value == 0:
        raise InputError(
            "the metric of the reference is 0: expected a value to divide by. Choose another "
            "reference, or compare differences."
        )
    rows = torch.tensor(
        [reference.per_example, *(each.per_example for each in others)], dtype=torch.float64
    )

    def largest(means: Tensor) -> Tensor:
        changed: Tensor = 100 * (means[1:] - means[0]).abs().amax(0) / means[0].abs()
        return changed

    # The values themselves need not be means: a log ratio is not.
    value = 100 * max(abs(each.value - reference.value) for each in others) / abs(reference.value)
    return Measurement(value, bootstrap(rows, largest, seed), tuple(largest(rows).tolist()))


def window_leakage(
    windowed: Sequence[Attribution],
    exact: Sequence[Attribution] | None = None,
    *,
    seed: int = 0,
) -> Measurement:
    """How much a prompt's windows lose.

        sum_i |a_i - b_i| / sum_i (a_i + b_i)     over tokens that two windows in a row share
        eps_M = max_i |M_i - M~_i|                with `exact`

    (HEAT paper, window leakage; Theorem 4's assumption for eps_M). From 0 to 1, lower is better.
    The first, which the attribution itself reports, needs no second run (`heat_fast.windows`); a
    prompt of one window leaks 0, and of windows that `window_tolerance` left out nothing is known.
    The second compares the gate `M~` with that of one context, as
    `heat_fast.bounds` does; the mean over targets. `seed`: of the bootstrap.

    Raises `InputError` where results are of different prompts or targets, there is none, or one
    left no two windows in a row to compare.

    >>> import heat_fast
    >>> model, cut = heat_fast.load_demo_model().model, {"window": 12, "sink": 1, "tail": 3}
    >>> result = heat_fast.attribute(model, None, list(range(5, 25)), 9, "win", probes=1, **cut)
    >>> 0 < window_leakage([result]).value < 1
    True
    """
    if len(windowed) == 0:
        raise InputError("no result was given: expected at least one. Pass a list of them.")
    if exact is None:
        return Measurement.of([_leakage(result) for result in windowed], seed=seed)
    check_pairs(windowed=windowed, exact=exact)
    found = []
    for number, (one, other) in enumerate(zip(windowed, exact, strict=True)):
        if one.token_ids != other.token_ids or one.target_ids != other.target_ids:
            raise InputError(
                f"results {number} are of different prompts or targets: expected the same tokens. "
                "Attribute one prompt twice, with the target written out."
            )
        found.append(float((one.gate - other.gate).abs().amax(-1).mean()))
    return Measurement.of(found, seed=seed)


def _leakage(result: Attribution) -> float:
    told: Any = result.metadata.get("windows")
    if told is None or len(told["stretches"]) == 1:
        return 0.0
    if told["leakage"] is None:
        raise InputError(
            "the leakage of a result is not known: expected two windows in a row that were swept, "
            f"got {told['not_swept']} left out of {len(told['stretches'])}. Lower window_tolerance."
        )
    return float(told["leakage"])

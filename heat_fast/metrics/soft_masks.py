"""Whether what scores call important matters to the model: embeddings are masked at random by them.

All take `Case`s: a prompt's ids, the next token that was explained, a score for every token; run in
batches of at most `rows` token rows (None: a choice that suits the device). `keep_first` leaves
that many first tokens alone: the first token is often an attention sink, and to lose it costs more
than its meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heat_fast.checks import check_whole
from heat_fast.errors import InputError, NumericalError
from heat_fast.metrics._estimate import Measurement, bootstrap, generator
from heat_fast.metrics._model import Asker, Case, asking, read

# Float32 runs of one prompt in batches of different shapes were up to 4e-7 apart.
_ROUNDING = 1e-6


def soft_ns(
    model: Any,
    cases: Sequence[Case],
    *,
    masks: int = 32,
    normalize: str = "minmax",
    keep_first: int = 0,
    rows: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Soft normalised sufficiency: how much of the prediction the retained elements preserve.

        Soft-NS = E max(0, H_0 - H(P, P')) / H_0,   e'_ij = e_ij * Bernoulli(a_i)

    (Zhao and Shan 2024, after Zhao and Aletras 2023). H is the Hellinger distance between
    next-token distributions, `P'` that of the masked embeddings, `H_0` the distance of the prompt
    whose embeddings are all 0. From 0 to 1, higher is better. `a [N]` are the scores brought into
    0 to 1. The source leaves open how: `normalize="minmax"` takes (s - min) / (max - min), and 1/2
    where all scores are equal; `"sum"` takes s / sum(s) of scores that are not negative; `"none"`
    takes scores that already lie there.

    The mean over `masks` masks replaces the source's single one; each is clipped at 0 before. Masks
    depend on `seed`, the example and the mask's number alone: methods compared with one seed are
    compared on the same random numbers. Deterministic on a device up to rounding.

    Raises `InputError` for prompts longer than the model's context, for scores of the wrong length,
    not finite or outside what `normalize` takes, and `NumericalError` where the zeroed prompt
    changes nothing (`H_0` = 0).

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model().model
    >>> 0 <= soft_ns(model, [Case([5, 6, 7], 9, [0.1, 0.7, 0.2])], masks=4).value <= 1
    True
    """
    return _soft(model, cases, False, masks, normalize, keep_first, rows, seed)


def soft_nc(
    model: Any,
    cases: Sequence[Case],
    *,
    masks: int = 32,
    normalize: str = "minmax",
    keep_first: int = 0,
    rows: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Soft normalised comprehensiveness: what the prediction loses with the important elements.

        Soft-NC = E H(P, P'') / H_0,   e''_ij = e_ij * Bernoulli(1 - a_i)

    (Zhao and Shan 2024). Not below 0, and above 1 where a mask does more than zeroing the whole
    prompt; higher is better. A mask is the complement of `soft_ns`'s mask of the same number.
    Arguments and errors are those of `soft_ns`.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model().model
    >>> soft_nc(model, [Case([5, 6, 7], 9, [0.1, 0.7, 0.2])], masks=4).value > 0
    True
    """
    return _soft(model, cases, True, masks, normalize, keep_first, rows, seed)


def log_ratio(measured: Measurement, random: Measurement, *, seed: int = 0) -> Measurement:
    """A metric as the log of its ratio to that of a random attribution of the same examples.

        log( mean over examples of measured / mean over examples of random )

    (Zhao and Shan 2024 report Soft-NS and Soft-NC so). Unbounded, 0 for chance, higher is better.
    Means are divided, for a ratio of single examples may have 0 below it. The standard error draws
    examples in pairs and holds the uncertainty of both. `per_example` holds each example's own log
    ratio: infinite where one of the two is 0, not a number where both are.

    Raises `InputError` where the examples differ in number, a value is negative or both means
    are 0.

    >>> log_ratio(Measurement.of([0.5]), Measurement.of([0.5])).value
    0.0
    """
    if len(measured) != len(random):
        raise InputError(
            f"{len(measured)} and {len(random)} examples: expected the same ones. Measure both on "
            "one list of cases."
        )
    rows = torch.tensor([measured.per_example, random.per_example], dtype=torch.float64)
    if float(rows.min()) < 0 or float(rows.mean(-1).max()) == 0:
        raise InputError(
            "a negative value, or both means are 0: expected values whose ratio has a logarithm. "
            "Measure more examples or masks, or take the difference of the values."
        )
    each = (rows[0] / rows[1]).log()
    means = rows.mean(-1)
    error = bootstrap(rows, lambda drawn: (drawn[0] / drawn[1]).log(), seed)
    return Measurement(float((means[0] / means[1]).log()), error, tuple(each.tolist()))


def random_cases(cases: Sequence[Case], *, seed: int = 0) -> list[Case]:
    """The same prompts and targets with uniform random scores, 0 to 1.

    >>> len(random_cases([Case([5, 6, 7], 9, [0, 0, 0])])[0].scores)
    3
    """
    return [
        replace(
            case,
            scores=torch.rand(
                len(case.token_ids), generator=generator(seed, number), dtype=torch.float32
            ),
        )
        for number, case in enumerate(cases)
    ]


def _soft(
    model: Any,
    cases: Sequence[Case],
    complement: bool,
    masks: int,
    normalize: str,
    keep_first: int,
    rows: int | None,
    seed: int,
) -> Measurement:
    check_whole("masks", masks)
    check_whole("keep_first", keep_first, 0)
    found = []
    with asking(model, rows) as asker:
        for number, (case, scores) in enumerate(read(cases, asker)):
            embeddings = asker.embeddings(case.token_ids)
            retained = _retention(scores, normalize, number)[:, None]

            def masked(
                which: int,
                number: int = number,
                embeddings: Tensor = embeddings,
                retained: Tensor = retained,
            ) -> Tensor:
                if which == masks:
                    mask = torch.zeros(embeddings.shape, dtype=torch.bool)
                else:
                    source = generator(seed, number, which)
                    uniform = torch.rand(embeddings.shape, generator=source, dtype=torch.float64)
                    mask = (uniform < retained) != complement
                mask[:keep_first] = True
                return embeddings * mask.to(embeddings)

            distances = _distances(asker, embeddings, masked, masks + 1)
            nothing = float(distances[-1])
            if keep_first >= len(embeddings) or nothing <= _ROUNDING:
                raise NumericalError(
                    f"case {number}: the prompt with all embeddings 0 is predicted like the prompt "
                    "itself, expected a difference to divide by. Leave it out, or lower keep_first."
                )
            share = distances[:-1] / nothing
            share = share if complement else (1 - share).clamp(min=0)
            found.append(float(share.mean()))
    return Measurement.of(found, seed=seed)


def _distances(
    asker: Asker, embeddings: Tensor, make: Callable[[int], Tensor], count: int
) -> Tensor:
    """Hellinger distances `[count]` of the perturbed prompts' predictions from the prompt's own."""
    kept: list[Tensor] = []

    def remember(log_probs: Tensor) -> Tensor:
        kept.append(log_probs)
        return log_probs[:, 0]

    length = len(embeddings)
    asker.after([length], lambda which: embeddings, remember)
    own = (kept[-1] / 2).exp()

    def distance(log_probs: Tensor) -> Tensor:
        apart: Tensor = ((log_probs / 2).exp() - own).norm(dim=-1) / math.sqrt(2)
        return apart

    return asker.after([length] * count, make, distance)


def _retention(scores: Tensor, normalize: str, number: int) -> Tensor:
    """Probabilities of retention `[N]`, 0 to 1."""
    if normalize == "minmax":
        low, high = scores.min(), scores.max()
        return (scores - low) / (high - low) if high > low else torch.full_like(scores, 0.5)
    if normalize not in ("sum", "none"):
        raise InputError(
            f"normalize={normalize!r}: expected 'minmax', 'sum' or 'none'. Choose one."
        )
    least, most, total = float(scores.min()), float(scores.max()), float(scores.sum())
    if least < 0 or (normalize == "none" and most > 1) or (normalize == "sum" and total == 0):
        wanted = "scores from 0 to 1" if normalize == "none" else "a positive mass"
        raise InputError(
            f"the scores of case {number} run from {least:g} to {most:g}: expected {wanted} with "
            f"normalize={normalize!r}. Pass normalize='minmax'."
        )
    return scores / total if normalize == "sum" else scores

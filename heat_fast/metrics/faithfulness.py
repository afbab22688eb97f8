"""Whether what scores call important matters to the model: prompts are perturbed by their order.

All take `Case`s: a prompt's ids, the next token that was explained, a score for every token. All
perturbations are of input embeddings, run in batches of at most `rows` token rows (None: a choice
that suits the device). `keep_first` leaves that many first tokens alone: the first token is often
an attention sink, and to lose it costs more than its meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heat_fast.errors import InputError, NumericalError
from heat_fast.information import replacement
from heat_fast.metrics._estimate import (
    Measurement,
    bootstrap,
    check_count,
    check_number,
    generator,
    leading,
)
from heat_fast.metrics._model import Asker, Case, asking, read

#: The shares of tokens that DeYoung et al. delete.
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)


# --- soft masks -----------------------------------------------------------------------------------


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

    Raises `InputError` for scores of the wrong length, not finite or outside what `normalize`
    takes, and `NumericalError` where the zeroed prompt changes nothing (`H_0` = 0).

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
        replace(case, scores=torch.rand(len(case.token_ids), generator=generator(seed, number)))
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
    check_count("masks", masks)
    check_count("keep_first", keep_first, 0)
    found = []
    with asking(model, rows) as asker:
        for number, (case, scores) in enumerate(read(cases, asker.vocabulary)):
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
            if nothing == 0:
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


# --- deletion -------------------------------------------------------------------------------------


def comprehensiveness(
    model: Any,
    cases: Sequence[Case],
    *,
    fraction: float = 0.2,
    keep_first: int = 0,
    rows: int | None = None,
    seed: int = 0,
) -> Measurement:
    """What the target's probability loses with the leading tokens deleted from the prompt.

        p(target | x) - p(target | x without the leading tokens)

    (DeYoung et al. 2020). From -1 to 1, higher is better. `fraction` of the tokens, rounded, at
    least one, and never all, are deleted: later tokens move up. Of equal scores the earlier token
    leads. `seed`: of the bootstrap. Raises `InputError` for prompts of one token, and for scores
    of the wrong length or not finite.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model().model
    >>> -1 <= comprehensiveness(model, [Case([5, 6, 7], 9, [0.1, 0.7, 0.2])]).value <= 1
    True
    """
    return _deletion(model, cases, (fraction,), False, keep_first, rows, seed)


def sufficiency(
    model: Any,
    cases: Sequence[Case],
    *,
    fraction: float = 0.2,
    keep_first: int = 0,
    rows: int | None = None,
    seed: int = 0,
) -> Measurement:
    """What the target's probability loses with only the leading tokens left in the prompt.

        p(target | x) - p(target | the leading tokens alone)

    (DeYoung et al. 2020). From -1 to 1, lower is better. Arguments and errors are those of
    `comprehensiveness`; the tokens of `keep_first` stay in the prompt beside the leading ones.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model().model
    >>> -1 <= sufficiency(model, [Case([5, 6, 7], 9, [0.1, 0.7, 0.2])]).value <= 1
    True
    """
    return _deletion(model, cases, (fraction,), True, keep_first, rows, seed)


def aopc_fractions(
    model: Any,
    cases: Sequence[Case],
    *,
    fractions: Sequence[float] = FRACTIONS,
    keep_first: int = 0,
    rows: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Area over the perturbation curve, tokens deleted by fractions.

        AOPC = 1 / |B| * sum_{b in B} ( p(target | x) - p(target | x without the leading b) )

    (DeYoung et al. 2020: comprehensiveness over the fractions B; there the sum is divided by
    |B| + 1, which counts the unperturbed prompt, a 0, as well: multiply by |B| / (|B| + 1) to
    compare). From -1 to 1, higher is better. Arguments and errors are those of `comprehensiveness`.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model().model
    >>> -1 <= aopc_fractions(model, [Case([5, 6, 7], 9, [0.1, 0.7, 0.2])]).value <= 1
    True
    """
    return _deletion(model, cases, tuple(fractions), False, keep_first, rows, seed)


def aopc_order(
    model: Any,
    cases: Sequence[Case],
    *,
    steps: int | None = None,
    masking: str = "zero",
    sentinel_token: int | None = None,
    keep_first: int = 0,
    rows: int | None = None,
    seed: int = 0,
) -> Measurement:
    """Area over the perturbation curve, tokens masked one after the other.

        AOPC = 1 / (L + 1) * sum_{k=0..L} ( p(target | x) - p(target | x without the first k) )

    with the attribution's ranking as the deletion order, as the HEAT paper words it; the equation
    is that of Samek et al. 2017. From -1 to 1, higher is better. The paper does not say what takes
    a deleted token's place: here it is masked as in HEAT's information term, `masking` "zero",
    "mean" or "sentinel", and keeps its position. L is `steps`, or all tokens. Other arguments and
    errors are those of `comprehensiveness`.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model().model
    >>> -1 <= aopc_order(model, [Case([5, 6, 7], 9, [0.1, 0.7, 0.2])]).value <= 1
    True
    """
    check_count("keep_first", keep_first, 0)
    if steps is not None:
        check_count("steps", steps)
    if masking not in ("zero", "mean", "sentinel"):
        raise InputError(f"masking={masking!r}: expected 'zero', 'mean' or 'sentinel'. Choose one.")
    found = []
    with asking(model, rows) as asker:
        for number, (case, scores) in enumerate(read(cases, asker.vocabulary)):
            embeddings = asker.embeddings(case.token_ids)
            vector = replacement(asker.embed, masking, sentinel_token, embeddings)
            order = _order(scores, keep_first, number)[:steps]

            def perturbed(
                which: int,
                embeddings: Tensor = embeddings,
                order: list[int] = order,
                vector: Tensor = vector,
            ) -> Tensor:
                context = embeddings.clone()
                context[order[:which]] = vector
                return context

            lengths = [len(embeddings)] * (len(order) + 1)
            probability = asker.after(lengths, perturbed, _of(case.target))
            found.append(float((probability[0] - probability).mean()))
    return Measurement.of(found, seed=seed)


def aopc_counterfactual(
    model: Any,
    cases: Sequence[Case],
    foils: Sequence[tuple[Sequence[int], int]],
    **settings: Any,
) -> Measurement:
    """Area over the perturbation curve of counterfactual prompts, in the original's order.

        AOPC of `aopc_order` for p(foil target | foil prompt), scores those of the original prompt

    (HEAT paper, counterfactual AOPC). From -1 to 1, higher is better: an attribution that marks
    the causal tokens marks those of the edited prompt too. `foils`: for every case the ids of its
    prompt with the answer's span replaced by one of as many tokens, and the token that now
    follows. The paper leaves open of which prediction the area is taken; this is the literal
    reading. `settings` are those of `aopc_order`.

    Raises `InputError` also where a foil is of another length than its prompt, or equals it.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model().model
    >>> case = Case([5, 6, 7], 9, [0.1, 0.7, 0.2])
    >>> -1 <= aopc_counterfactual(model, [case], [([5, 8, 7], 10)]).value <= 1
    True
    """
    if len(cases) != len(foils):
        raise InputError(
            f"{len(cases)} cases and {len(foils)} foils: expected one foil for each case, the pair "
            "of its token ids and its target. Pass as many."
        )
    edited = []
    for number, (case, (token_ids, target)) in enumerate(zip(cases, foils, strict=True)):
        if len(token_ids) != len(case.token_ids) or list(token_ids) == list(case.token_ids):
            raise InputError(
                f"foil {number} has {len(token_ids)} tokens, its prompt {len(case.token_ids)}: "
                "expected as many, and at least one that differs, so that scores keep their "
                "tokens. Replace the answer by one of as many tokens."
            )
        edited.append(Case(token_ids, target, case.scores))
    return aopc_order(model, edited, **settings)


def _deletion(
    model: Any,
    cases: Sequence[Case],
    fractions: tuple[float, ...],
    leave: bool,
    keep_first: int,
    rows: int | None,
    seed: int,
) -> Measurement:
    """The mean loss over fractions, with the leading tokens deleted, or alone left (`leave`)."""
    check_count("keep_first", keep_first, 0)
    if not fractions:
        raise InputError("no fraction was given: expected at least one. Pass (0.2,), say.")
    for fraction in fractions:
        check_number("fraction", fraction, 0, 1)
    found = []
    with asking(model, rows) as asker:
        for number, (case, scores) in enumerate(read(cases, asker.vocabulary)):
            embeddings = asker.embeddings(case.token_ids)
            everyone = list(range(len(scores)))
            order = _order(scores, keep_first, number)
            contexts = [everyone]
            for fraction in fractions:
                most = len(order) if leave or keep_first else len(order) - 1
                if most == 0:
                    raise InputError(
                        f"case {number} has one token: expected at least two, so that one is left "
                        "to predict from. Leave the case out."
                    )
                chosen = set(order[: min(most, max(1, round(fraction * len(order))))])
                others = set(order) - chosen
                gone = others if leave else chosen
                contexts.append([token for token in everyone if token not in gone])

            def some(
                which: int,
                embeddings: Tensor = embeddings,
                contexts: list[list[int]] = contexts,
            ) -> Tensor:
                return embeddings[contexts[which]]

            lengths = [len(each) for each in contexts]
            probability = asker.after(lengths, some, _of(case.target))
            found.append(float((probability[0] - probability[1:]).mean()))
    return Measurement.of(found, seed=seed)


def _order(scores: Tensor, keep_first: int, number: int) -> list[int]:
    """The tokens that may be perturbed, highest score first."""
    order = [token for token in leading(scores, len(scores)) if token >= keep_first]
    if not order:
        raise InputError(
            f"keep_first={keep_first} leaves no token of case {number} to perturb: expected less "
            f"than its {len(scores)} tokens. Lower it."
        )
    return order


def _of(target: int) -> Callable[[Tensor], Tensor]:
    """What picks the probability of a token."""

    def pick(log_probs: Tensor) -> Tensor:
        return log_probs[:, target].exp()

    return pick

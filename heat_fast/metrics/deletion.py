"""Whether what scores call important matters to the model: tokens are deleted in their order.

Arguments are those of `soft_masks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from heat_fast.checks import check_whole
from heat_fast.errors import InputError
from heat_fast.information import replacement
from heat_fast.metrics._estimate import Measurement, check_number, leading
from heat_fast.metrics._model import Asker, Case, asking, read

#: The shares of tokens that DeYoung et al. delete.
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)


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
    leads. `seed`: of the bootstrap. Raises `InputError` for prompts of one token or longer than the
    model's context, and for scores of the wrong length or not finite.

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
    check_whole("keep_first", keep_first, 0)
    if steps is not None:
        check_whole("steps", steps)
    if masking not in ("zero", "mean", "sentinel"):
        raise InputError(f"masking={masking!r}: expected 'zero', 'mean' or 'sentinel'. Choose one.")
    found = []
    with asking(model, rows) as asker:
        for number, (case, scores) in enumerate(read(cases, asker)):
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
    asker, edited = Asker(model, None), []
    for number, (case, (token_ids, target)) in enumerate(zip(cases, foils, strict=True)):
        own = asker.plain(case, f"case {number}").token_ids
        foil = asker.plain(Case(token_ids, target, case.scores), f"foil {number}")
        if len(foil.token_ids) != len(own) or foil.token_ids == own:
            raise InputError(
                f"foil {number} has {len(foil.token_ids)} tokens, its prompt {len(own)}: "
                "expected as many, and at least one that differs, so that scores keep their "
                "tokens. Replace the answer by one of as many tokens."
            )
        edited.append(foil)
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
    check_whole("keep_first", keep_first, 0)
    if not fractions:
        raise InputError("no fraction was given: expected at least one. Pass (0.2,), say.")
    for fraction in fractions:
        check_number("fraction", fraction, 0, 1)
    found = []
    with asking(model, rows) as asker:
        for number, (case, scores) in enumerate(read(cases, asker)):
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

"""What an attribution is good for: prompts cut down to what it points at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from heat_fast.errors import InputError
from heat_fast.metrics._estimate import Measurement, check_number, check_vector
from heat_fast.metrics._model import Case, asking, read


def snippet(scores: Any, mass: float = 0.4) -> list[int]:
    """The fewest tokens that hold a share of the total score, in the order of the prompt.

    (HEAT paper, tool use: "the top-p attribution mass tokens", p = 0.4.) `scores [N]` not negative;
    of equal ones the earlier token first. Raises `InputError` for a mass not in 0 < p <= 1, and for
    scores that are negative, not finite or all 0.

    >>> snippet([0.1, 0.3, 0.2, 0.4], 0.6)
    [1, 3]
    """
    share = check_number("mass", mass, 0, 1)
    values = check_vector(scores, "the prompt", least=0)
    total = float(values.sum())
    if total == 0:
        raise InputError("all scores are 0: expected some mass to share out. Leave the prompt out.")
    order = torch.argsort(values, descending=True, stable=True)
    # What rounding adds to a sum is no reason for another token.
    short = values[order].cumsum(0) < share * total * (1 - 1e-12)
    return sorted(order[: int(short.sum()) + 1].tolist())


def filter_delta(
    model: Any, cases: Sequence[Case], *, drop: float = 0.6, rows: int | None = None, seed: int = 0
) -> Measurement:
    """Exact match with the least important tokens masked, less that of the whole prompt.

        EM(embeddings of the floor(drop N) tokens of the lowest scores at 0) - EM(prompt)

    (HEAT paper, fact-checking EM: "masks the bottom 60% tokens".) From -1 to 1, higher is better;
    EM is 1 where the target is the likeliest next token. The paper gives percentage points, 100
    times this. Of equal scores the later token is masked first. Scores of either sign.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model(1).model
    >>> filter_delta(model, [Case([5, 6, 7], 9, [1, 2, 3])], drop=0.1).value
    0.0
    """
    check_number("drop", drop, 0, 1)
    share = Fraction(str(drop))  # 0.7 as it is written: its float is a little less

    def masked(embeddings: Tensor, scores: Tensor) -> Tensor:
        order = torch.argsort(scores, descending=True, stable=True)
        kept = order[: len(scores) - math.floor(share * len(scores))].to(embeddings.device)
        found = torch.zeros_like(embeddings)
        found[kept] = embeddings[kept]
        return found

    return _delta(model, cases, masked, rows, seed)


def snippet_delta(
    model: Any, cases: Sequence[Case], *, mass: float = 0.4, rows: int | None = None, seed: int = 0
) -> Measurement:
    """Hit@1 with nothing but the tokens that hold most of the score, less that of the whole prompt.

    (HEAT paper, tool use Hit@1.) As `filter_delta`, with all tokens outside `snippet(scores, mass)`
    taken out. The hit is the next token: a tool of one's own is called with the text of `snippet`.

    >>> import heat_fast
    >>> model = heat_fast.load_demo_model(1).model
    >>> snippet_delta(model, [Case([5, 6, 7], 9, [1, 2, 3])], mass=1).value
    0.0
    """
    check_number("mass", mass, 0, 1)
    return _delta(
        model, cases, lambda embeddings, scores: embeddings[snippet(scores, mass)], rows, seed
    )


def _delta(model: Any, cases: Sequence[Case], cut: Any, rows: int | None, seed: int) -> Measurement:
    found = []
    with asking(model, rows) as asker:
        for case, scores in read(cases, asker):
            embeddings = asker.embeddings(case.token_ids)
            contexts = [embeddings, cut(embeddings, scores)]
            sizes = [len(each) for each in contexts]
            target = case.target

            def hit(log_probs: Tensor, target: int = target) -> Tensor:
                return (log_probs.argmax(-1) == target).double()

            whole, less = asker.after(sizes, contexts.__getitem__, hit).tolist()
            found.append(less - whole)
    return Measurement.of(found, seed=seed)

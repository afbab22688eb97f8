"""One row of a data set: a prompt, what follows it, and where the evidence lies, in characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heat_fast.errors import InputError

# Half-open range of characters of the prompt.
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A prompt with its target and, where the data set knows them, the parts of the prompt.

    `target` starts as it continues the prompt, a leading space included: `prompt + target` is the
    text. `evidence`: spans that bear the target; `distractor`: spans that do not; `support`: the
    segment that holds the evidence (the second of the curated prompts); all index `prompt`. Empty
    where unknown. `extra`: what else a metric needs (a rewritten prompt, a counterfactual answer).

    Raises `InputError` for an empty prompt or target and for spans outside the prompt.

    Example:
        >>> example = Example("1", "The sky is blue. The sky is", " blue", evidence=((11, 15),))
        >>> example.texts("evidence")
        ['blue']
    """

    id: str
    prompt: str
    target: str
    evidence: tuple[Span, ...] = ()
    distractor: tuple[Span, ...] = ()
    support: tuple[Span, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "target"):
            if not getattr(self, name).strip():
                raise InputError(
                    f"example {self.id!r} has no {name}: expected some text. Leave the example out."
                )
        for name in ("evidence", "distractor", "support"):
            for start, stop in getattr(self, name):
                if not 0 <= start < stop <= len(self.prompt):
                    raise InputError(
                        f"{name} of example {self.id!r} has the span ({start}, {stop}): expected "
                        f"0 <= start < stop <= {len(self.prompt)}, characters of its prompt. "
                        "Correct the span."
                    )

    def texts(self, part: str) -> list[str]:
        """The text of each span of `evidence`, `distractor` or `support`."""
        return [self.prompt[start:stop] for start, stop in getattr(self, part)]


def tokens_in(offsets: Sequence[tuple[int, int] | None], spans: Sequence[Span]) -> list[int]:
    """Indices of the tokens that share a character with any span.

    `offsets`: half-open characters of each token, as `Attribution.offsets`; None (a special token)
    and an empty range lie in no span.

    >>> tokens_in([(0, 3), (3, 7), (7, 10)], [(4, 8)])
    [1, 2]
    """
    return [
        index
        for index, pair in enumerate(offsets)
        if pair is not None
        and pair[0] < pair[1]
        and any(pair[0] < stop and start < pair[1] for start, stop in spans)
    ]

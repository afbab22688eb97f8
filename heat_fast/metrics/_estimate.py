"""What every metric returns, how sure it is, and what it accepts.

The standard error is a bootstrap's: examples are drawn again with replacement, `RESAMPLES` times,
and the spread of the statistic over the draws is the error. What varies inside an example (masks,
noise) is averaged before and so is part of that spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy
import torch
from torch import Tensor

from heat_fast.checks import check_whole, is_whole
from heat_fast.errors import InputError

#: Draws of the bootstrap.
RESAMPLES = 1000


@dataclass(frozen=True)
class Measurement:
    """A metric over some examples.

    value: the metric; stderr: its standard error by bootstrap over the examples, None where there
    is only one; per_example: its value on each example, in the order they came in.

    Example:
        >>> Measurement.of([0.25, 0.75]).value
        0.5
    """

    value: float
    stderr: float | None
    per_example: tuple[float, ...]

    @classmethod
    def of(cls, per_example: Sequence[float], *, seed: int = 0) -> Measurement:
        """The mean over examples."""
        rows = torch.tensor(list(per_example), dtype=torch.float64)[None]
        stderr = bootstrap(rows, lambda means: means[0], seed)
        return cls(float(rows.mean()), stderr, tuple(float(each) for each in per_example))

    def __len__(self) -> int:
        return len(self.per_example)


def bootstrap(rows: Tensor, statistic: Callable[[Tensor], Tensor], seed: int) -> float | None:
    """Standard error of `statistic(means)` for paired values `rows [k, examples]`, float64.

    `statistic` takes the means over examples `[k, draws]` and gives `[draws]`. None for one
    example; not a number where the statistic is infinite in a draw.
    """
    count = rows.shape[-1]
    if count < 2:
        return None
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator(seed))
    means = torch.stack([row[drawn].mean(-1) for row in rows])
    return float(statistic(means).std())


def generator(seed: int, *numbers: int) -> torch.Generator:
    """Random numbers of their own for (seed, example, mask, ...), on the CPU: the same on every
    device and in every batch; the global random state is neither read nor changed."""
    state = numpy.random.SeedSequence([check_seed(seed), *numbers]).generate_state(1, numpy.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def check_seed(seed: Any) -> int:
    """The seed, or an error."""
    return check_whole("seed", seed, 0)


def check_number(name: str, value: Any, least: float, most: float) -> float:
    """A finite number above `least` and at most `most`, or an error."""
    right = isinstance(value, Real) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not least < value <= most:
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise InputError(f"{name}={value!r}: expected a number above {least:g}{limit}. Pass one.")
    return float(value)


def check_vector(
    values: Any, where: str, *, tokens: int | None = None, least: float = -math.inf
) -> Tensor:
    """Scores as float64 `[N]` on the CPU: finite, of the right length and not below `least`."""
    try:
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the scores of {where} are {type(values).__name__}: expected N numbers. Pass a "
            "vector, such as result.scores."
        ) from error
    if found.dim() != 1 or len(found) == 0 or (tokens is not None and len(found) != tokens):
        wanted = "N numbers" if tokens is None else f"{tokens}, one for each token"
        raise InputError(
            f"the scores of {where} have shape {tuple(found.shape)}: expected {wanted}. Score "
            "every token of the prompt, special tokens included."
        )
    finite = torch.isfinite(found)
    if not bool(finite.all()):
        at = int((~finite).nonzero()[0])
        raise InputError(
            f"score {at} of {where} is {float(found[at])}: expected finite numbers. Look for a "
            "division by zero where the scores were made."
        )
    if float(found.min()) < least:
        at = int(found.argmin())
        raise InputError(
            f"score {at} of {where} is {float(found[at]):g}: expected none below {least:g}, for "
            "shares of a total are taken. Pass their absolute values, or their positive part."
        )
    return found


def check_indices(tokens: Iterable[Any], length: int, what: str) -> list[int]:
    """Indices of tokens, ascending and each once: at least one, all inside a prompt."""
    found = sorted({check_index(each, length, what) for each in tokens})
    if not found:
        raise InputError(
            f"the {what} is empty: expected at least one token, for nothing can be compared with "
            "none. Leave the example out."
        )
    return found


def check_index(token: Any, length: int, what: str) -> int:
    """The index of a token, or an error."""
    if not is_whole(token) or not 0 <= token < length:
        raise InputError(
            f"token {token!r} of the {what} is not in the prompt: expected indices from 0 to "
            f"{length - 1}. Count tokens, not characters."
        )
    return int(token)


def check_pairs(**sequences: Sequence[Any]) -> int:
    """How many examples there are, or an error where sequences differ or are empty."""
    lengths = {name: len(each) for name, each in sequences.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(
            f"{told}: expected one entry for each example, and at least one example. Pass "
            "sequences of the same length."
        )
    return next(iter(lengths.values()))


def leading(scores: Tensor, count: int) -> list[int]:
    """The `count` tokens of the highest scores, highest first; of equals the earlier one first."""
    order: list[int] = torch.argsort(scores, descending=True, stable=True)[:count].tolist()
    return order

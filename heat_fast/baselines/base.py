"""What the baselines share: one call, one result, one registry by name."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from heat_fast.attributor import Attributor
from heat_fast.baselines.case import Case
from heat_fast.checks import nearest
from heat_fast.errors import ConfigError
from heat_fast.fields import check_settings, integer, setting
from heat_fast.forward import check_in_memory, on_cpu, undisturbed
from heat_fast.kernels.dispatch import using
from heat_fast.provenance import provenance
from heat_fast.readable import readable_tokens
from heat_fast.result import COMPONENTS, Attribution

#: What may take the place of a token's embedding, as in `HeatConfig`.
Replacement = Literal["zero", "mean"]

_METHODS: dict[str, type[Baseline]] = {}
Method = TypeVar("Method", bound="type[Baseline]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline(ABC):
    """A method with its settings; calling it attributes one prompt.

    `seed`: of what is drawn at random; methods that draw nothing ignore it. The global random
    state is neither read nor changed.
    """

    name: ClassVar[str]

    seed: int = setting(0, integer(minimum=0, maximum=2**63 - 1))

    def __post_init__(self) -> None:
        check_settings(self)

    @abstractmethod
    def scores(self, case: Case) -> Tensor | dict[str, Tensor]:
        """The scores `[T, N]`, or named `[T, N]` arrays of the result with `target_scores`."""

    @on_cpu()
    def __call__(self, model: Any, tokenizer: Any, prompt: Any, target: Any = None) -> Attribution:
        """Attribute one prompt; arguments are those of `heat_fast.attribute`.

        In the result `scores` and `target_scores` are this method's; components of HEAT that it
        does not measure are 0, and `metadata["measured"]` names those that it does. Scores may be
        negative. Raises `InputError`, `ConfigError`, `UnsupportedModelError`, `NumericalError`.
        """
        Attributor(model, tokenizer)  # refuses what is no supported model or no tokenizer
        device = check_in_memory(model)
        started = time.perf_counter()
        with undisturbed(model, device), using("auto", device):
            case = Case.read(model, tokenizer, prompt, target)
            log_probs = case.pick(case.log_probs())[0]
            found = self.scores(case)
        arrays = found if isinstance(found, dict) else {"target_scores": found}
        metadata = self._metadata(case, sorted(arrays), time.perf_counter() - started)
        return as_result(case, case.targets, arrays, log_probs, metadata)

    def _metadata(self, case: Case, measured: list[str], seconds: float) -> dict[str, Any]:
        return {
            "config": {"variant": self.name, "aggregate": "mean", **dataclasses.asdict(self)},
            "measured": measured,
            "seed": self.seed,
            **provenance(case.model, case.embeddings),
            "seconds": {"total": round(seconds, 6)},
            "counts": dict(case.counts),
            **case.notes,
        }

    def _generator(self) -> torch.Generator:
        """Random numbers of its own, on the CPU: the same on every device."""
        return torch.Generator().manual_seed(self.seed)


def register(name: str) -> Any:
    """Put a method into the registry under `name`."""

    def add(method: Method) -> Method:
        method.name = name
        _METHODS[name] = method
        return method

    return add


def names() -> tuple[str, ...]:
    """Names of all baselines, sorted."""
    return tuple(sorted(_METHODS))


def get(name: str, **settings: Any) -> Baseline:
    """The baseline of that name with these settings.

    Raises `ConfigError` for an unknown name or setting, or a value that is not allowed.

    >>> get("integrated_gradients", steps=20).steps
    20
    """
    if name not in _METHODS:
        raise ConfigError(
            f"unknown baseline {name!r}: expected one of {', '.join(names())}. "
            + nearest(name, names())
        )
    method = _METHODS[name]
    known = [each.name for each in dataclasses.fields(method)]
    for given in settings:
        if given not in known:
            raise ConfigError(
                f"unknown setting {given!r} of {name}: expected one of {', '.join(known)}. "
                + nearest(given, known)
            )
    return method(**settings)


def as_result(
    case: Case,
    targets: tuple[int, ...],
    arrays: dict[str, Tensor],
    log_probs: Tensor,
    metadata: dict[str, Any],
) -> Attribution:
    """A result with these arrays; the components that are not among them are 0."""
    zeros, encoded = torch.zeros(len(targets), case.tokens), case.prompt
    components: dict[str, Any] = {**dict.fromkeys(COMPONENTS, zeros), **arrays}
    return Attribution(
        **components,
        token_ids=encoded.token_ids,
        tokens=encoded.tokens,
        offsets=encoded.offsets,
        prompt_text=encoded.text,
        special=encoded.special,
        roles=encoded.roles,
        target_ids=targets,
        target_tokens=readable_tokens(targets, case.tokenizer),
        target_log_probs=log_probs,
        metadata=metadata,
    )

"""Settings of an attribution: one frozen, validated record and its named presets.

A new field is one line in :class:`HeatConfig` (its default and its check stand together), a new
preset is one line in :data:`PRESETS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from heat_fast.checks import nearest, suggest
from heat_fast.errors import ConfigError
from heat_fast.fields import (
    OR_AUTO,
    OR_NONE,
    Check,
    automatic,
    below_one,
    check_settings,
    fraction,
    integer,
    number,
    one_of,
    optional,
    positive,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PRESETS", "HeatConfig", "Settings"]

Rollout = Literal["value_path", "input_path"]
Curvature = Literal["hessian", "gauss_newton", "grad_squared", "none"]
Estimator = Literal["block", "coded", "row", "low_rank"]
WindowWeights = Literal["probability", "uniform"]
RankScope = Literal["sequence", "token"]
Masking = Literal["zero", "mean", "sentinel"]
Normalize = Literal["sum"]
Aggregate = Literal["mean", "max", "sum"]
Kernels = Literal["auto", "native", "triton", "reference"]

#: What each named variant changes; whatever it does not name keeps the field's own default.
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "full": {},
        "lr": {"estimator": "low_rank"},
        # The paper's number for GPT-J-6B on long contexts and for Llama-3.1-70B.
        "ls": {"layers": 6},
        "win": {"window": 512},
        "lr+win": {"estimator": "low_rank", "window": 512},
        "ls+win": {"layers": 6, "window": 512},
        "gs": {"curvature": "grad_squared"},
    }
)


class _Unset:
    """Stands for "not given", so that a field left out can follow the variant's preset."""

    def __repr__(self) -> str:
        return "<the variant's value>"


_UNSET: Final[Any] = _Unset()


def _variant(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in PRESETS:
        expected = "the name of a preset, " + " or ".join(repr(preset) for preset in PRESETS)
        raise ConfigError(
            f"unknown variant {value!r}: expected {expected}. {nearest(value, PRESETS)}"
        )
    return value


def _spec(default: Any, check: Check) -> Mapping[str, Any]:
    """A field's own default and its check, as its metadata."""
    return {"default": default, "check": check}


class Settings(TypedDict, total=False):
    """The fields of `HeatConfig` but `variant` as keyword arguments, for editors and checkers."""

    beta: float
    gamma: float
    alpha: float
    rollout: Rollout
    curvature: Curvature
    estimator: Estimator
    probes: int | Literal["auto"]
    probes_max: int
    top_k: int
    confidence: float
    codes: int | Literal["auto"]
    layers: int | None
    window: int | None
    overlap: float
    sink: int
    tail: int
    window_weights: WindowWeights
    window_tolerance: float | None
    rank: int
    rank_scope: RankScope
    passes: Literal[1, 2]
    sketch: float
    masking: Masking
    sentinel_token: int | None
    normalize: Normalize | None
    aggregate: Aggregate
    coverage: float | None
    branch_tolerance: float | None
    seed: int
    token_budget: int | None
    response_chunk: int | None
    kernels: Kernels


class _Replaced(Settings, total=False):
    variant: str


@dataclasses.dataclass(frozen=True)
class HeatConfig:
    """Everything that decides the result of an attribution, besides model, prompt and target.

    The score of context token i is ``gate[i] * (beta * curvature[i] + gamma * information[i]
    + alpha * |grad_i g|_1)`` (paper Eq. 5, with the optional first-order term of Eq. 22).

    A field that is left out takes the value of the variant's preset and, where the preset does
    not name it, the default given here; ``HeatConfig(variant="gs")`` and
    ``HeatConfig.preset("gs")`` are therefore equal.

    Fields
    ------
    variant: name of a preset, see :data:`PRESETS`. Default ``"full"``.
    beta, gamma, alpha: weights of curvature, information and gradient norm; finite, not
        negative, not all zero. Defaults 0.5, 0.5, 0.
    rollout: ``"value_path"`` (default) or ``"input_path"``: which attention flow the gate uses.
    curvature: ``"hessian"`` (default), ``"gauss_newton"``, ``"grad_squared"`` or ``"none"``.
    estimator: how the Hessian's curvature is measured: ``"block"`` (default; paper Eq. 3),
        ``"coded"``, an estimate of the same quantity whose cost does not grow with the prompt,
        ``"row"`` or ``"low_rank"``. ``"row"`` is another functional and no estimate of it: the l1
        norm of ``(H r)_i`` over all columns of the Hessian, where ``"block"`` takes token i's own.
        ``"low_rank"`` takes the blocks of a randomized rank-k approximation of the Hessian, which
        underestimates them. See :mod:`heat_fast.lowrank`.
    probes: Rademacher probes of the curvature estimator, at least 1, or ``"auto"``: rounds of
        probes, at most `probes_max`, until the order of the `top_k` highest scores is settled
        with `confidence`. Defaults 10; 64, 10 and 0.95. Gauss-Newton curvature, whose probes share
        one sample of the logits' derivative, takes `probes_max` where it says ``"auto"``.
    codes: sign codes of the ``"coded"`` estimator, at least 2 there, or ``"auto"``: as many as
        the measured noise asks for. Default 8. Only ``"coded"`` reads it.
    layers: None (default: all), or how many of the last blocks gate and curvature go through:
        the residual stream that enters them takes the place of the embeddings X, in the gradient
        too. Learned positions are a constant beside X, so that all blocks give what None gives;
        a model with fewer blocks is taken whole. Information is that of the whole model.
    window: None (default: the whole prompt at once), or the prompt tokens that are run together: a
        longer prompt is cut into windows, see :mod:`heat_fast.windows`.
    overlap: share of a window's stretch that the next one repeats, from 0 to below 1. Default 0.5.
    sink, tail: first and last tokens of the prompt that every window keeps. Defaults 1 and 64.
    window_weights: ``"probability"`` (default): what a window finds counts in proportion to the
        probability that it gives the target; ``"uniform"``: all windows count alike (the paper's
        Algorithm 1), those too that do not predict the target.
    window_tolerance: None (default: exact), or a number between 0 and 1: windows of no greater
        weight than that count as nothing, and their curvature and information cost nothing. See
        :mod:`heat_fast.windows`.
    rank, sketch: rank of the ``"low_rank"`` estimator, at least 1, and how many test vectors it
        takes as a multiple of the rank, at least 1. Defaults 64 and 2. Only ``"low_rank"`` reads
        them.
    rank_scope: ``"sequence"`` (default): one approximation of that rank for the Hessian of all
        prompt tokens; ``"token"``: one for every token's own block.
    passes: 1 (default): test vectors and their products alone; 2: as many products again with an
        orthonormal basis of the first, nearer to the best approximation.
    masking: what replaces a token's embedding for its information: ``"zero"`` (default),
        ``"mean"`` (of the vocabulary's embeddings) or ``"sentinel"``.
    sentinel_token: the token id used by ``masking="sentinel"``, required there and refused
        elsewhere. Default None.
    normalize: None (default; Eq. 5 as written) or ``"sum"`` (curvature and information each
        divided by its own sum over tokens before they are mixed).
    aggregate: how several targets become one score per token: ``"mean"`` (default), ``"max"``
        or ``"sum"`` (paper Eq. 23).
    coverage: None (default: the information of every token), or the share, between 0 and 1, of
        the information part of the score that has to be measured: tokens with small gates are
        left out once they are unlikely to hold the rest. See :mod:`heat_fast.screening`.
    branch_tolerance: None (default: exact), or a positive number: where a masked prompt's
        residual stream differs from the prompt's own by less than that share (l2 norm), nothing
        more is computed. See :mod:`heat_fast.screening`.
    seed: seed of the probes and of the audits of screening, 0 to 2^63 - 1. Default 0.
    token_budget: token rows run in one batch; None (default) leaves the choice to the planner.
    response_chunk: None (default: all target tokens at once), or how many of them are explained at
        a time: less memory for a long response, and a run of the prompt and its branches for every
        chunk. Scores change by rounding only, save that ``"auto"`` counts are chosen for each
        chunk.
    kernels: ``"auto"`` (default): the compiled kernels wherever they serve, Triton's on a GPU and
        the extension's on the CPU, torch elsewhere; ``"triton"``, ``"native"``: the same, and an
        error where those are missing or the model is elsewhere; ``"reference"``: torch alone.
        Like `token_budget` it changes speed and memory; the result changes by rounding only.

    A choice that the others make void is refused: an `estimator` other than ``"block"`` without
    ``curvature="hessian"``, a `sentinel_token` without ``masking="sentinel"``, a `rank_scope` or
    `passes` other than the default without ``estimator="low_rank"``. Amounts of sampling
    (`probes`, `probes_max`, `top_k`, `confidence`, `codes`, `rank`, `sketch`, `seed`) may be set
    where nothing is sampled, and the shape of windows (`overlap`, `sink`, `tail`), their
    `window_weights` and `window_tolerance` where there are none, so that one set of them serves
    every variant; they are then without effect.

    Raises
    ------
    ConfigError: for a wrong type or value, an unknown variant, or settings that contradict
        each other.

    >>> HeatConfig(variant="gs").curvature
    'grad_squared'
    >>> HeatConfig.preset("full", probes=4).replace(beta=1.0).beta
    1.0
    """

    variant: str = "full"
    beta: float = field(default=_UNSET, metadata=_spec(0.5, number(minimum=0)))
    gamma: float = field(default=_UNSET, metadata=_spec(0.5, number(minimum=0)))
    alpha: float = field(default=_UNSET, metadata=_spec(0.0, number(minimum=0)))
    rollout: Rollout = field(default=_UNSET, metadata=_spec("value_path", one_of(Rollout)))
    curvature: Curvature = field(default=_UNSET, metadata=_spec("hessian", one_of(Curvature)))
    estimator: Estimator = field(default=_UNSET, metadata=_spec("block", one_of(Estimator)))
    probes: int | Literal["auto"] = field(
        default=_UNSET, metadata=_spec(10, automatic(integer(minimum=1, also=OR_AUTO)))
    )
    probes_max: int = field(default=_UNSET, metadata=_spec(64, integer(minimum=1)))
    top_k: int = field(default=_UNSET, metadata=_spec(10, integer(minimum=1)))
    confidence: float = field(default=_UNSET, metadata=_spec(0.95, fraction(0.95)))
    codes: int | Literal["auto"] = field(
        default=_UNSET, metadata=_spec(8, automatic(integer(minimum=1, also=OR_AUTO)))
    )
    layers: int | None = field(
        default=_UNSET, metadata=_spec(None, optional(integer(minimum=1, also=OR_NONE)))
    )
    window: int | None = field(
        default=_UNSET, metadata=_spec(None, optional(integer(minimum=1, also=OR_NONE)))
    )
    overlap: float = field(default=_UNSET, metadata=_spec(0.5, below_one))
    sink: int = field(default=_UNSET, metadata=_spec(1, integer(minimum=0)))
    tail: int = field(default=_UNSET, metadata=_spec(64, integer(minimum=0)))
    window_weights: WindowWeights = field(
        default=_UNSET, metadata=_spec("probability", one_of(WindowWeights))
    )
    window_tolerance: float | None = field(
        default=_UNSET, metadata=_spec(None, optional(fraction(0.01)))
    )
    rank: int = field(default=_UNSET, metadata=_spec(64, integer(minimum=1)))
    rank_scope: RankScope = field(default=_UNSET, metadata=_spec("sequence", one_of(RankScope)))
    passes: Literal[1, 2] = field(default=_UNSET, metadata=_spec(1, integer(minimum=1, maximum=2)))
    sketch: float = field(default=_UNSET, metadata=_spec(2.0, number(minimum=1)))
    masking: Masking = field(default=_UNSET, metadata=_spec("zero", one_of(Masking)))
    sentinel_token: int | None = field(
        default=_UNSET, metadata=_spec(None, optional(integer(minimum=0, also=OR_NONE)))
    )
    normalize: Normalize | None = field(
        default=_UNSET, metadata=_spec(None, optional(one_of(Normalize, also=OR_NONE)))
    )
    aggregate: Aggregate = field(default=_UNSET, metadata=_spec("mean", one_of(Aggregate)))
    coverage: float | None = field(default=_UNSET, metadata=_spec(None, optional(fraction(0.95))))
    branch_tolerance: float | None = field(
        default=_UNSET, metadata=_spec(None, optional(positive(0.02)))
    )
    seed: int = field(default=_UNSET, metadata=_spec(0, integer(minimum=0, maximum=2**63 - 1)))
    token_budget: int | None = field(
        default=_UNSET, metadata=_spec(None, optional(integer(minimum=1, also=OR_NONE)))
    )
    response_chunk: int | None = field(
        default=_UNSET, metadata=_spec(None, optional(integer(minimum=1, also=OR_NONE)))
    )
    kernels: Kernels = field(default=_UNSET, metadata=_spec("auto", one_of(Kernels)))

    def __post_init__(self) -> None:
        preset = PRESETS[_variant("variant", self.variant)]
        for spec in dataclasses.fields(self):
            if getattr(self, spec.name) is _UNSET:
                value = preset.get(spec.name, spec.metadata["default"])
                object.__setattr__(self, spec.name, value)
        check_settings(self)
        self._check_together()

    def _check_together(self) -> None:
        """Reject settings that are valid one by one and useless together."""
        if self.beta == 0 and self.gamma == 0 and self.alpha == 0:
            raise ConfigError(
                "beta, gamma and alpha are all 0, so every score would be 0: expected at least "
                "one positive weight. Raise one of them (beta=0.5, gamma=0.5 are the defaults)."
            )
        if self.curvature == "none" and self.gamma == 0 and self.alpha == 0:
            raise ConfigError(
                "curvature='none' with gamma=0 and alpha=0 leaves nothing to score: expected a "
                "positive gamma or alpha. Set one of them, or choose a curvature."
            )
        if self.masking == "sentinel" and self.sentinel_token is None:
            raise ConfigError(
                "masking='sentinel' needs sentinel_token, got None: expected the id of the token "
                "that replaces the masked one. Pass sentinel_token=<id>, or masking='zero'."
            )
        if self.masking != "sentinel" and self.sentinel_token is not None:
            raise ConfigError(
                f"sentinel_token={self.sentinel_token} has no effect with "
                f"masking={self.masking!r}: expected masking='sentinel' beside it. Set that, or "
                "leave sentinel_token out."
            )
        if self.curvature != "hessian" and self.estimator != "block":
            raise ConfigError(
                f"estimator={self.estimator!r} has no effect with curvature={self.curvature!r}: "
                "expected curvature='hessian' beside it, the only one that is estimated so. Set "
                "that, or leave estimator out."
            )
        if self.window is not None and self.window < self.sink + self.tail + 1:
            raise ConfigError(
                f"window={self.window} has no room for a token beside sink={self.sink} and "
                f"tail={self.tail}: expected at least {self.sink + self.tail + 1}. Widen the "
                "window, or shorten the tail."
            )
        if self.window_tolerance is not None and self.window_weights == "uniform":
            raise ConfigError(
                f"window_tolerance={self.window_tolerance} has no effect with "
                "window_weights='uniform': expected 'probability' beside it, because no window "
                "weighs less than another. Set that, or leave window_tolerance out."
            )
        screens = [name for name in ("coverage", "branch_tolerance") if getattr(self, name)]
        if self.window_tolerance is not None and screens:
            raise ConfigError(
                f"window_tolerance={self.window_tolerance} with {screens[0]}="
                f"{getattr(self, screens[0])}: expected one of them, because what is screened is "
                "told for the windows that were run. Leave one out."
            )
        if self.window_tolerance is not None:
            screens.append("window_tolerance")
        if self.response_chunk is not None and screens:
            raise ConfigError(
                f"response_chunk={self.response_chunk} with {screens[0]}="
                f"{getattr(self, screens[0])}: expected one of them, because it decides for "
                "all target tokens together. Leave one out."
            )
        if self.estimator == "coded" and self.codes != "auto" and self.codes < 2:
            raise ConfigError(
                f"estimator='coded' with codes={self.codes}: expected at least 2 codes, because "
                "the noise correction is a variance over codes. Raise codes."
            )

        if self.estimator != "low_rank":
            for name, default in (("rank_scope", "sequence"), ("passes", 1)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} has no effect with "
                        f"estimator={self.estimator!r}: expected estimator='low_rank' beside it. "
                        f"Set that, or leave {name} out."
                    )
        elif self.passes == 1 and self.sketch == 1:
            raise ConfigError(
                "sketch=1 with passes=1: expected more test vectors than the rank, because the "
                "single pass inverts a core whose smallest eigenvalues have to be cut off. Choose "
                "sketch=2, or passes=2."
            )

    @classmethod
    def preset(cls, name: str, **overrides: Unpack[Settings]) -> HeatConfig:
        """The named preset, with any field overridden.

        >>> HeatConfig.preset("gs", seed=3).curvature
        'grad_squared'
        """
        given: dict[str, Any] = {**overrides}
        if given.get("variant", name) != name:
            raise ConfigError(
                f"preset {name!r} was asked for with variant={given['variant']!r}: expected one "
                "name. Pass the variant once."
            )
        _check_names(given)
        return cls(**{**given, "variant": name})

    def replace(self, **overrides: Unpack[_Replaced]) -> HeatConfig:
        """A copy with some fields changed.

        A new ``variant`` brings its preset's values along; fields that differ from the present
        variant's preset are kept.

        >>> HeatConfig(probes=3).replace(variant="gs") == HeatConfig(variant="gs", probes=3)
        True
        """
        _check_names(overrides)
        base = type(self)(variant=self.variant)
        chosen: dict[str, Any] = {
            spec.name: getattr(self, spec.name)
            for spec in dataclasses.fields(self)
            if getattr(self, spec.name) != getattr(base, spec.name)
        }
        return type(self)(**({"variant": self.variant} | chosen | {**overrides}))

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as values that JSON can hold."""
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeatConfig:
        """The inverse of :meth:`to_dict`; a field that is missing follows the variant.

        >>> HeatConfig.from_dict(HeatConfig(seed=7).to_dict()).seed
        7
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"a configuration must be a mapping of field names to values, got "
                f"{type(values).__name__}. Pass what to_dict() returned."
            )
        _check_names(values)
        return cls(**values)


def _check_names(names: Iterable[str]) -> None:
    known = {spec.name for spec in dataclasses.fields(HeatConfig)}
    for name in names:
        if name == "config":
            raise ConfigError(
                "config is no setting: expected settings by their names, as probes=2. Pass a "
                "HeatConfig to Attributor(model, tokenizer, config), or its settings as "
                "**config.to_dict()."
            )
        if name not in known:
            raise ConfigError(
                f"unknown setting {name!r}: expected a field of HeatConfig. {suggest(name, known)}"
            )


def check_config(config: Any) -> None:
    """Raise `ConfigError` for anything but a `HeatConfig` or None."""
    if config is not None and not isinstance(config, HeatConfig):
        raise ConfigError(
            f"config is {type(config).__name__}: expected a HeatConfig. Write "
            "HeatConfig(probes=2), say, or HeatConfig.preset('gs')."
        )

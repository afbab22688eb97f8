"""The result of an attribution: what a user reads. How it is kept: `heat_fast.storage`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from heat_fast.checks import is_whole, suggest
from heat_fast.combine import AGGREGATES, aggregate
from heat_fast.errors import InputError, NumericalError
from heat_fast.files import write_file
from heat_fast.locate import check_range
from heat_fast.metadata import frozen, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from heat_fast.locate import TargetSpan
    from heat_fast.spans import InputSpan, Segment, Span

__all__ = ["Attribution", "TopToken"]

#: The arrays of shape [T, N], in the order they are shown.
COMPONENTS: Final = (
    "gate",
    "curvature",
    "information",
    "log_prob_drop",
    "gradient_norm",
    "envelope",
    "target_scores",
)
#: Those that every result has, and the one that some have.
ARRAYS: Final = (*COMPONENTS, "target_log_probs")
STDERR: Final = "curvature_stderr"


@dataclasses.dataclass(frozen=True)
class TopToken:
    """One line of a ranking: a prompt token, its score and its components, over all targets.

    share: its part of the scores of the whole prompt, 0 to 1; see :meth:`Attribution.shares`.
    Components that were not measured are 0; see :attr:`Attribution.measured`.
    """

    index: int
    token: str
    score: float
    share: float
    gate: float
    curvature: float
    information: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """How much each of N prompt tokens contributed to each of T target tokens.

    All arrays are float32 on the CPU. Those of shape [T, N], row t for target token t:

    gate: attention-value flow into the target's position, of which the whole context (the
        prompt and the target tokens before) receives 1: row 0 sums to 1; later rows leave out the
        share of the earlier target tokens, and sum to less. Of a prompt in several windows it is
        the weighted mean over the windows that hold the token, and sums to none of it; the other
        components are then means of what each window found times its weight
        (`heat_fast.windows`), also where they are in nats.
    curvature: S, the mean l1 norm of a token's block of the Hessian of the log-probability times
        a vector of signs (or what the settings put in its place).
    information: I, the KL divergence in nats after the token's embedding is replaced.
    log_prob_drop: log-probability of the target minus the one after replacement, nats; signed.
    gradient_norm: l1 norm of the gradient with respect to the token's embedding.
    envelope: ``gate * (beta * curvature + gamma * max(0, log_prob_drop))``.
    target_scores: the scores, ``gate * (beta * curvature + gamma * information + ...)``.

    token_ids, tokens, special: the prompt's ids, what a person reads, and which are special.
    offsets, prompt_text: half-open character ranges into the text; None where ids were given.
    target_ids, target_tokens, target_log_probs: the targets; log-probabilities [T] in nats; of
        several windows see ``metadata["windows"]["target_of"]``.
    curvature_stderr: standard error of the curvature over its probes [T, N], in the units of
        `curvature`; 0 where it is exact, None where it is not known (a single probe, the
        Gauss-Newton sketch, a low-rank approximation), an upper bound where windows are averaged.
    information_skipped: for each prompt token, whether screening left its information out
        (`coverage`): its information and log_prob_drop are 0 and were not measured. None where
        all were.
    roles: of a prompt of chat messages, for each token the role of the message whose content it
        belongs to, None for what the chat template wrote around it. None for other prompts, and
        for templates that cannot be taken apart (`heat_fast.chat`).
    id: a name that the caller gave the result, in a file of many; None without one.
    metadata: configuration, seed, versions, device, dtype, model, seconds, FLOPs and counts;
        read-only and JSON-able.

    Arrays and metadata are copied when the result is made. Fields and metadata cannot be changed
    afterwards; the arrays are ordinary tensors, which torch cannot lock: do not write to them,
    change a ``clone()``. Indexing follows the prompt: ``result.scores[i]`` belongs to
    ``result.tokens[i]``.

    Raises
    ------
    InputError: shapes or lengths that do not agree, metadata that JSON cannot hold.
    NumericalError: a value that is not finite.

    >>> row = torch.tensor([[0.25, 0.75]])
    >>> result = Attribution(
    ...     **{name: row for name in COMPONENTS}, token_ids=(5, 6), tokens=("a", " b"),
    ...     offsets=None, prompt_text=None, special=(False, False), target_ids=(7,),
    ...     target_tokens=(" c",), target_log_probs=torch.tensor([-0.5]), metadata={},
    ... )
    >>> result.top(1)[0].token
    ' b'
    """

    gate: Tensor
    curvature: Tensor
    information: Tensor
    log_prob_drop: Tensor
    gradient_norm: Tensor
    envelope: Tensor
    target_scores: Tensor
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...] | None
    prompt_text: str | None
    special: tuple[bool, ...]
    target_ids: tuple[int, ...]
    target_tokens: tuple[str, ...]
    target_log_probs: Tensor
    metadata: Mapping[str, Any]
    curvature_stderr: Tensor | None = None
    information_skipped: tuple[bool, ...] | None = None
    roles: tuple[str | None, ...] | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        def store(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("token_ids", "tokens", "special", "target_ids", "target_tokens"):
            store(name, tuple(getattr(self, name)))
        if self.information_skipped is not None:
            store("information_skipped", tuple(map(bool, self.information_skipped)))
        if self.roles is not None:
            store("roles", tuple(self.roles))
        if self.offsets is not None:
            store("offsets", tuple((int(start), int(end)) for start, end in self.offsets))
        for name in self.array_names():
            array = getattr(self, name)
            if not isinstance(array, Tensor):
                raise InputError(f"{name} is {type(array).__name__}: expected a torch tensor.")
            store(name, array.detach().to("cpu", torch.float32, copy=True).contiguous())
        store("metadata", frozen(plain(self.metadata)))
        self._check()

    def _check(self) -> None:
        n_tokens, n_targets = len(self.token_ids), len(self.target_ids)
        if n_tokens == 0 or n_targets == 0:
            raise InputError(
                f"a result of {n_tokens} prompt and {n_targets} target tokens: expected at least "
                "one of each."
            )
        lengths = {
            "tokens": (self.tokens, n_tokens),
            "special": (self.special, n_tokens),
            "offsets": (self.offsets, n_tokens),
            "information_skipped": (self.information_skipped, n_tokens),
            "roles": (self.roles, n_tokens),
            "target_tokens": (self.target_tokens, n_targets),
        }
        for name, (values, expected) in lengths.items():
            if values is not None and len(values) != expected:
                raise InputError(f"{name} has {len(values)} entries: expected {expected}.")
        if any(not isinstance(role, str) for role in self.roles or () if role is not None):
            raise InputError("roles holds something else than names: expected text or None.")
        if self.id is not None and not isinstance(self.id, str):
            raise InputError(f"id is {type(self.id).__name__}: expected text, or None.")
        if self.offsets is not None:
            if self.prompt_text is None:
                raise InputError("offsets without prompt_text: expected the text they point into.")
            for start, end in self.offsets:
                if not 0 <= start <= end <= len(self.prompt_text):
                    raise InputError(
                        f"offset ({start}, {end}) lies outside a text of {len(self.prompt_text)} "
                        "characters: expected half-open ranges inside it."
                    )
        named = self.metadata.get("segments", {})
        if not isinstance(named, Mapping):
            raise InputError("metadata['segments'] is no mapping: expected names and ranges")
        for where in named.values():
            check_range(where, n_tokens, "prompt tokens")
        for name in self.array_names():
            array: Tensor = getattr(self, name)
            shape = (n_targets,) if name == "target_log_probs" else (n_targets, n_tokens)
            if tuple(array.shape) != shape:
                raise InputError(f"{name} has shape {tuple(array.shape)}: expected {shape}.")
            finite = torch.isfinite(array)
            if not bool(finite.all()):
                where = tuple((~finite).nonzero()[0].tolist())
                raise NumericalError(
                    f"{name}{list(where)} is {array[where].item()} in float32: expected a finite "
                    "number. Run the model in float32 or bfloat16, or look for the layer that "
                    "overflows."
                )

    def array_names(self) -> tuple[str, ...]:
        """Names of the arrays this result holds."""
        return ARRAYS if self.curvature_stderr is None else (*ARRAYS, STDERR)

    # --- reading --------------------------------------------------------------------------------

    @property
    def scores(self) -> Tensor:
        """The scores [N], aggregated over targets as the configuration says; each time anew."""
        return self.aggregated("target_scores")

    @property
    def context_ids(self) -> tuple[int, ...]:
        """What the model read: the prompt, and its response up to the last explained token."""
        response = self.metadata.get("response")
        ids = self.target_ids if response is None else response["token_ids"][: response["span"][1]]
        return (*self.token_ids, *ids[:-1])

    @property
    def lead_ids(self) -> tuple[int, ...]:
        """The part of the response before the first explained token."""
        context = self.context_ids
        return context[len(self.token_ids) : len(context) + 1 - len(self.target_ids)]

    @property
    def aggregate(self) -> str:
        """How targets are aggregated unless asked otherwise: the configuration's choice."""
        return str(self.metadata.get("config", {}).get("aggregate", "mean"))

    @property
    def method(self) -> str | None:
        """The name of the method of `heat_fast.baselines` whose scores these are; None: HEAT's."""
        if not isinstance(self.metadata.get("measured"), tuple):
            return None
        return str(self.metadata.get("config", {}).get("variant", "unknown"))

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the [T, N] arrays that hold measurements; the others are 0 and say nothing.

        All, unless the curvature was left out, or ``metadata["measured"]`` names what another
        method measured.
        """
        if self.method is not None:
            named = (*self.metadata["measured"], "target_scores")
            return tuple(name for name in COMPONENTS if name in named)
        left_out = self.metadata.get("config", {}).get("curvature") == "none"
        return tuple(name for name in COMPONENTS if not (left_out and name == "curvature"))

    def aggregated(self, name: str, how: str | None = None) -> Tensor:
        """One component over all targets, [N] (paper Eq. 23).

        name: one of the [T, N] arrays; how: ``"mean"``, ``"max"`` or ``"sum"``, by default the
        configuration's. Raises InputError for any other.
        """
        known = [each for each in self.array_names() if each != "target_log_probs"]
        if name not in known:
            raise InputError(
                f"unknown component {name!r}: expected one of the [targets, tokens] arrays. "
                + suggest(name, known)
            )
        how = self.aggregate if how is None else how
        if how not in AGGREGATES:
            raise InputError(
                f"unknown aggregate {how!r}: expected 'mean', 'max' or 'sum'. Choose one of these."
            )
        values: Tensor = getattr(self, name)
        return aggregate(values, how)

    @property
    def template(self) -> tuple[bool, ...]:
        """For each prompt token, whether the chat template wrote it and not a message."""
        return tuple(role is None for role in self.roles or ("",) * len(self))

    def top(self, k: int = 10, *, special: bool = True) -> list[TopToken]:
        """The k prompt tokens with the highest scores, highest first (all, where k exceeds N).

        Scores of other methods may be negative: such tokens count against the target. Rank and
        share then follow the magnitude, ``|score|``, and `score` keeps its sign: a token strongly
        against the target ranks beside those strongly for it. The page, the notebook's view, the
        terminal and the figures follow the same rule.

        `special=False` leaves out special tokens and those of the chat template; of a prompt that
        has no others nothing is left. Equal ones keep the order of the prompt. Components are
        aggregated like the scores.
        """
        if not is_whole(k) or k < 1:
            raise InputError(f"top({k!r}): expected a whole number of at least 1.")
        scores = self.scores
        order, shares = self.ranking(scores, special=special), self.shares(scores)
        columns = {name: self.aggregated(name) for name in ("gate", "curvature", "information")}
        return [
            TopToken(
                index=index,
                token=self.tokens[index],
                score=scores[index].item(),
                share=shares[index].item(),
                **{name: values[index].item() for name, values in columns.items()},
            )
            for index in order[:k]
        ]

    def ranking(self, scores: Tensor, *, special: bool = True) -> list[int]:
        """Prompt tokens by descending magnitude of some scores [N]; see :meth:`top`."""
        order: list[int] = torch.argsort(scores.abs(), descending=True, stable=True).tolist()
        if special:
            return order
        hidden = [a or b for a, b in zip(self.special, self.template, strict=True)]
        return [index for index in order if not hidden[index]]

    def shares(self, scores: Tensor | None = None) -> Tensor:
        """Each prompt token's part of some scores [N], by default :attr:`scores`; float64, 0 to 1.

            share[i] = |score[i]| / sum_j |score[j]|

        So they sum to 1, of signed scores too; where all scores are 0, they are 0. `top` says more.
        """
        sizes = (self.scores if scores is None else scores).double().abs()
        return sizes / sizes.sum() if bool(sizes.any()) else sizes

    # --- spans ----------------------------------------------------------------------------------

    def span(
        self,
        text: str | None = None,
        *,
        occurrence: int | None = None,
        characters: tuple[int, int] | None = None,
        tokens: tuple[int, int] | None = None,
        name: str | None = None,
    ) -> Span:
        """A stretch of the prompt with its summed score; see :func:`heat_fast.spans.find_span`."""
        from heat_fast.spans import find_span

        return find_span(
            self, text, occurrence=occurrence, characters=characters, tokens=tokens, name=name
        )

    def by_sentence(self, language: str = "en") -> list[Span]:
        """The prompt's sentences in order; see :func:`heat_fast.spans.sentences`."""
        from heat_fast.spans import sentences

        return sentences(self, language)

    def by_word(self) -> list[Span]:
        """The prompt's words in order; see :func:`heat_fast.spans.words`."""
        from heat_fast.spans import words

        return words(self)

    def by_role(self) -> list[Span]:
        """The stretches of each role of a chat, in order; see :func:`heat_fast.spans.roles`."""
        from heat_fast.spans import roles

        return roles(self)

    @property
    def segments(self) -> dict[str, tuple[int, int]]:
        """Tokens of the parts that were named with the prompt, half-open; empty where none were."""
        return dict(self.metadata.get("segments", {}))

    def by_segment(self, segments: Mapping[str, Segment] | None = None) -> dict[str, Span]:
        """Parts of the prompt by your own names; see :func:`heat_fast.spans.named_segments`."""
        from heat_fast.spans import named_segments

        return named_segments(self, segments)

    def with_segments(self, segments: Mapping[str, Segment]) -> Attribution:
        """The same result with names for parts of its prompt, which reports then tell the share of.

        Raises InputError as :func:`heat_fast.spans.named_segments` does.

        Example: ``result.with_segments({"manual": page}).to_html("why.html")``
        """
        named = {name: [part.start, part.stop] for name, part in self.by_segment(segments).items()}
        return dataclasses.replace(self, metadata={**self.metadata, "segments": named})

    def top_spans(self, k: int = 5) -> list[Span]:
        """The k stretches that stand out most; see :func:`heat_fast.spans.outstanding`."""
        from heat_fast.spans import outstanding

        return outstanding(self, k)

    def span_to_span(self, input_span: InputSpan, target_span: TargetSpan = None) -> float:
        """What a stretch of the prompt gave to a stretch of the target (paper Eq. 24).

        See :func:`heat_fast.spans.span_to_span`.
        """
        from heat_fast.spans import span_to_span

        return span_to_span(self, input_span, target_span)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        targets = ", ".join(
            f"{token!r} ({log_prob:.2f} nats)"
            for token, log_prob in zip(
                self.target_tokens[:3], self.target_log_probs[:3].tolist(), strict=True
            )
        )
        if len(self.target_ids) > 3:
            targets += f", ... {len(self.target_ids)} in all"
        top = ", ".join(f"{line.token!r} {line.score:.3g}" for line in self.top(3))
        variant = self.metadata.get("config", {}).get("variant", "?")
        return (
            f"Attribution({len(self)} prompt tokens, target {targets}, "
            f"{'method' if self.method else 'variant'} {variant!r}, top: {top})"
        )

    # --- writing --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, numbers and strings: strict JSON (no NaN, no infinity).

        Described by ``heat_fast/schema/attribution-2.json``; :func:`heat_fast.from_dict` reads it.
        """
        from heat_fast.storage import to_dict

        return to_dict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; an existing file is replaced only once all is written.

        Raises OutputError where the file cannot be written.
        """
        from heat_fast.storage import to_bytes

        write_file(path, to_bytes(self))

    def to_dataframe(self, *, per_target: bool = False) -> DataFrame:
        """One pandas row per prompt token; see :func:`heat_fast.tables.to_dataframe`."""
        from heat_fast.tables import to_dataframe

        return to_dataframe(self, per_target=per_target)

    def header(self) -> dict[str, Any]:
        """All but the arrays, as JSON values."""
        from heat_fast.storage import header_of

        return header_of(self)

    # --- showing ------------------------------------------------------------------------------

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML file that shows everything: coloured prompt, ranking, targets, metadata.

        It needs no network and no other file. An existing file is replaced only once all is
        written. Raises OutputError where the file cannot be written.

        Example: ``result.to_html("why.html")``
        """
        from heat_fast.report.page import write_page

        write_page(self, path)

    def _repr_html_(self) -> str:
        """What a notebook shows of a result at the end of a cell."""
        from heat_fast.report.page import render_view

        return render_view(self)

    def plot(self, k: int = 15, *, special: bool = True) -> Figure:
        """A matplotlib figure: the k highest tokens as bars, and their components beside them.

        Tokens are those of :meth:`top`, and `special` is its argument; components that were not
        measured are left out.

        Raises InputError where k is no whole number of at least 1, MissingPackageError without
        matplotlib.

        Example: ``result.plot().savefig("top.png")``
        """
        from heat_fast.report.plots import plot_top

        return plot_top(self, k, special=special)

    def plot_targets(self, k: int = 40, *, special: bool = True) -> Figure:
        """A matplotlib figure: the score of prompt tokens (columns) for every target token (rows).

        Of a longer prompt, the k tokens with the highest aggregated scores, in their order in the
        prompt; `special=False` leaves out those that :meth:`top` then does. Raises as :meth:`plot`
        does.

        Example: ``result.plot_targets().savefig("targets.png")``
        """
        from heat_fast.report.plots import plot_targets

        return plot_targets(self, k, special=special)

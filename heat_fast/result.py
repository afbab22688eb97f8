"""The result of an attribution: what a user reads, saves and loads again.

The file is one safetensors file: the arrays as tensors, everything else as JSON in its header.
No pickle is written or read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import Tensor

from heat_fast.combine import AGGREGATES, aggregate
from heat_fast.config import suggest
from heat_fast.errors import InputError, NumericalError, OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCHEMA_VERSION", "Attribution", "TopToken", "check_writable", "load", "write_file"]

#: Version of the file's layout and of :meth:`Attribution.to_dict`; a reader refuses newer ones.
SCHEMA_VERSION: Final = 1
_FORMAT: Final = "heat_fast.attribution"
_HEADER_KEY: Final = "heat_fast"

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
_ARRAYS: Final = (*COMPONENTS, "target_log_probs")
_STDERR: Final = "curvature_stderr"


@dataclasses.dataclass(frozen=True)
class TopToken:
    """One line of a ranking: a prompt token, its score and its components, over all targets."""

    index: int
    token: str
    score: float
    gate: float
    curvature: float
    information: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """How much each of N prompt tokens contributed to each of T target tokens.

    All arrays are float32 on the CPU. Those of shape [T, N], row t for target token t:

    gate: attention-value flow into the target's position, of which the whole context (the
        prompt and the target tokens before) receives 1: row 0 sums to 1; later rows leave out the
        share of the earlier target tokens, and sum to less. Of a prompt in several windows it is,
        like all components, the mean over the windows that hold the token, and sums to none of it.
    curvature: S, the mean l1 norm of a token's block of the Hessian of the log-probability times
        a vector of signs (or what the settings put in its place).
    information: I, the KL divergence in nats after the token's embedding is replaced.
    log_prob_drop: log-probability of the target minus the one after replacement, nats; signed.
    gradient_norm: l1 norm of the gradient with respect to the token's embedding.
    envelope: ``gate * (beta * curvature + gamma * max(0, log_prob_drop))``.
    target_scores: the scores, ``gate * (beta * curvature + gamma * information + ...)``.

    token_ids, tokens, special: the prompt's ids, what a person reads, and which are special.
    offsets, prompt_text: half-open character ranges into the text; None where ids were given.
    target_ids, target_tokens, target_log_probs: the targets; log-probabilities [T] in nats, of the
        last window where there are several.
    curvature_stderr: standard error of the curvature over its probes [T, N], in the units of
        `curvature`; 0 where it is exact, None where it is not known (a single probe, or the
        Gauss-Newton sketch), an upper bound where windows are averaged.
    information_skipped: for each prompt token, whether screening left its information out
        (`coverage`): its information and log_prob_drop are 0 and were not measured. None where
        all were.
    metadata: configuration, seed, versions, device, dtype, model, seconds and counts; read-only
        and JSON-able.

    Arrays and metadata are copied when the result is made. Fields and metadata cannot be changed
    afterwards; the arrays are ordinary tensors, which torch cannot lock: do not write to them
    (`scores` is computed once and would not follow), change a ``clone()``. Indexing follows the
    prompt: ``result.scores[i]`` belongs to ``result.tokens[i]``.

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

    def __post_init__(self) -> None:
        def store(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("token_ids", "tokens", "special", "target_ids", "target_tokens"):
            store(name, tuple(getattr(self, name)))
        if self.information_skipped is not None:
            store("information_skipped", tuple(map(bool, self.information_skipped)))
        if self.offsets is not None:
            store("offsets", tuple((int(start), int(end)) for start, end in self.offsets))
        for name in self._arrays():
            array = getattr(self, name)
            if not isinstance(array, Tensor):
                raise InputError(f"{name} is {type(array).__name__}: expected a torch tensor.")
            store(name, array.detach().to("cpu", torch.float32, copy=True).contiguous())
        store("metadata", _read_only(_through_json(self.metadata)))
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
            "target_tokens": (self.target_tokens, n_targets),
        }
        for name, (values, expected) in lengths.items():
            if values is not None and len(values) != expected:
                raise InputError(f"{name} has {len(values)} entries: expected {expected}.")
        if self.offsets is not None:
            if self.prompt_text is None:
                raise InputError("offsets without prompt_text: expected the text they point into.")
            for start, end in self.offsets:
                if not 0 <= start <= end <= len(self.prompt_text):
                    raise InputError(
                        f"offset ({start}, {end}) lies outside a text of {len(self.prompt_text)} "
                        "characters: expected half-open ranges inside it."
                    )
        for name in self._arrays():
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

    def _arrays(self) -> tuple[str, ...]:
        """Names of the arrays this result holds."""
        return _ARRAYS if self.curvature_stderr is None else (*_ARRAYS, _STDERR)

    # --- reading --------------------------------------------------------------------------------

    @functools.cached_property
    def scores(self) -> Tensor:
        """The scores [N], aggregated over targets as the configuration says."""
        return self.aggregated("target_scores")

    @property
    def aggregate(self) -> str:
        """How targets are aggregated unless asked otherwise: the configuration's choice."""
        return str(self.metadata.get("config", {}).get("aggregate", "mean"))

    def aggregated(self, name: str, how: str | None = None) -> Tensor:
        """One component over all targets, [N] (paper Eq. 23).

        name: one of the [T, N] arrays; how: ``"mean"``, ``"max"`` or ``"sum"``, by default the
        configuration's. Raises InputError for any other.
        """
        if name not in COMPONENTS:
            raise InputError(
                f"unknown component {name!r}: expected one of the [targets, tokens] arrays. "
                + suggest(name, COMPONENTS)
            )
        how = self.aggregate if how is None else how
        if how not in AGGREGATES:
            raise InputError(
                f"unknown aggregate {how!r}: expected 'mean', 'max' or 'sum'. Choose one of these."
            )
        values: Tensor = getattr(self, name)
        return aggregate(values, how)

    def top(self, k: int = 10) -> list[TopToken]:
        """The k prompt tokens with the highest scores, highest first (all, where k exceeds N).

        Equal scores keep the order of the prompt. Components are aggregated like the scores.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"top({k!r}): expected a whole number of at least 1.")
        order = torch.argsort(self.scores, descending=True, stable=True)[:k].tolist()
        columns = {name: self.aggregated(name) for name in ("gate", "curvature", "information")}
        return [
            TopToken(
                index=index,
                token=self.tokens[index],
                score=self.scores[index].item(),
                **{name: values[index].item() for name, values in columns.items()},
            )
            for index in order
        ]

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
            f"Attribution({len(self)} prompt tokens, target {targets}, variant {variant!r}, "
            f"top: {top})"
        )

    # --- writing --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, numbers and strings: strict JSON (no NaN, no infinity)."""
        arrays = {name: getattr(self, name).tolist() for name in self._arrays()}
        return {
            "format": _FORMAT,
            "schema_version": SCHEMA_VERSION,
            **self._header(),
            "scores": self.scores.tolist(),
            **arrays,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; an existing file is replaced only once all is written.

        Raises OutputError where the file cannot be written.
        """
        from safetensors.torch import save as to_bytes

        header = {"format": _FORMAT, "schema_version": SCHEMA_VERSION, **self._header()}
        arrays = {name: getattr(self, name) for name in self._arrays()}
        data = to_bytes(arrays, metadata={_HEADER_KEY: json.dumps(header, allow_nan=False)})
        write_file(path, data)

    def _header(self) -> dict[str, Any]:
        return {
            "prompt_text": self.prompt_text,
            "token_ids": list(self.token_ids),
            "tokens": list(self.tokens),
            "offsets": None if self.offsets is None else [list(pair) for pair in self.offsets],
            "special": list(self.special),
            "target_ids": list(self.target_ids),
            "target_tokens": list(self.target_tokens),
            "information_skipped": (
                None if self.information_skipped is None else list(self.information_skipped)
            ),
            "metadata": _through_json(self.metadata),
        }

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

    def plot(self, k: int = 15) -> Figure:
        """A matplotlib figure: the k highest tokens as bars, and their components beside them.

        Raises InputError where k is no whole number of at least 1, MissingPackageError without
        matplotlib.

        Example: ``result.plot().savefig("top.png")``
        """
        from heat_fast.report.plots import plot_top

        return plot_top(self, k)

    def plot_targets(self, k: int = 40) -> Figure:
        """A matplotlib figure: the score of prompt tokens (columns) for every target token (rows).

        Of a longer prompt, the k tokens with the highest aggregated scores, in their order in the
        prompt. Raises as :meth:`plot` does.

        Example: ``result.plot_targets().savefig("targets.png")``
        """
        from heat_fast.report.plots import plot_targets

        return plot_targets(self, k)


def load(path: str | os.PathLike[str]) -> Attribution:
    """Read a result that :meth:`Attribution.save` wrote.

    Raises InputError where the file is missing, damaged, of another kind, or written by a newer
    version of this package.
    """
    from safetensors import SafetensorError, safe_open

    place = Path(path)
    if not place.is_file():
        raise InputError(
            f"there is no file {str(place)!r}: expected a result written by save(). Check the path."
        )
    try:
        with safe_open(place, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{str(place)!r} cannot be read as a safetensors file ({error}): expected a result "
            "written by save(). The file is damaged or of another kind; save the result again."
        ) from error
    if _HEADER_KEY not in metadata:
        raise InputError(
            f"{str(place)!r} is a safetensors file without an attribution in it: expected a result "
            "written by save(). Check the path."
        )
    return _from_file(place, metadata[_HEADER_KEY], arrays)


def _from_file(place: Path, text: str, arrays: Mapping[str, Tensor]) -> Attribution:
    def damaged(why: str, cause: Exception | None = None) -> NoReturn:
        raise InputError(
            f"{str(place)!r} is damaged: {why}. Expected a result written by save(); save it again."
        ) from cause

    try:
        header = json.loads(text)
    except ValueError as error:
        damaged("its header is not JSON", error)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        damaged("its header does not describe an attribution")
    version = header.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        damaged(f"its schema version is {version!r}")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{str(place)!r} has schema version {version}: expected at most {SCHEMA_VERSION}. It "
            "was written by a newer heat_fast; upgrade to read it."
        )
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        damaged(f"it has no {', '.join(missing)}")
    try:
        return Attribution(
            token_ids=_list_of(header, "token_ids", int),
            tokens=_list_of(header, "tokens", str),
            offsets=header["offsets"],
            prompt_text=header["prompt_text"],
            special=_list_of(header, "special", bool),
            target_ids=_list_of(header, "target_ids", int),
            target_tokens=_list_of(header, "target_tokens", str),
            metadata=header["metadata"],
            curvature_stderr=arrays.get(_STDERR),
            information_skipped=(
                None
                if header.get("information_skipped") is None
                else _list_of(header, "information_skipped", bool)
            ),
            **{name: arrays[name] for name in _ARRAYS},
        )
    except KeyError as error:
        damaged(f"its header has no {error}", error)
    except (TypeError, ValueError, NumericalError) as error:
        damaged(str(error), error)


def _list_of(header: Mapping[str, Any], name: str, kind: type) -> tuple[Any, ...]:
    values = header[name]
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise InputError(f"{name} is not a list of {kind.__name__}")
    return tuple(values)


# --- metadata -------------------------------------------------------------------------------------


class _ReadOnlyDict(dict[str, Any]):
    """A dict that json, copy and pickle understand and nobody can change."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("the metadata of a result is read-only; copy it with dict(...) first")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return (_ReadOnlyDict, (dict(self),))

    def __deepcopy__(self, memo: Any) -> _ReadOnlyDict:
        return self


def _through_json(metadata: Any) -> dict[str, Any]:
    """A deep copy as plain JSON values; InputError where JSON cannot hold it."""
    try:
        copied = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the metadata cannot be written as JSON ({error}): expected strings, finite numbers, "
            "lists and dicts."
        ) from error
    if not isinstance(copied, dict):
        raise InputError(f"the metadata is {type(metadata).__name__}: expected a dict.")
    return copied


def _read_only(value: Any) -> Any:
    if isinstance(value, dict):
        return _ReadOnlyDict({key: _read_only(item) for key, item in value.items()})
    if isinstance(value, list):
        return tuple(_read_only(item) for item in value)
    return value


# --- files ----------------------------------------------------------------------------------------


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError where :func:`write_file` would fail; meant for before the work starts.

    It creates and removes an empty file beside the target, since permissions alone do not tell.
    """
    place = _final_place(path)
    if _is_stream(place):
        if not os.access(place, os.W_OK):
            raise _cannot_write(place, "it is not writable", "Choose another place.")
        return
    temporary = _create_beside(place)
    os.close(temporary[0])
    os.unlink(temporary[1])


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file or nothing: into a temporary file beside it, then renamed over it.

    A symbolic link is followed, a device or pipe is written to directly. Raises OutputError.
    """
    place = _final_place(path)
    try:
        if _is_stream(place):
            place.write_bytes(data)
            return
        descriptor, temporary = _create_beside(place)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OutputError:
        raise
    except OSError as error:
        raise _cannot_write(place, str(error.strerror or error), "Choose another place.") from error


def _cannot_write(place: Path, why: str, do: str) -> OutputError:
    return OutputError(f"cannot write {str(place)!r}: {why}. Expected a writable file path. {do}")


def _is_stream(place: Path) -> bool:
    """Whether it is a device or a pipe, which is written to directly."""
    return place.exists() and not place.is_file() and not place.is_dir()


def _final_place(path: str | os.PathLike[str]) -> Path:
    """The file a path stands for, links followed, after the checks that need no writing."""
    if not os.fspath(path):
        raise OutputError("cannot write to an empty path. Expected a file name. Give one.")
    try:
        if _is_stream(Path(path)):
            return Path(path)
        place = Path(os.path.realpath(path))
        if place.is_dir():
            raise _cannot_write(place, "it is a directory", "Add a file name to it.")
        if not place.parent.is_dir():
            raise _cannot_write(
                place, "its directory does not exist", f"Create {str(place.parent)!r} first."
            )
        exists = os.path.lexists(place)
        os.stat(place) if exists else os.stat(place.parent)
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise _cannot_write(Path(path), str(error), "Choose another name.") from error
    if exists and not os.access(place, os.W_OK):
        raise _cannot_write(place, "the file is write-protected", "Choose another name.")
    return place


def _create_beside(place: Path) -> tuple[int, Path]:
    temporary = place.with_name(f".heat-fast-{secrets.token_hex(8)}.tmp")
    try:
        # Mode 0666 leaves the permissions to the user's umask, as an ordinary open() does.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise _cannot_write(
            place, f"its directory is not writable ({error.strerror})", "Choose another place."
        ) from error
    return descriptor, temporary

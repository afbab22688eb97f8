"""The result object, its file and its picture on a terminal."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import load_file, save_file

import heat_fast.files as files_module
from heat_fast.config import HeatConfig
from heat_fast.errors import HeatError, InputError, NumericalError, OutputError
from heat_fast.files import check_writable, write_file
from heat_fast.reading import visible
from heat_fast.result import COMPONENTS, Attribution
from heat_fast.storage import SCHEMA_VERSION, load
from heat_fast.terminal import render


def make(
    scores: list[list[float]] | None = None,
    *,
    tokens: tuple[str, ...] = ("<s>", "the", " cat"),
    text: str | None = "the cat",
    offsets: Any = ((0, 0), (0, 3), (3, 7)),
    aggregate: str = "mean",
    **changes: Any,
) -> Attribution:
    rows = torch.tensor([[0.0, 1.0, 2.0], [4.0, 1.0, 0.0]] if scores is None else scores)
    n_targets, n_tokens = rows.shape
    fields: dict[str, Any] = {
        name: rows + number for number, name in enumerate(COMPONENTS) if name != "target_scores"
    }
    fields |= {
        "target_scores": rows,
        "token_ids": tuple(range(n_tokens)),
        "tokens": tokens,
        "offsets": offsets,
        "prompt_text": text,
        "special": tuple(token == "<s>" for token in tokens),
        "target_ids": tuple(range(n_targets)),
        "target_tokens": tuple(f" t{number}" for number in range(n_targets)),
        "target_log_probs": -torch.arange(1.0, n_targets + 1) / 4,
        "metadata": {
            "config": HeatConfig(aggregate=aggregate).to_dict(),  # type: ignore[arg-type]
            "model": "LlamaForCausalLM",
            "seconds": {"total": 1.25},
            "counts": {"hvp": 640, "branch_tokens": 12345},
        },
    }
    return Attribution(**(fields | changes))


def shown(result: Attribution, *, width: int = 100, top: int = 10, **options: Any) -> str:
    file = options.pop("file", None) or io.StringIO()
    console = Console(file=file, width=width, **options)
    console.print(render(result, console, top=top))
    file.flush()
    if isinstance(file, io.StringIO):
        return file.getvalue()
    return str(file.buffer.getvalue().decode(file.encoding))


# --- the object -----------------------------------------------------------------------------------


def test_aggregates() -> None:
    result = make()
    assert result.scores.tolist() == [2.0, 1.0, 1.0]
    assert make(aggregate="max").scores.tolist() == [4.0, 1.0, 2.0]
    assert make(aggregate="sum").scores.tolist() == [4.0, 2.0, 2.0]
    assert result.aggregated("target_scores", "max").tolist() == [4.0, 1.0, 2.0]
    assert result.aggregated("curvature").tolist() == [3.0, 2.0, 2.0]
    with pytest.raises(InputError, match="Did you mean 'curvature'"):
        result.aggregated("curvatur")
    with pytest.raises(InputError, match="'mean', 'max' or 'sum'"):
        result.aggregated("gate", "median")


def test_top_is_ordered_and_ties_keep_the_prompts_order() -> None:
    result = make()
    assert [row.index for row in result.top()] == [0, 1, 2]
    first = result.top(1)[0]
    assert (first.token, first.score, first.gate) == ("<s>", 2.0, 2.0)
    assert (first.curvature, first.information) == (3.0, 4.0)
    n = 300
    flat = make([[1.0] * n], tokens=("a",) * n, text=None, offsets=None)
    assert [row.index for row in flat.top(n)] == list(range(n))
    assert len(flat.top(10 * n)) == n
    assert result.top(np.int64(2)) == result.top(2)
    for bad in (0, -1, True, 2.0):
        with pytest.raises(InputError, match="at least 1"):
            result.top(bad)  # type: ignore[arg-type]


def test_top_ranks_by_magnitude_and_keeps_the_sign() -> None:
    signed = make([[0.5, -2.0, 1.5]])
    assert [(row.index, row.score) for row in signed.top()] == [(1, -2.0), (2, 1.5), (0, 0.5)]
    assert [row.share for row in signed.top()] == [0.5, 0.375, 0.125]
    assert signed.shares().tolist() == [0.125, 0.5, 0.375]
    # Shares are of the whole prompt, whatever is left out of the ranking.
    assert [row.share for row in signed.top(special=False)] == [0.5, 0.375]
    # Equal magnitudes keep the order of the prompt, and rows of targets may cancel.
    assert [row.index for row in make([[1.0, -1.0, 1.0]]).top()] == [0, 1, 2]
    cancelled = make([[1.0, -3.0, 2.0], [1.0, 3.0, -4.0]])
    assert [(row.index, row.share) for row in cancelled.top()] == [(0, 0.5), (2, 0.5), (1, 0.0)]
    assert cancelled.shares(cancelled.target_scores[0]).tolist() == [1 / 6, 0.5, 1 / 3]
    assert make([[0.0, -0.0, 0.0]]).shares().tolist() == [0.0] * 3


def test_scores_without_negatives_rank_as_they_are() -> None:
    scores = torch.rand(1, 37)
    result = make(scores.tolist(), tokens=("a",) * 37, text=None, offsets=None)
    assert [row.index for row in result.top(37)] == scores[0].argsort(descending=True).tolist()
    expected = (scores[0].double() / scores[0].double().sum()).tolist()
    assert result.shares().tolist() == pytest.approx(expected)


def of_method(*measured: str, scores: list[list[float]] | None = None) -> Attribution:
    """As `heat_fast.baselines` makes them: what is not measured is 0."""
    rows = torch.tensor([[-4.0, 1.0, 3.0]] if scores is None else scores)
    zeros = {name: torch.zeros_like(rows) for name in COMPONENTS if name not in measured}
    return make(
        rows.tolist(),
        **(zeros | {"target_scores": rows}),
        metadata={
            "config": {"variant": "some_method", "aggregate": "mean"},
            "measured": [*measured, "target_scores"],
        },
    )


def test_a_result_tells_what_was_measured() -> None:
    assert (make().method, make().measured) == (None, COMPONENTS)
    assert make(metadata={}).measured == COMPONENTS
    left_out = make(metadata={"config": {"curvature": "none"}})
    assert set(COMPONENTS) - set(left_out.measured) == {"curvature"}
    other = of_method("log_prob_drop", "information")
    assert other.method == "some_method"
    assert other.measured == ("information", "log_prob_drop", "target_scores")
    assert of_method().measured == ("target_scores",)
    assert "method 'some_method'" in repr(other) and "variant" not in repr(other)


def test_arrays_are_float32_copies() -> None:
    source = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    result = make(gate=source)
    with torch.no_grad():
        source.fill_(1.0)
    assert result.gate.dtype == torch.float32
    assert not result.gate.requires_grad
    assert result.gate.sum() == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.gate = source  # type: ignore[misc]


def test_metadata_is_a_read_only_copy() -> None:
    given: dict[str, Any] = {"config": {"aggregate": "sum"}, "list": [1, {"a": 2}]}
    result = make(metadata=given)
    given["config"]["aggregate"] = "max"
    given["list"].append(3)
    assert result.metadata["config"]["aggregate"] == "sum"
    assert result.metadata["list"] == (1, {"a": 2})
    metadata: Any = result.metadata
    for change in (
        lambda: metadata.update(a=1),
        lambda: metadata.pop("config"),
        lambda: metadata.clear(),
        lambda: metadata.setdefault("new", 1),
        lambda: metadata["config"].__setitem__("aggregate", "mean"),
        lambda: metadata["list"][1].__delitem__("a"),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    with pytest.raises(TypeError, match="read-only"):
        metadata |= {"a": 1}
    assert json.loads(json.dumps(result.metadata)) == {
        "config": {"aggregate": "sum"},
        "list": [1, {"a": 2}],
    }


def test_copy_and_pickle() -> None:
    result = make()
    for other in (copy.deepcopy(result), copy.copy(result), pickle.loads(pickle.dumps(result))):
        assert other.to_dict() == result.to_dict()


def test_repr_is_short_and_useful() -> None:
    text = repr(make([[0.0, 1.0, 2.0]] * 9))
    assert "3 prompt tokens" in text
    assert "' t0' (-0.25 nats)" in text
    assert "9 in all" in text
    assert "' cat' 2" in text
    assert len(text) < 250


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": torch.zeros(3, 2)}, r"gate has shape \(3, 2\): expected \(2, 3\)"),
        ({"target_log_probs": torch.zeros(3)}, "target_log_probs has shape"),
        ({"gate": [[0.0] * 3] * 2}, "gate is list"),
        ({"special": (True,)}, "special has 1 entries: expected 3"),
        ({"tokens": ("a",) * 4}, "tokens has 4 entries"),
        ({"offsets": ((0, 1),)}, "offsets has 1 entries"),
        ({"offsets": ((0, 0), (0, 3), (3, 8))}, r"offset \(3, 8\)"),
        ({"offsets": ((0, 0), (3, 0), (3, 7))}, r"offset \(3, 0\)"),
        ({"prompt_text": None}, "without prompt_text"),
        ({"target_ids": (), "target_tokens": ()}, "at least one of each"),
        ({"metadata": {"x": float("nan")}}, "JSON"),
        ({"metadata": {"x": object()}}, "JSON"),
        ({"metadata": [1]}, "expected a dict"),
    ],
)
def test_inconsistent_results_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite_are_never_returned(bad: float) -> None:
    values = torch.zeros(2, 3, dtype=torch.float64)
    values[1, 2] = bad
    with pytest.raises(NumericalError, match=r"curvature\[1, 2\]"):
        make(curvature=values)


def test_to_dict_is_strict_json() -> None:
    result = make(text="the \udc80ca")
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["schema_version"] == SCHEMA_VERSION
    assert data["tokens"] == ["<s>", "the", " cat"]
    assert data["offsets"] == [[0, 0], [0, 3], [3, 7]]
    assert data["scores"] == [2.0, 1.0, 1.0]
    assert data["gate"] == [[0.0, 1.0, 2.0], [4.0, 1.0, 0.0]]
    assert data["metadata"]["counts"]["hvp"] == 640


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_text", [True, False])
def test_round_trip_is_exact(tmp_path: Path, with_text: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    changes: dict[str, Any] = {name: torch.rand(2, 3, generator=generator) for name in COMPONENTS}
    if not with_text:
        changes |= {"prompt_text": None, "offsets": None}
    result = make(tokens=("<s>", "\udc80\x00", "你🙂"), **changes)
    path = tmp_path / "a result"
    result.save(path)
    loaded = load(path)
    assert loaded.to_dict() == result.to_dict()
    for name in (*COMPONENTS, "target_log_probs"):
        assert torch.equal(getattr(loaded, name), getattr(result, name))
    for field in ("token_ids", "tokens", "offsets", "prompt_text", "special", "target_ids"):
        assert getattr(loaded, field) == getattr(result, field)
    assert loaded.metadata == result.metadata


def test_saving_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"old" * 10_000)
    make().save(str(path))
    assert load(path).tokens == make().tokens
    assert os.listdir(tmp_path) == ["result"]
    umask = os.umask(0)
    os.umask(umask)
    write_file(tmp_path / "new", b"x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_an_interrupted_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        make().save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result"]


def test_links_are_followed_and_devices_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    write_file(link, b"x")
    assert link.is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"x"
    check_writable(os.devnull)
    write_file(os.devnull, b"x")
    assert not Path(os.devnull).is_file()


def test_check_writable_says_why_and_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    for path, why in (
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "file", "does not exist"),
        (tmp_path / "file" / "below", "does not exist"),
        (tmp_path / ("n" * 300), "too long"),
        ("", "empty path"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(OutputError, match=why) as caught:
            check_writable(path)
        assert isinstance(caught.value, OSError)
        with pytest.raises(OutputError, match=why):
            make().save(path)


def test_check_writable_sees_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, who may write everywhere, so the refusals are simulated.
    (tmp_path / "file").touch()

    def refuse(*args: Any) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="write-protected"):
        patch.setattr(files_module.os, "access", lambda path, mode: False)
        check_writable(tmp_path / "file")
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="not writable"):
        patch.setattr(files_module.os, "open", refuse)
        check_writable(tmp_path / "new")


def rewrite(path: Path, change: Any) -> None:
    """Save a result with its header changed by `change`."""
    make().save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["heat_fast"])
    header = change(header) or header
    save_file(load_file(path), path, metadata={"heat_fast": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(schema_version=SCHEMA_VERSION + 1), "newer heat_fast"),
        (lambda header: header.update(schema_version="1"), "schema version is '1'"),
        (lambda header: header.update(format="other"), "does not describe"),
        (lambda header: [1], "does not describe"),
        (lambda header: header.pop("tokens"), "no 'tokens'"),
        (lambda header: header.update(tokens=[1, 2, 3]), "tokens is not a list of str"),
        (lambda header: header.update(special=[0, 0, 0]), "special is not a list of bool"),
        (lambda header: header.update(token_ids=[1]), "damaged"),
        (lambda header: header.update(offsets=7), "damaged"),
        (lambda header: header.update(prompt_text=7), "damaged"),
        (lambda header: header.update(metadata=[]), "damaged"),
    ],
)
def test_wrong_headers_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "result"

    def changed(header: dict[str, Any]) -> Any:
        outcome = change(header)
        return outcome if outcome == [1] else None

    rewrite(path, changed)
    with pytest.raises(InputError, match=message):
        load(path)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(InputError, match="there is no file"):
        load(path)
    with pytest.raises(InputError, match="there is no file"):
        load(tmp_path)
    for data in (b"", b"not a result", pickle.dumps({"a": 1}), b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(InputError, match="cannot be read as a safetensors file"):
            load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="without an attribution"):
        load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="cannot be read"):
        load(path)
    make().save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    save_file({**arrays, "gate": torch.full((2, 3), torch.nan)}, path, metadata=metadata)
    with pytest.raises(InputError, match="gate"):
        load(path)
    del arrays["gate"]
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(InputError, match="it has no gate") as caught:
        load(path)
    assert isinstance(caught.value, HeatError)


# --- the terminal ---------------------------------------------------------------------------------


def test_without_colour_the_top_tokens_are_marked_by_rank() -> None:
    text = shown(make(), top=2)
    assert "\x1b" not in text
    assert text.startswith("[1|<s>][2|the] cat\n")
    assert "█" in text
    assert re.search(r"1 +0 +<s> +2\.00 +50\.0% +█+ +2\.00 +3\.00 +4\.00", text)
    assert "Targets ·t0 (-0.250), ·t1 (-0.500); log-probability of all -0.750" in text
    assert "LlamaForCausalLM | variant full | 1.25 s | 640 HVPs | 12,345 branch tokens" in text


def test_with_colour_each_token_carries_its_own_readable_colours() -> None:
    text = shown(make(), force_terminal=True, color_system="truecolor")
    coloured = re.findall(r"\x1b\[([\d;]+)m(<s>|the| cat)\x1b\[0m", text)
    assert [token for _, token in coloured[:3]] == ["<s>", "the", " cat"]
    for style, _ in coloured:
        assert style.startswith("38;2;") and ";48;2;" in style
    assert coloured[0][0] != coloured[1][0]
    assert coloured[1][0] == coloured[2][0]
    assert "[1|" not in text


def contrast(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours."""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (value / 255 for value in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_get_darker_and_their_text_stays_readable() -> None:
    from heat_fast.terminal import _STYLES

    papers = []
    for style in _STYLES:
        assert style.color is not None and style.bgcolor is not None
        ink, paper = (tuple(c.get_truecolor()) for c in (style.color, style.bgcolor))
        assert contrast(ink, paper) >= 4.5
        papers.append(contrast(paper, (0, 0, 0)))
    assert papers == sorted(papers, reverse=True)


def test_both_palettes_are_equally_strong() -> None:
    from heat_fast.terminal import _NEGATIVE_STYLES, _STYLES

    for warm, cold in zip(_STYLES, _NEGATIVE_STYLES, strict=True):
        papers = []
        for style in (warm, cold):
            assert style.color is not None and style.bgcolor is not None
            ink, paper = (tuple(c.get_truecolor()) for c in (style.color, style.bgcolor))
            assert contrast(ink, paper) >= 4.5
            papers.append(contrast(paper, (0, 0, 0)))
        assert warm.color == cold.color
        # Hues of one perceived lightness differ a little in luminance.
        assert papers[0] == pytest.approx(papers[1], rel=0.15)


def test_negative_scores_are_ranked_marked_and_coloured() -> None:
    result = make([[-4.0, 1.0, 3.0]])
    text = shown(result, top=2)
    assert text.startswith("[1|<s>]the [2|cat]\n")
    assert "follow the magnitude" in text
    assert re.search(r"1 +0 +<s> +-4\.00 +50\.0% +░{10} ", text)
    assert re.search(r"2 +2 +·cat +3\.00 +37\.5% +█{8} ", text)
    ascii_file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert re.search(r"-4\.00 +50\.0% +-{10} ", shown(result, file=ascii_file))
    coloured = shown(result, force_terminal=True, color_system="truecolor")
    paper = dict(
        (token, tuple(map(int, code.split(";48;2;")[1].split(";"))))
        for code, token in re.findall(r"\x1b\[([\d;]+)m(<s>| cat)\x1b\[0m", coloured)
    )
    assert paper["<s>"][2] > paper["<s>"][0] and paper[" cat"][0] > paper[" cat"][2]
    assert "negative" in coloured and "positive" in coloured
    assert "negative" not in shown(make(), force_terminal=True, color_system="truecolor")


def test_another_method_is_named_and_shows_what_it_measured() -> None:
    text = shown(of_method("information"))
    header = next(line for line in text.splitlines() if line.startswith("#"))
    assert header.split() == ["#", "pos", "token", "score", "share", "information"]
    assert "method some_method" in text and "variant" not in text
    for width in (20, 30, 40, 100):
        text = shown(of_method(), width=width)
        header = next(line for line in text.splitlines() if line.startswith("#"))
        assert header.split()[:4] == ["#", "pos", "token", "score"]
        assert not {"gate", "curvature", "information"} & {*header.split()}


def test_drivers_of_a_target_keep_their_sign() -> None:
    result = make([[-4.0, 1.0, 3.0], [0.0, 2.0, -2.0]])
    lines = [line.split() for line in shown(result).splitlines()]
    assert ["·t0", "<s>", "-50%,", "·cat", "38%,", "the", "12%"] in lines
    assert ["·t1", "the", "50%,", "·cat", "-50%,", "<s>", "0%"] in lines


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(make(), force_terminal=True, color_system="truecolor")
    assert "48;2" not in text
    assert "[1|<s>]" in re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_width_is_honoured(width: int) -> None:
    result = make(
        [[float(number) for number in range(40)]],
        tokens=(" incomprehensible",) * 40,
        text=" incomprehensible" * 40,
        offsets=[(17 * n, 17 * n + 17) for n in range(40)],
    )
    text = shown(result, width=width)
    assert max(len(line) for line in text.splitlines()) <= width


def question() -> Attribution:
    """Sizes of tokens and numbers as in the embedded model's first example."""
    tokens = (" Fenston", " mountain", ":", " Mirmora", "\n", " is", "<s>", "9", ".", " For")
    text, offsets = "", []
    for token in tokens:
        offsets.append((len(text), len(text) + len(token)))
        text += token
    scores = [0.974, 0.244, 0.119, 0.0302, 0.00677, 0.00387, 0.00193, 0.00161, 0.00121, 0.000791]
    return make(
        [scores],
        tokens=tokens,
        text=text,
        offsets=offsets,
        gate=torch.tensor(
            [[0.294, 0.0868, 0.0203, 0.126, 0.00662, 0.00488, 0.0312, 0.0737, 0.00268, 0.00167]]
        ),
        information=torch.tensor(
            [[5.96, 5.6, 11.6, 0.452, 2.04, 1.58, 0.000192, 0.000111, 0.899, 0.945]]
        ),
    )


@pytest.mark.parametrize(
    ("width", "header"),
    [
        (100, ["#", "pos", "token", "score", "share", "gate", "curvature", "information"]),
        (80, ["#", "pos", "token", "score", "share", "gate", "curvature", "information"]),
        (60, ["#", "pos", "token", "score", "gate", "curvature", "information"]),
        (50, ["#", "pos", "token", "score", "gate", "curvature"]),
        (40, ["#", "pos", "token", "score", "gate"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_leaves_out_columns_and_never_folds(
    width: int, header: list[str], encoding: str
) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    lines = shown(question(), width=width, file=file).splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["#"])
    assert lines[start].split() == header
    rows = lines[start + 1 : start + 11]
    for rank, row in enumerate(rows, start=1):
        fields = row.split()
        assert fields[:2] == [str(rank), str(rank - 1)]
        assert len(row) <= width
        # Every number is whole: the score, and what stands to the right of it.
        numbers = [field for field in fields[3:] if field[0].isdigit()]
        assert all(re.fullmatch(r"[\d.]+(e-\d+)?%?", number) for number in numbers)
        assert len(numbers) == len(header) - 3
    # Quotes make the tokens wider in ASCII, which costs the bar at 80 columns.
    bars = sum("█" in row or "#" in row for row in rows)
    assert bars == (3 if width >= (100 if encoding == "ascii" else 80) else 0)


@pytest.mark.parametrize("ascii_only", [False, True])
def test_long_tokens_are_shortened_not_the_numbers(ascii_only: bool) -> None:
    result = make(
        [[2.0, 1.0]], tokens=("incomprehensibilities" * 3, "数" * 40), text=None, offsets=None
    )
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if ascii_only else "utf-8")
    lines = shown(result, width=72, file=file).splitlines()
    row = next(line for line in lines if line.split()[:1] == ["1"])
    assert re.search(r" incompre\w*" + (r"\.\. " if ascii_only else "… "), row)
    assert max(map(cell_len, lines)) <= 72
    assert row.split()[-3:] == ["2.00", "3.00", "4.00"]


def test_marks_stay_readable_around_colons_and_line_breaks() -> None:
    pieces = ("Answer", ":", "\n\n", "a", "\n", "b")
    offsets, start = [], 0
    for piece in pieces:
        offsets.append((start, start + len(piece)))
        start += len(piece)
    result = make(
        [[0.0, 3.0, 2.0, 0.0, 1.0, 0.0]], tokens=pieces, text="".join(pieces), offsets=offsets
    )
    assert shown(result, top=3).startswith("Answer[1|:][2|↵↵]\n\na[3|↵]\nb\n")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert shown(result, top=3, file=file).startswith("Answer[1|:][2|\\n\\n]\n\na[3|\\n]\nb\n")


def test_sixteen_colours_are_not_enough() -> None:
    text = shown(make(), force_terminal=True, color_system="standard")
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert plain.startswith("[1|<s>][2|the] [3|cat]")
    assert "[rank|token]" in plain
    assert not re.search(r"\x1b\[[\d;]*\b(4\d|10\d)m", text)
    coloured = shown(make(), force_terminal=True, color_system="256")
    assert ";48;" in coloured and "[rank|token]" not in coloured


@pytest.mark.parametrize(
    ("log_prob", "words"),
    [
        (-4.2e-07, "-4.20e-07, p = 1)"),
        (-0.000384, "-0.000384, p = 1)"),
        (-0.25, "-0.250, p = 0.779)"),
        (-12.34, "-12.3, p = 4.37e-06)"),
        (-0.0, "0.00, p = 1)"),
    ],
)
def test_log_probabilities_keep_their_significant_digits(log_prob: float, words: str) -> None:
    result = make([[1.0, 2.0, 3.0]], target_log_probs=torch.tensor([log_prob]))
    assert f"(log-probability {words}" in shown(result)


def test_counts_that_are_missing_are_left_out() -> None:
    for metadata in ({}, {"counts": {}}, {"counts": {"branches": 3}}, {"counts": {"hvp": 5}}):
        text = shown(make(metadata=metadata))
        assert "branch tokens" not in text
        assert ("5 HVPs" in text) == ("hvp" in metadata.get("counts", {}))


def test_white_space_markup_and_control_characters_are_shown_not_obeyed() -> None:
    prompt = "[bold]\n\t  \x1b[31m\u202e<"
    pieces = ("[bold]", "\n", "\t", "  ", "\x1b[31m", "\u202e", "<")
    offsets, start = [], 0
    for piece in pieces:
        offsets.append((start, start + len(piece)))
        start += len(piece)
    scores = [[float(len(pieces) - number) for number in range(len(pieces))]]
    result = make(scores, tokens=pieces, text=prompt, offsets=offsets)
    text = shown(result)
    assert "[1|[bold]]" in text
    assert "↵" in text and "⇥" in text and "··" in text
    assert r"\x1b[31m" in text and "\x1b" not in text
    assert r"\u202e" in text and "\u202e" not in text


def test_pieces_of_one_character_are_shown_once_with_the_highest_score() -> None:
    result = make(
        [[1.0, 9.0, 2.0]], tokens=("<0xE4>", "<0xBD>", "<0xA0>"), text="你", offsets=[(0, 1)] * 3
    )
    assert shown(result).startswith("[1|你]\n")


def test_text_between_tokens_is_kept() -> None:
    result = make([[1.0, 2.0]], tokens=("a", "b"), text="a  b!", offsets=[(0, 1), (3, 4)])
    assert shown(result, top=1).startswith("a  [1|b]!\n")


def test_without_offsets_the_tokens_are_shown() -> None:
    result = make([[1.0, 2.0]], tokens=("#4", "#7"), text=None, offsets=None)
    assert shown(result, top=1).startswith("#4[1|#7]\n")


def test_a_narrow_encoding_gets_escapes() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    text = shown(make(tokens=("<s>", "é", " \n"), text="é你", offsets=None), file=file)
    assert r"\xe9" in text
    assert "#" * 10 in text


def test_scores_that_are_all_zero() -> None:
    text = shown(make([[0.0, 0.0, 0.0]]))
    assert "-" in text and "nan" not in text
    colour = shown(make([[0.0, 0.0, 0.0]]), force_terminal=True, color_system="truecolor")
    assert "48;2" not in colour.split("low")[0]


def test_visible_tokens() -> None:
    assert visible(" the") == "·the"
    assert visible("  ") == "··"
    assert visible("a b ") == "a b·"
    assert visible("\n") == "↵"
    assert visible(" the", ascii_only=True) == "' the'"
    assert visible("é", ascii_only=True) == r"\xe9"


def test_each_target_of_several_tells_what_drives_it() -> None:
    result = make([[0.0, 1.0, 3.0], [4.0, 1.0, 0.0]])
    lines = [line.split() for line in shown(result).splitlines()]
    assert ["·t0", "·cat", "75%,", "the", "25%,", "<s>", "0%"] in lines
    assert ["·t1", "<s>", "80%,", "the", "20%,", "·cat", "0%"] in lines
    assert "driven by" not in shown(make([[0.0, 1.0, 2.0]]))
    many = shown(make([[0.0, 1.0, 3.0]] * 20))
    assert many.count("·cat 75%") == 12
    assert many.count("and 8 more") == 2  # of the targets, and of these rows
    # Nothing is wrapped, whatever the width.
    for width in (20, 40, 60):
        table = shown(make([[0.0, 1.0, 3.0]] * 2), width=width).split("driven by")[1]
        assert all(cell_len(line) <= width for line in table.splitlines())


def test_special_and_template_tokens_can_be_left_out_of_the_ranking() -> None:
    result = make(roles=(None, "user", None))
    assert result.template == (True, False, True)
    text = io.StringIO()
    Console(file=text, width=100).print(
        render(result, Console(file=text, width=100), top=3, special=False)
    )
    assert text.getvalue().startswith("<s>[1|the] cat\n")
    assert ["1", "1", "the"] in [line.split()[:3] for line in text.getvalue().splitlines()]
    rows = text.getvalue().split("driven by")[1]
    assert "<s>" not in rows and "cat" not in rows
    nothing = make(special=(True,) * 3)
    assert nothing.top(special=False) == []
    console = Console(file=io.StringIO(), width=100)
    console.print(render(nothing, console, special=False))  # an empty table is no error

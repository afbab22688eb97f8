"""The page, the notebook's view and the figures: what they hold, without a browser."""

from __future__ import annotations

import base64
import dataclasses
import doctest
import hashlib
import itertools
import json
import math
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import heat_fast
from heat_fast import reading
from heat_fast.errors import HeatError, InputError, MissingPackageError, OutputError
from heat_fast.reading import colour_step, number, pieces
from heat_fast.report import notes, page, palette
from heat_fast.report.page import COMPONENTS, render_page, render_view
from heat_fast.result import COMPONENTS as COMPONENT_ARRAYS
from heat_fast.result import Attribution
from results import HOSTILE, made_up, story

LIMIT = 300_000
INFORMATION = ("information", "log_prob_drop", "target_scores")


def of_method(
    pieces: tuple[str, ...],
    name: str,
    measured: tuple[str, ...],
    *,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Attribution:
    """A result as `heat_fast.baselines` makes it, by default with scores of both signs."""
    n_tokens = len(pieces)
    zeros = {array: torch.zeros(1, n_tokens) for array in COMPONENT_ARRAYS if array not in measured}
    scores = torch.tensor([[-4.0, -1.0, 3.0][:n_tokens]])
    return dataclasses.replace(
        made_up(pieces),
        **zeros,
        **{"target_scores": scores, "curvature_stderr": None, **changes},
        metadata={
            "config": {"variant": name, "aggregate": "mean", "seed": 0, **(config or {})},
            "measured": list(measured),
            "model": "LlamaForCausalLM",
        },
    )


class Elements(HTMLParser):
    """Every element's attributes and text, as a browser's parser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, int]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            texts = self.texts.setdefault(tag, [])
            self._open.append((tag, len(texts)))
            texts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag, place in self._open:
            self.texts[tag][place] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page_data(html: str) -> dict[str, Any]:
    """The block of JSON, as the page's script reads it."""
    page = Elements(html)
    place = next(i for i, script in enumerate(page.all("script")) if script.get("id") == "data")
    data: dict[str, Any] = json.loads(page.texts["script"][place])
    return data


def decoded(text: str, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).view(shape)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_holds_every_number_exactly() -> None:
    result = made_up(("<s>", "the", " cat", "\n"), (" a", " b"), special=(0,))
    data = page_data(render_page(result))
    for name, array in COMPONENTS.items():
        assert torch.equal(decoded(data["rows"][name], 2, 4), getattr(result, array))
    assert torch.equal(decoded(data["rows"]["stderr"], 2, 4), result.curvature_stderr)
    assert torch.equal(decoded(data["log_probs"], 2), result.target_log_probs)
    assert data["tokens"] == ["<s>", "the", " cat", "\n"]
    assert data["targets"] == [" a", " b"]
    assert data["special"] == [0]
    assert data["aggregate"] == "mean"
    assert data["pieces"] == [0, 1, 2, 3]
    unknown = made_up(("a",), curvature_stderr=None, information_skipped=(True,))
    data = page_data(render_page(unknown))
    assert "stderr" not in data["rows"]
    assert data["skipped"] == [0]


@pytest.mark.parametrize("n_targets", [1, 4])
def test_a_thousand_tokens_stay_under_the_limit(n_targets: int, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    made_up(story(1000), [" t"] * n_targets).to_html(path)
    assert path.stat().st_size < LIMIT


def test_a_thousand_cjk_tokens_stay_under_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    made_up([f"山{chr(0x4E00 + number)}" for number in range(1000)]).to_html(path)
    assert path.stat().st_size < LIMIT


def test_the_page_needs_nothing_else() -> None:
    html = render_page(made_up(story(30)))
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", html)
    page = Elements(html)
    assert {tag for tag, _ in page.found}.isdisjoint({"link", "img", "iframe", "object", "base"})
    assert not [name for _, attributes in page.found for name in attributes if name[:2] == "on"]
    assert not [attributes for _, attributes in page.found if "style" in attributes]


def test_the_policy_admits_this_script_and_these_styles_alone() -> None:
    page = Elements(render_page(made_up(story(5))))
    (policy,) = (
        str(meta["content"])
        for meta in page.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))

    def named(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == named(page.texts["script"][1])
    assert rules["style-src"] == named(page.texts["style"][0])


def test_hostile_text_stays_text() -> None:
    result = made_up(
        HOSTILE,
        HOSTILE,
        special=(0, 2),
        metadata={"model": HOSTILE[1], "notes": {HOSTILE[2]: HOSTILE[0]}},
    )
    calm = Elements(
        render_page(made_up(["a"] * len(HOSTILE), ["a"] * len(HOSTILE), special=(0, 2)))
    )
    page = Elements(render_page(result))
    rows = len(page.all("tr")) - len(calm.all("tr"))
    # The same elements as with harmless text, but for the row of one more entry of the metadata.
    assert rows == 1
    elements = [tag for tag, _ in page.found]
    for tag in {tag for tag, _ in calm.found} - {"tr", "td", "th"}:
        assert elements.count(tag) == len(calm.all(tag)), tag
    data = page_data(render_page(result))
    assert data["tokens"][:12] == list(HOSTILE[:12])
    # What would reorder or garble the text around it is spelled out.
    assert data["tokens"][12:15] == [r"\u202eevil\u202c", r"\x00\x1b[31m", r"\ud800"]
    assert data["tokens"][15] == HOSTILE[15]


def test_the_same_result_gives_the_same_page() -> None:
    assert render_page(made_up(story(40))) == render_page(made_up(story(40)))
    assert render_page(made_up(story(40))) != render_page(made_up(story(40), seed=1))


def test_a_loaded_result_gives_the_same_page(tmp_path: Path) -> None:
    result = made_up(story(20), (" a", " b"))
    result.save(tmp_path / "result")
    assert render_page(heat_fast.load(tmp_path / "result")) == render_page(result)


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    result = made_up(("a", "\ud800"), metadata={"model": "\ud800"})
    result.to_html(str(path))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(OutputError, match="is a directory"):
        result.to_html(tmp_path)


def test_a_folder_on_a_disk_is_not_told() -> None:
    for html in (render_page(made_up(("a",))), render_view(made_up(("a",)))):
        assert "somebody" not in html
        assert "tiny" in html


@pytest.mark.parametrize("metadata", [{}, {"config": {"beta": "x"}}, {"versions": {}}])
def test_a_page_without_metadata(metadata: dict[str, Any]) -> None:
    bare = dataclasses.replace(made_up(("a", "b")), metadata=metadata)
    assert "score = gate × (weighted curvature" in render_page(bare)
    assert "heat-fast-view" in render_view(bare)


# --- the prompt in stretches ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        ("שלום", " עולם", "!"),
        ("مرحبا", " بال", "عالم"),
        ("我", "喜欢", "机器学习", "。"),
        ("👩‍👩‍👧", " e", "\u0301"),
        ("\n", "\t", "  ", " a ", "\n\n"),
    ],
)
def test_the_text_comes_through_intact(pieces: tuple[str, ...]) -> None:
    result = made_up(pieces)
    data = page_data(render_page(result))
    shown = [data["tokens"][s] if isinstance(s, int) else s[0] for s in data["pieces"]]
    assert "".join(shown) == result.prompt_text


def test_pieces_of_one_character_are_one_stretch() -> None:
    result = made_up(
        ("<0xE4>", "<0xBD>", "<0xA0>", "a"), text="你 a", offsets=[(0, 1), (0, 1), (0, 1), (2, 3)]
    )
    assert [(s.text, s.tokens) for s in pieces(result)] == [
        ("你", (0, 1, 2)),
        (" ", ()),
        ("a", (3,)),
    ]
    assert page_data(render_page(result))["pieces"] == [["你", 0, 1, 2], [" "], 3]


def test_every_token_is_in_one_stretch() -> None:
    overlapping = made_up(
        ("ab", "bc", "<s>", "d", "e"),
        text="abc de ",
        offsets=[(0, 2), (1, 3), (3, 3), (4, 5), (5, 6)],
    )
    for result in (overlapping, made_up(("a", "b"), offsets=None, text=None)):
        found = [index for piece in pieces(result) for index in piece.tokens]
        assert found == list(range(len(result)))
    assert "".join(s.text for s in pieces(overlapping) if 2 not in s.tokens) == "abc de "
    ids = made_up(("#4", "#7"), offsets=None, prompt_text=None, text="")
    assert [piece.text for piece in pieces(ids)] == ["#4", "#7"]


# --- colours --------------------------------------------------------------------------------------


def lightness(colour: str) -> float:
    """Perceived lightness by OKLab, 0 to 1."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels)
    long = 0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b
    medium = 0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b
    short = 0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b
    return (
        0.2104542553 * long ** (1 / 3)
        + 0.7936177850 * medium ** (1 / 3)
        - 0.0040720468 * short ** (1 / 3)
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("ramp", [palette.HEAT, palette.COOL], ids=["heat", "cool"])
def test_steps_are_of_equal_lightness_and_readable(ramp: palette.Ramp, theme: str) -> None:
    steps = ramp[theme]
    differences = [
        lightness(after) - lightness(before) for before, after in itertools.pairwise(steps)
    ]
    mean = sum(differences) / len(differences)
    assert (mean < 0) == (theme == "light")
    # Eight bits per channel and the gamut's edge move a step's lightness by under 0.01.
    assert all(abs(difference - mean) < 0.01 for difference in differences)
    for colour in steps:
        assert palette.contrast(colour, palette.ink(colour, theme)) >= 4.5


def test_both_arms_are_equally_strong() -> None:
    for theme in ("light", "dark"):
        for warm, cold in zip(palette.HEAT[theme], palette.COOL[theme], strict=True):
            assert abs(lightness(warm) - lightness(cold)) < 0.02


def test_words_are_readable_in_both_themes() -> None:
    style = Elements(render_page(made_up(("a",)))).texts["style"][0]
    colours = {
        name: {"light": light, "dark": dark}
        for name, light, dark in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", style)
    }
    for theme in ("light", "dark"):
        for ink in ("ink", "muted", "accent"):
            for paper in ("page", "card", "field"):
                contrast = palette.contrast(colours[ink][theme], colours[paper][theme])
                assert contrast >= 4.5, (ink, paper, theme, contrast)


@pytest.mark.parametrize(
    ("value", "step"), [(0.0, 0), (-1.0, 0), (1.0, 9), (0.25, 4), (1e-4, 0), (0.99, 9)]
)
def test_steps_follow_the_square_root(value: float, step: int) -> None:
    assert colour_step(value, 1.0, 9) == step
    assert colour_step(value, 0.0, 9) == 0


def test_numbers_round_into_the_next_thousand() -> None:
    assert [number(value) for value in (999.4, 999.9, 1000.0)] == ["999", "1,000", "1,000"]


# --- notes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "metadata", "words"),
    [
        ({"estimator": "low_rank"}, {}, "low-rank approximation"),
        ({"estimator": "row"}, {}, "another quantity"),
        ({"curvature": "grad_squared"}, {}, "squared gradient"),
        ({"curvature": "none"}, {}, "Curvature was left out"),
        ({"normalize": "sum"}, {}, "scaled to a sum of 1"),
        ({}, {}, "different scales"),
        ({}, {}, "attention sink"),
        ({"layers": 6}, {"layers": {"used": 6, "of": 28}}, "the last 6 of 28 blocks"),
        (
            {"window": 512},
            {"windows": {"stretches": [[0, 512], [256, 768]], "tokens": 512, "leakage": 0.25}},
            "2 windows of 512 tokens, weighted by the probability of the target in each (leakage "
            "25.0%",
        ),
        (
            {"window": 512, "window_weights": "uniform"},
            {"windows": {"stretches": [[0, 512], [256, 768]], "tokens": 512, "leakage": 0.25}},
            "2 windows of 512 tokens (leakage 25.0%",
        ),
        (
            {"coverage": 0.95},
            {
                "screening": {
                    "coverage": {
                        "skipped": 80,
                        "tokens": 100,
                        "audit": {
                            "tokens": 5,
                            "largest_information": 0.5,
                            "score_share_lost": 0.002,
                        },
                    }
                }
            },
            "Information skipped for 80 of 100 tokens (coverage 0.95); audit of 5",
        ),
    ],
)
def test_notes_tell_how_the_result_was_made(
    config: dict[str, Any], metadata: dict[str, Any], words: str
) -> None:
    plain = " ".join(notes.cautions(made_up(("a", "b"))))
    result = made_up(("a", "b"), config=config, metadata=metadata)
    assert words in " ".join(notes.cautions(result))
    assert (words in plain) == (not config)
    assert words in " ".join(Elements(render_page(result)).texts["section"])


def test_the_formula_has_the_weights_that_were_used() -> None:
    assert notes.formula(made_up(("a",))) == "score = gate × (0.5 × curvature + 0.5 × information)"
    weights = made_up(("a",), config={"beta": 0.0, "gamma": 2.0, "alpha": 0.125})
    assert notes.formula(weights) == "score = gate × (2 × information + 0.125 × gradient)"


def test_the_formula_has_no_part_that_was_left_out() -> None:
    result = made_up(("a", "b"), config={"curvature": "none"})
    assert notes.formula(result) == "score = gate × (0.5 × information)"
    assert list(page_data(render_page(result))["rows"]) == ["score", "gate", "information", "drop"]


# --- other methods --------------------------------------------------------------------------------

NEVER_OF_ANOTHER_METHOD = (
    "score = gate",
    "paths that carry much attention",
    "Gate",
    "Curvature",
    "curvature",
    "Variant",
)


def visible_text(html: str) -> str:
    """What a reader sees before the page's script has run, without the table of all metadata."""
    shown = re.sub(r"<(details|script)\b.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(Elements(shown).texts["body"])


def test_another_methods_page_tells_its_name_and_what_it_measured() -> None:
    result = of_method((("<s>", "the", " cat")), "leave_one_out", INFORMATION)
    html = render_page(result)
    assert list(page_data(html)["rows"]) == ["score", "information", "drop"]
    page = Elements(html)
    chosen = [attributes.get("value") for attributes in page.all("input")]
    assert chosen[:3] == ["score", "information", "drop"]
    assert [each["data-name"] for each in page.all("th") if "data-name" in each] == chosen[:3]
    assert page.texts["dt"][:3] == ["Score", "Information", "Drop"]
    assert page.texts["dt"][-2:] == ["Information", "Drop"]
    text = visible_text(html)
    assert "the method leave_one_out" in text
    assert "Methodleave_one_out" in page.texts["tr"]
    assert not [words for words in NEVER_OF_ANOTHER_METHOD if words in text]


def test_scores_alone_leave_nothing_to_choose_or_explain() -> None:
    page = Elements(render_page(of_method(("a", "b"), "input_x_gradient", ("target_scores",))))
    assert [each.get("name") for each in page.all("input")] == [None, None]  # slider and rows
    assert page.texts["dt"] == ["Score", "Summed score", "Share"]
    assert not [each for each in page.all("p") if each.get("class") == "formula"]


def test_cautions_of_another_method_are_its_own() -> None:
    scores = ("target_scores",)
    told = " ".join(notes.cautions(of_method(("a", "b"), "input_x_gradient", scores)))
    assert "evidence about the model" in told
    assert "both signs" in told
    for words in ("urvature", "nformation", "attention sink"):
        assert words not in told
    unsigned = of_method(("a", "b"), "random", scores, target_scores=torch.ones(1, 2))
    assert "both signs" not in " ".join(notes.cautions(unsigned))
    masked = of_method(("a", "b"), "leave_one_out", INFORMATION, config={"masking": "zero"})
    assert "attention sink" in " ".join(notes.cautions(masked))


def test_the_view_of_another_method_has_its_columns_and_both_signs() -> None:
    result = of_method((("<s>", "the", " cat")), "leave_one_out", INFORMATION)
    view = Elements(render_view(result))
    assert view.texts["th"] == ["#", "pos.", "token", "score", "share", "information"]
    assert [line.split("%")[0] for line in view.texts["tr"][1:]] == [
        "10<s>-4.0050.0",
        "22·cat3.0037.5",
        "31the-1.0012.5",
    ]
    classes = [each.get("class") for each in view.all("span") if each.get("class") != "quiet"]
    assert classes == ["c9", "c4", "h8"]
    legend = next(line for line in view.texts["p"] if "square root" in line)
    assert legend.startswith("-4.00") and "4.00 (square root of the magnitude)" in legend
    assert "Method: leave_one_out" in view.texts["p"][-1]


# --- metadata -------------------------------------------------------------------------------------


def test_all_metadata_is_there() -> None:
    page = " ".join(Elements(render_page(made_up(("a",)))).texts["tr"])
    for entry in (
        "config.probes10",
        "counts.hvp640",
        "versions.heat_fast0.1.0",
        "config.layersnone",
    ):
        assert entry in page
    long = made_up(
        ("a",), metadata={"windows": {"stretches": [[0, 1]] * 999, "tokens": 1, "leakage": None}}
    )
    assert max(len(value) for _, value in notes.settings(long)) < 300


# --- the notebook's view --------------------------------------------------------------------------


def test_the_view_is_static_and_its_numbers_are_the_results() -> None:
    result = made_up(("<s>", "the", " cat", "\n", " <b>"), special=(0,))
    html = result._repr_html_()
    view = Elements(html)
    assert view.all("script") == []
    assert view.texts["div"][1] == "<s>the cat↵\n <b>"
    for row, line in zip(result.top(), view.texts["tr"][1:], strict=True):
        assert f"{number(row.score)}" in line and f"{number(row.gate)}" in line
    highest = result.top(1)[0]
    (strongest,) = (
        text
        for attributes, text in zip(view.all("span"), view.texts["span"], strict=True)
        if attributes.get("class") == "h9"
    )
    assert strongest.strip() == highest.token.replace("\n", "↵").strip()


def test_the_views_styles_stay_inside() -> None:
    (style,) = Elements(render_view(made_up(("a",)))).texts["style"]
    selectors = [one for rule in re.findall(r"([^{}]+)\{", style) for one in rule.split(",")]
    assert len(selectors) > 10
    assert all(selector.strip().startswith(".heat-fast-view") for selector in selectors)


def test_the_view_escapes() -> None:
    calm = Elements(render_view(made_up(["a"] * len(HOSTILE), seed=3)))
    view = Elements(
        render_view(made_up(HOSTILE, HOSTILE[:1], seed=3, metadata={"model": HOSTILE[1]}))
    )
    assert [tag for tag, _ in view.found] == [tag for tag, _ in calm.found]


def test_the_view_of_a_long_prompt_is_compact() -> None:
    assert len(render_view(made_up(story(2000)))) < LIMIT


def test_skipped_information_is_no_number() -> None:
    result = made_up(("a", "b"), information_skipped=(True, False))
    for row, line in zip(result.top(), Elements(render_view(result)).texts["tr"][1:], strict=True):
        assert line.endswith("-") == (row.index == 0)


def test_scores_that_are_all_zero() -> None:
    result = made_up(("a", "b"), target_scores=torch.zeros(1, 2))
    view = Elements(render_view(result))
    assert view.all("span") == [{"class": "quiet"}]
    assert view.all("code")[1:] == [{}, {}]
    assert page_data(render_page(result))["tokens"] == ["a", "b"]


def test_shares_of_roles_are_told() -> None:
    result = made_up(["<s>", "be", "<u>", "why"], metadata={"adapters": ["poet"]})
    assert "Score by role" not in dict(notes.facts(result))
    scores = torch.tensor([[1.0, 2.0, 1.0, 16.0]])
    chat = dataclasses.replace(
        result, roles=(None, "system", None, "user<script>"), target_scores=scores
    )
    told = dict(notes.facts(chat))
    assert told["Score by role"] == "user<script> 80%, chat template 10%, system 10%"
    assert told["Adapters"] == "poet"
    assert "user<script>" not in render_page(chat)


def test_shares_of_segments_are_told() -> None:
    result = dataclasses.replace(
        made_up(["a", "b", "c", "d"]), target_scores=torch.tensor([[1.0, 2.0, 1.0, 16.0]])
    )
    # One may have the name of the rest.
    named = result.with_segments(
        {"elsewhere": result.span(tokens=(1, 2)), "a\n<b>\x1b": result.span(tokens=(3, 4))}
    )
    assert "Score by segment" not in dict(notes.facts(result))
    told = dict(notes.facts(named))["Score by segment"]
    assert told == "a↵<b>\\x1b 80%, elsewhere 10%, elsewhere 10%"
    page = render_page(named)
    assert told.replace("<", "&lt;").replace(">", "&gt;") in page and "\x1b" not in page
    many = {f"{number} {'x' * 99}": result.span(tokens=(3, 4)) for number in range(30)}
    told = dict(notes.facts(result.with_segments(many)))["Score by segment"]
    assert told.endswith("… 80%, and 21 more") and len(told) < 500


# --- figures --------------------------------------------------------------------------------------


def test_the_bars_are_the_top_tokens() -> None:
    pytest.importorskip("matplotlib")
    result = made_up(story(30), (" a", " b"))
    figure = result.plot(5)
    for axis, name in zip(figure.axes, ("score", "gate", "curvature", "information"), strict=True):
        assert axis.get_title(loc="left") == name
        widths = [bar.get_width() for bar in axis.patches]
        assert widths == pytest.approx([getattr(row, name) for row in result.top(5)])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [int(label.split()[-1]) for label in labels] == [row.index for row in result.top(5)]
    with pytest.raises(InputError, match="at least 1"):
        result.plot(0)
    with pytest.raises(InputError, match="special and template tokens alone"):
        made_up(["<s>"], special=[0]).plot(special=False)


def test_the_heat_map_is_target_by_token() -> None:
    pytest.importorskip("matplotlib")
    result = made_up(story(30), (" a", " b", " c"))
    (image,) = result.plot_targets(30).axes[0].images
    assert torch.equal(torch.tensor(image.get_array()), result.target_scores)
    (nothing,) = made_up(("a", "b"), target_scores=torch.zeros(1, 2)).plot_targets().axes[0].images
    assert nothing.get_array().tolist() == [[0.0, 0.0]]
    figure = result.plot_targets(7)
    columns = sorted(row.index for row in result.top(7))
    (image,) = figure.axes[0].images
    assert torch.equal(torch.tensor(image.get_array()), result.target_scores[:, columns])
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert [int(label.split()[-1]) for label in labels] == columns
    assert "7 highest" in figure.axes[0].get_xlabel()


def test_figures_show_negative_scores_and_measured_parts_alone() -> None:
    pytest.importorskip("matplotlib")
    result = of_method(("<s>", "the", " cat"), "leave_one_out", INFORMATION)
    axes = result.plot().axes
    assert [axis.get_title(loc="left") for axis in axes] == ["score", "information"]
    assert [bar.get_width() for bar in axes[0].patches] == [-4.0, 3.0, -1.0]
    assert axes[0].get_xlim()[0] < -4
    colours = [bar.get_facecolor() for bar in axes[0].patches]
    assert colours[0] == colours[2] != colours[1]
    (image,) = result.plot_targets().axes[0].images
    assert image.norm.vmin == -4 and image.norm.vmax == 4
    shades = image.norm(torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0]).numpy())
    assert shades.tolist() == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    scores = of_method(("a", "b"), "random", ("target_scores",))
    assert [axis.get_title(loc="left") for axis in scores.plot().axes] == ["score"]


def test_labels_are_taken_literally(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pieces = ("$x^2$", "$", "a$b_{", "\n", "\t", "\x1b", "\u200b", "\\frac", "%", "{}", "^_")
    result = made_up(pieces, ("$y$", "\n"))
    for figure in (result.plot(len(pieces)), result.plot_targets(len(pieces))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.savefig(tmp_path / "figure.png")
        axis = figure.axes[0]
        texts = {label.get_text() for label in (*axis.get_yticklabels(), *axis.get_xticklabels())}
        assert {r"\$x^2\$  0", "↵  3", "⇥  4", r"\x1b  5", r"\u200b  6"} <= texts


def test_figures_show_themselves_and_leave_pyplot_alone() -> None:
    helpers = pytest.importorskip("matplotlib._pylab_helpers")
    result = made_up(("a", "b"))
    for figure in (result.plot(), result.plot_targets()):
        assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert not helpers.Gcf.get_all_fig_managers()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (made_up(("a",)).plot, made_up(("a",)).plot_targets):
        with pytest.raises(
            MissingPackageError, match=re.escape("pip install 'heat-fast[plot]'")
        ) as caught:
            draw()
        assert isinstance(caught.value, HeatError) and isinstance(caught.value, ImportError)


def test_shares_of_the_table_sum_to_one() -> None:
    result = made_up(story(8))
    shares = [float(share) for share in re.findall(r"<td>([\d.]+)%</td>", render_view(result))]
    assert len(shares) == 8
    assert math.isclose(sum(shares), 100, abs_tol=8 * 0.05)


@pytest.mark.parametrize("module", [reading, page, palette])
def test_the_examples_of_docstrings_run(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0

"""One HTML file that shows a result, and the compact view of it in a notebook.

The page is a Jinja2 template with its styles and its script inlined. What comes from the prompt,
the model or the metadata reaches it in two ways only: as text that Jinja2 escapes, and as one block
of JSON that the script reads and puts into text nodes. A content security policy admits that one
script and those styles by their hashes, and nothing from the network.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import os
import re
from typing import Any, Final

import jinja2
import torch
from torch import Tensor

from heat_fast.files import write_file
from heat_fast.readable import text_of
from heat_fast.reading import Piece, colour_step, escape, number, parts, pieces, shorten, visible
from heat_fast.report import notes, palette
from heat_fast.result import Attribution

__all__ = ["page_data", "render_page", "render_view", "write_page"]

#: What the page can colour by, in the order of its switch: its name there, and the result's.
COMPONENTS: Final = {
    "score": "target_scores",
    "gate": "gate",
    "curvature": "curvature",
    "information": "information",
    "drop": "log_prob_drop",
}
# Characters that end a script element or, in old engines, a line; and halves of characters, which
# UTF-8 cannot hold.
_UNSAFE_IN_SCRIPT: Final = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
_TITLE_LENGTH: Final = 48
_VIEW_ROWS: Final = 10
_VIEW_COMPONENTS: Final = ("gate", "curvature", "information")


def write_page(result: Attribution, path: str | os.PathLike[str]) -> None:
    """Write the page to a file, whole or not at all. Raises OutputError."""
    write_file(path, render_page(result).encode("utf-8", "backslashreplace"))


def render_page(result: Attribution) -> str:
    """The page as text; the same result gives the same text.

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model(1)
    >>> result = heat_fast.attribute(demo.model, demo.tokenizer, "Who is it?", curvature="none")
    >>> render_page(result)[:15]
    '<!doctype html>'
    """
    components, told = _measured(result), notes.terms(result)
    environment = _environment()
    style = environment.get_template("page.css").render(steps=palette.classes())
    script = environment.get_template("page.js").render()
    return environment.get_template("page.html").render(
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        data=script_safe_json(page_data(result)),
        target=_title(result),
        n_tokens=len(result),
        answered=result.metadata.get("scored_response"),
        n_targets=len(result.target_ids),
        components=tuple(components),
        signed=bool((result.target_scores < 0).any()),
        aggregate=result.aggregate,
        steps=palette.STEPS,
        meaning=notes.meaning(result),
        formula=notes.formula(result),
        terms=[(name, told[array]) for name, array in components.items() if array in told],
        cautions=notes.cautions(result),
        parts=parts(result),
        facts=notes.facts(result),
        settings=notes.settings(result),
    )


def page_data(result: Attribution) -> dict[str, Any]:
    """What the page's script works on: the prompt, the targets, and every number of the result.

    tokens, targets: texts, control characters as escapes. pieces: a token's position where it
    stands for itself, else ``[text, position, ...]``. special, skipped: positions. rows: arrays
    `[T, N]` of what was measured, and log_probs `[T]`, as base64 of little-endian float32: exact,
    and shorter than decimals.
    """
    rows = {name: getattr(result, array) for name, array in _measured(result).items()}
    if result.curvature_stderr is not None and "curvature" in rows:
        rows["stderr"] = result.curvature_stderr
    return {
        "tokens": [escape(token) for token in result.tokens],
        "pieces": [_packed(piece, result) for piece in pieces(result)],
        "special": _positions(result.special),
        "skipped": _positions(result.information_skipped or ()),
        "targets": [escape(token) for token in result.target_tokens],
        "log_probs": _base64(result.target_log_probs),
        "aggregate": result.aggregate,
        "steps": palette.STEPS,
        "rows": {name: _base64(array) for name, array in rows.items()},
    }


def render_view(result: Attribution) -> str:
    """The result as a fragment of HTML without a script, for a notebook."""
    scores = result.scores
    highest = float(scores.abs().max())
    signed = bool((scores < 0).any())
    scale = _scale(signed=signed)
    components = [name for name in _VIEW_COMPONENTS if name in result.measured]
    skipped = result.information_skipped or (False,) * len(result)
    rows = [
        {
            "rank": rank,
            "index": row.index,
            "token": visible(row.token),
            "step": _step(row.score, highest),
            "numbers": [
                number(row.score),
                f"{row.share:.1%}" if highest > 0 else "-",
                *(
                    "-"
                    if name == "information" and skipped[row.index]
                    else number(getattr(row, name))
                    for name in components
                ),
            ],
        }
        for rank, row in enumerate(result.top(_VIEW_ROWS), start=1)
    ]
    return (
        _environment()
        .get_template("view.html")
        .render(
            steps=[step for step in palette.classes() if step[0] in scale],
            scale=scale,
            signed=signed,
            highest=number(highest),
            components=components,
            pieces=_stretches(result, highest),
            rows=rows,
            target=_title(result),
            log_prob=number(math.fsum(result.target_log_probs.tolist())),
            n_targets=len(result.target_ids),
            aggregate=result.aggregate,
            cautions=notes.cautions(result)[1:],
            facts=notes.facts(result),
        )
    )


def script_safe_json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever its strings hold.

    >>> script_safe_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE_IN_SCRIPT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _title(result: Attribution) -> str:
    """The target as a heading: without the space before its first word."""
    text = text_of(result.target_tokens)
    return shorten(visible(text.strip(" ") or text), _TITLE_LENGTH)


def _stretches(result: Attribution, highest: float) -> list[dict[str, Any]]:
    """The prompt for the notebook: stretches of one colour each, those without colour joined."""
    scores = result.scores.tolist()
    found: list[dict[str, Any]] = []

    def plain(text: str) -> None:
        if found and not found[-1]["step"]:
            found[-1]["text"] += text
        else:
            found.append({"text": text, "step": "", "title": ""})

    for piece in pieces(result):
        score = max((scores[index] for index in piece.tokens), key=abs, default=0.0)
        step = _step(score, highest)
        text = escape(piece.text).replace("\t", "⇥").replace("\n", "↵\n")
        if step and text[0] == " " and text.strip(" "):  # a space before a word is not coloured
            plain(" ")
            text = text[1:]
        if step:
            title = f"position {piece.tokens[0]}, score {number(score)}"
            found.append({"text": text, "step": step, "title": title})
        else:
            plain(text)
    return found


def _measured(result: Attribution) -> dict[str, str]:
    """What of `COMPONENTS` the result has."""
    return {name: array for name, array in COMPONENTS.items() if array in result.measured}


def _step(score: float, highest: float) -> str:
    """The class of a score's colour: ``h9`` to ``h1``, ``c1`` to ``c9`` where negative, or none."""
    step = colour_step(abs(score), highest, palette.STEPS)
    return f"{'c' if score < 0 else 'h'}{step}" if step else ""


def _scale(*, signed: bool) -> list[str]:
    """The classes of a legend, from the lowest score to the highest."""
    steps = range(1, palette.STEPS + 1)
    return [*(f"c{step}" for step in reversed(steps) if signed), *(f"h{step}" for step in steps)]


def _packed(piece: Piece, result: Attribution) -> int | list[Any]:
    if len(piece.tokens) == 1 and piece.text == result.tokens[piece.tokens[0]]:
        return piece.tokens[0]
    return [escape(piece.text), *piece.tokens]


def _positions(flags: tuple[bool, ...]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]


def _base64(array: Tensor) -> str:
    little_endian = array.to(torch.float32).numpy().astype("<f4")
    return base64.b64encode(little_endian.tobytes()).decode("ascii")


def _csp_hash(text: str) -> str:
    """How a content security policy names an inline script or style."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


@functools.cache
def _environment() -> jinja2.Environment:
    def escaped(name: str | None) -> bool:
        return name is None or name.endswith(".html")

    return jinja2.Environment(
        loader=jinja2.PackageLoader("heat_fast.report"),
        autoescape=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

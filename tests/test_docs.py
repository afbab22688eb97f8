"""The documentation is true: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]
EXTENSIONS = DOCS / "extensions"
FENCE = re.compile(r"^( *)(`{3,})(.*)$")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
#: What the pages are not: what is loaded from elsewhere when one is opened.
LOADED = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, the line it begins in, its text, and what stands before."""

    info: str
    line: int
    text: str
    before: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines = text.splitlines()
    index, ended = 0, 0
    while index < len(lines):
        opening = FENCE.match(lines[index])
        if opening is None:
            index += 1
            continue
        start = index + 1
        index = next(at for at in range(start, len(lines)) if lines[at].strip() == opening[2])
        body = textwrap.dedent("\n".join(lines[start:index])) + "\n"
        yield Block(opening[3].strip(), start + 1, body, "\n".join(lines[ended : start - 1]))
        index += 1
        ended = index


def code_of(page: Path) -> list[Block]:
    """The Python blocks of a page."""
    return [each for each in blocks(page.read_text("utf-8")) if each.info.startswith("python")]


def commands_of(page: Path) -> list[str]:
    """The `heat-fast` commands of a page, in blocks of shell and in running text."""
    text = page.read_text("utf-8")
    found = [
        line
        for each in blocks(text)
        if each.info in ("sh", "shell", "bash", "console")
        for line in each.text.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found += re.findall(r"`(heat-fast [^`]+)`", prose)
    return [" ".join(line.split()) for line in found if line.startswith("heat-fast ")]


def test_there_are_pages() -> None:
    assert {"index.md", "tutorial.md", "how-to/pipelines.md", "method.md"} <= set(NAMES)
    assert sum(len(code_of(page)) for page in PAGES) > 20


# --- code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_of(page)
    if not code:
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    shown = {each.line: each for each in blocks(page.read_text("utf-8")) if each.info == "text"}
    for block in code:
        assert block.info in ("python", "python no-run"), block.info
        # The line of the page is the line of an error.
        lines = "\n" * (block.line - 1) + block.text
        compiled = compile(lines, str(page), "exec")
        if block.info != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compiled, namespace)
        expected = _shown_after(block, shown)
        if expected is not None:
            _assert_prints(expected, printed.getvalue())


def _shown_after(block: Block, shown: dict[int, Block]) -> str | None:
    """What a page says that a block prints: the next block of text, announced by "prints"."""
    end = block.line + block.text.count("\n")
    following = [each for line, each in sorted(shown.items()) if line > end]
    if not following or not following[0].before.rstrip().endswith("prints"):
        return None
    # Another block of code in between would be the one that prints it.
    return following[0].text if "```" not in following[0].before else None


def _assert_prints(expected: str, actual: str) -> None:
    """Words and layout to the letter; numbers to the rounding of another machine's sums."""
    assert NUMBER.sub("#", actual) == NUMBER.sub("#", expected)
    pairs = zip(NUMBER.findall(actual), NUMBER.findall(expected), strict=True)
    for one, other in pairs:
        assert abs(float(one) - float(other)) <= 0.02 * abs(float(other)) + 1e-9


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist_with_these_options(page: Path) -> None:
    commands = commands_of(page)
    if not commands:
        pytest.skip("no command on this page")
    for line in commands:
        check_command(line)


def check_command(line: str) -> None:
    """Assert that the command line knows a command and all its options."""
    import typer

    from heat_fast.cli import app

    root: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    if words[0].startswith("-"):
        assert words[0] in ("--help", *_options(root)), f"{line}: no option {words[0]}"
        return
    command = root.commands.get(words[0])
    assert command is not None, f"{line}: there is no command {words[0]}"
    known = {name: each for each in command.params for name in _names(each)}
    left, places = list(words[1:]), 0
    while left:
        word = left.pop(0)
        if word == "--help":
            continue
        if not word.startswith("--"):
            places += 1
            continue
        assert word in known, f"{line}: {words[0]} has no option {word}"
        option = known[word]
        if not option.is_flag:
            assert left, f"{line}: {word} without a value"
            value, kind = left.pop(0), option.type_descriptor.annotation
            if kind in (int, float):
                kind(value)
    arguments = [each for each in command.params if not _names(each)]
    assert places <= len(arguments), f"{line}: {places} arguments"
    # In running text a command may be named without what it needs.
    needed = sum(each.required for each in arguments)
    assert places in (0, *range(needed, len(arguments) + 1)), f"{line}: {places} arguments"


def _names(parameter: Any) -> list[str]:
    return [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")]


def _options(command: Any) -> list[str]:
    return [name for each in command.params for name in _names(each)]


@pytest.mark.parametrize(
    "line",
    [
        "heat-fast atribute",
        "heat-fast attribute --promt x",
        "heat-fast show",
        "heat-fast attribute --top many",
        "heat-fast --colour",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    if line == "heat-fast show":
        pytest.skip("named without its arguments, as in running text")
    with pytest.raises(Exception):  # noqa: B017  (an assertion, or click's own)
        check_command(line)


def test_every_command_is_described() -> None:
    import typer

    from heat_fast.cli import app

    text = (DOCS / "cli.md").read_text("utf-8")
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"<!-- options: {name} -->" in text, f"cli.md does not describe {name}"


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=[*NAMES, "README.md"])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place.read_text("utf-8")), f"{page.name}: no {target}"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    cleaned = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in found)
    return {re.sub(r"[-\s]+", "-", heading) for heading in cleaned}


# --- figures --------------------------------------------------------------------------------------


def test_the_table_of_variants_is_the_measured_one() -> None:
    measured = {}
    for line in (REPOSITORY / "bench/results/variants-cpu.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[1] == "2048":
            measured[cells[0]] = cells[7:]
    text = (DOCS / "how-to/long-context.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w+]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == len(measured) - 1  # all but the one they are compared with
    for preset, *figures in rows:
        assert figures == measured[preset]


# --- the site -------------------------------------------------------------------------------------


def load(name: str) -> Any:
    """A module of docs/extensions, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXTENSIONS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="griffe is not installed (the extra 'docs')")
    module = load("docstrings")
    assert doctest.testmod(module).failed == 0
    text = "Meaning.\n\nname: one\n    thing.\nother, more: two.\n\nRaises\n------\nE: never.\n"
    assert module.as_markdown(text) == (
        "Meaning.\n\n- **name**: one\n  thing.\n- **other, more**: two.\n\n**Raises**\n\n"
        "- **E**: never."
    )


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra 'docs')")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        page = (site / name).with_suffix(".html").read_text("utf-8")
        assert not LOADED.findall(page), f"{name} loads something from a network"
        assert "<!-- options" not in page and "no-run" not in page
    assert "--estimator" in (site / "cli.html").read_text("utf-8")

"""The README's example is run as it stands, and prints what the README says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def test_the_api_example_prints_what_the_readme_shows(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    shown = text.split("prints\n\n```\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})

    # Words and layout to the letter; numbers to the rounding of another machine's sums.
    assert NUMBER.sub("#", printed.getvalue()) == NUMBER.sub("#", shown)
    for actual, expected in zip(
        NUMBER.findall(printed.getvalue()), NUMBER.findall(shown), strict=True
    ):
        assert abs(float(actual) - float(expected)) <= 0.02 * abs(float(expected)) + 1e-9

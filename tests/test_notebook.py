"""The example notebook runs, and shows what is committed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

from notebook import NOTEBOOK, execute  # noqa: E402

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def outputs(notebook: Any) -> list[tuple[str, list[str]]]:
    """Of every output: its text, and the kinds of what is shown."""
    return [
        (output.get("text", ""), sorted(output.get("data", {})))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def test_the_notebook_shows_what_is_committed(repository: Path) -> None:
    committed, executed = outputs(nbformat.read(NOTEBOOK, as_version=4)), outputs(execute())
    kinds = [kind for _, kind in committed]
    assert kinds.count(["image/png", "text/plain"]) == 2
    assert kinds.count(["text/html", "text/plain"]) == 1
    assert [kind for _, kind in executed] == kinds
    for (before, _), (after, _) in zip(committed, executed, strict=True):
        assert NUMBER.sub("#", after) == NUMBER.sub("#", before)
        for old, new in zip(NUMBER.findall(before), NUMBER.findall(after), strict=True):
            # To the rounding of another machine's sums, and of what is printed.
            assert abs(float(new) - float(old)) <= 0.05 * abs(float(old)) + 1e-9


def test_the_committed_notebook_is_clean() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]

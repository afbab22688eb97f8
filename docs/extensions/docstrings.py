"""Docstrings as Markdown, for the pages that are made of them.

In the code a docstring is plain text: examples follow "Example:" without an empty line, fields are
written "name: meaning", sections are underlined, references are roles. Here these become a block of
code, a list, a bold line and plain code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|exc|attr):`~?([^`]+)`")
_FIELD = re.compile(r"^(`?\w+`?(?:, `?\w+`?)*): (?=\S)")
_UNDERLINE = re.compile(r"^-{3,}$")


class PlainDocstrings(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for every class, function, attribute and module."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A plain docstring as Markdown.

    >>> as_markdown("Add.\\n\\nExample:\\n    >>> 1 + 1\\n    2")
    'Add.\\n\\n**Example**\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    lines = _ROLE.sub(r"`\1`", text).splitlines()
    found: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        below = lines[index + 1] if index + 1 < len(lines) else ""
        if line.strip() in ("Example:", "Examples:") and below.startswith(" "):
            found += [f"**{line.strip(': ')}**", ""]
            index += 1
        elif line.lstrip().startswith(">>> "):
            index = _example(lines, index, found)
        elif _UNDERLINE.match(below) and line.strip():
            found += [f"**{line.strip()}**", ""]
            index += 2
        elif (field := _FIELD.match(line)) and not line.startswith("Example"):
            if found and found[-1] and not found[-1].startswith(("- ", "  ")):
                found.append("")  # a list begins only after an empty line
            names = field[1].replace("`", "")
            found.append(f"- **{names}**: {line[field.end() :]}")
            index += 1
            while index < len(lines) and lines[index].startswith("    "):
                found.append(f"  {lines[index].strip()}")
                index += 1
        else:
            found.append(line)
            index += 1
    return "\n".join(found)


def _example(lines: list[str], index: int, found: list[str]) -> int:
    """A session up to the next empty line, as a block of code; the index of what follows."""
    indent = len(lines[index]) - len(lines[index].lstrip())
    found.append("```pycon")
    while index < len(lines) and lines[index].strip():
        found.append(lines[index][indent:])
        index += 1
    found.append("```")
    return index

"""Prompts that a command is given as text, as a file or as a chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from heat_fast.chat import Conversation
from heat_fast.cli.common import STANDARD_STREAM, UsageError
from heat_fast.errors import InputError


def read_prompt(
    prompt: str | None, prompt_file: str | None, messages: str | None, model: str | None
) -> Any:
    """The prompt that was given as text, as a file or as a chat's file.

    None without any, where the embedded model brings an example; a `model` of one's own has none.
    """
    found = _given(prompt, prompt_file, messages)
    if found is None and model is not None:
        raise UsageError(
            "--model without a prompt: expected --prompt TEXT, --prompt-file F or --messages F (- "
            "for standard input). Give one."
        )
    return found


def _given(prompt: str | None, prompt_file: str | None, messages: str | None) -> Any:
    if prompt is not None and prompt_file is not None:
        raise UsageError("both --prompt and --prompt-file: expected one of them. Drop the other.")
    if prompt_file is not None:
        prompt = read_text(prompt_file).removesuffix("\n").removesuffix("\r")
    if prompt == "":
        raise UsageError("the prompt is empty: expected at least one token. Give some text.")
    if messages is None:
        return prompt
    if prompt is not None:
        raise UsageError("both --messages and a prompt: expected one of them. Drop the other.")
    return _messages(messages)


def _messages(path: str) -> Any:
    """The conversation of a JSON file: its messages, or an object that has them."""
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{_name(path)} is not JSON ({error}): expected a list of messages, "
            '[{"role": "user", "content": "..."}]. Correct it.'
        ) from error
    try:
        Conversation.of(found)
    except InputError as error:
        raise UsageError(f"{_name(path)} holds no conversation: {error}") from error
    return found


def _name(path: str) -> str:
    return "standard input" if path == STANDARD_STREAM else repr(path)


def read_text(path: str) -> str:
    """The text of a file, or of standard input."""
    try:
        data = sys.stdin.buffer.read() if path == STANDARD_STREAM else Path(path).read_bytes()
        return data.decode("utf-8-sig")  # an editor's mark of UTF-8 is no part of the text
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{_name(path)} is not UTF-8 ({error.reason} at byte {error.start}): expected UTF-8 "
            "text. Convert it first."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot read {_name(path)}: {reason}. Expected a readable text file. Check the path."
        ) from error

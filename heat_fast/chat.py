"""Conversations: what the chat template makes of them, and whose each token is.

A conversation is a list of messages, or a mapping with ``messages`` and what else the template is
to be told, ``chat_template_kwargs`` (the name that inference servers use for it as well).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from heat_fast.checks import suggest
from heat_fast.errors import InputError
from heat_fast.locate import first_visible

_KEYS = ("messages", "chat_template_kwargs")
#: Arguments of `apply_chat_template` that say how its result is to be returned, not what it says.
_RETURNED = frozenset(
    {"conversation", "tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask"}
)


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a conversation; a list with one message in it is one, if a wrong one."""
    if isinstance(prompt, Mapping):
        return "messages" in prompt
    return isinstance(prompt, (list, tuple)) and any(isinstance(item, Mapping) for item in prompt)


@dataclass(frozen=True)
class Conversation:
    """Messages that have been checked, and the arguments of the template that renders them."""

    messages: tuple[Mapping[str, Any], ...]
    arguments: Mapping[str, Any]

    @staticmethod
    def of(prompt: Any) -> Conversation:
        """The conversation of a prompt.

        The template is asked for the beginning of the assistant's next message, unless the last one
        is the assistant's, which is then continued. `chat_template_kwargs` may say otherwise
        (`add_generation_prompt`, `continue_final_message`).

        Raises InputError where something is not a message, or an argument has no place here.
        """
        given = prompt if isinstance(prompt, Mapping) else {"messages": prompt}
        if "messages" not in given:
            raise InputError(
                f"the conversation has {sorted(map(str, given))}: expected 'messages', a list of "
                "them. Write it as [{'role': 'user', 'content': '...'}]."
            )
        unknown = [str(key) for key in given if key not in _KEYS]
        if unknown:
            raise InputError(
                f"the conversation has {unknown[0]!r}: expected 'messages', and in "
                "'chat_template_kwargs' what the template takes beside them. "
                + suggest(unknown[0], _KEYS)
            )
        messages = _checked(given["messages"])
        arguments = given.get("chat_template_kwargs") or {}
        if not isinstance(arguments, Mapping):
            raise InputError(
                f"chat_template_kwargs is {type(arguments).__name__}: expected a mapping of names "
                "to values. Write it as {'enable_thinking': False}."
            )
        misplaced = sorted(_RETURNED.intersection(arguments))
        if misplaced:
            raise InputError(
                f"chat_template_kwargs has {misplaced[0]!r}: expected what the template is told, "
                "not how its result is returned. Leave it out."
            )
        if not {"add_generation_prompt", "continue_final_message"} & set(arguments):
            last = messages[-1]
            content = last.get("content")
            says = bool(content.strip() if isinstance(content, str) else content)
            goes_on = last["role"] == "assistant" and says and not last.get("tool_calls")
            how = "continue_final_message" if goes_on else "add_generation_prompt"
            arguments = {how: True, **arguments}
        return Conversation(messages, arguments)

    def render(self, tokenizer: Any) -> str:
        """The text that the tokenizer's chat template makes of it."""
        if tokenizer is None:
            raise InputError(
                "the prompt is a list of chat messages but there is no tokenizer: expected one "
                "whose chat template renders them. Pass the model's tokenizer, or token ids."
            )
        if not (self.arguments.get("chat_template") or getattr(tokenizer, "chat_template", None)):
            raise InputError(
                "the prompt is a list of chat messages but the tokenizer has no chat template: "
                "expected tokenizer.chat_template to be set. Set it, or pass the prompt as text."
            )
        messages = [dict(message) for message in self.messages]
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, **self.arguments)
        except Exception as error:  # a template may raise anything, on purpose or not
            instead = (
                ", or pass chat_template_kwargs={'add_generation_prompt': True} to begin another "
                "message instead of continuing the last"
                if self.arguments.get("continue_final_message")
                else ""
            )
            raise InputError(
                f"the tokenizer's chat template rejected the messages: {error}. Expected roles and "
                "contents in the order the template asks for; change the messages accordingly"
                f"{instead}."
            ) from error
        if not isinstance(rendered, str):
            raise InputError(
                "the tokenizer's chat template gave several texts: expected the messages of one "
                "conversation. Attribute one conversation at a time."
            )
        return rendered

    def roles(
        self, text: str, offsets: Sequence[tuple[int, int]] | None, tokenizer: Any
    ) -> tuple[str | None, ...] | None:
        """The role of the message that each token of the rendered text belongs to.

        None for tokens of the template's own, and of what it makes of tool calls; None in all,
        with a warning, where the messages cannot be told from it.
        """
        contents = None if offsets is None else self._contents(text, tokenizer)
        if offsets is None or contents is None:
            why = "tells no positions" if offsets is None else "rewrites the messages"
            by = "tokenizer" if offsets is None else "chat template"
            warnings.warn(
                f"the {by} {why}, so it is not known which tokens are whose: roles are None, and "
                "special=False leaves the chat template's words in rankings.",
                stacklevel=2,
            )
            return None
        roles: list[str | None] = []
        for pair in offsets:
            place = first_visible(text, pair)
            inside = (role for start, stop, role in contents if start <= place < stop)
            roles.append(next(inside, None) if pair[0] < pair[1] else None)
        return tuple(roles)

    def _contents(self, text: str, tokenizer: Any) -> list[tuple[int, int, str]] | None:
        """Where each content stands in the rendered text, and whose it is; None if not clear.

        The template is rendered once more with marks in place of the contents: what stands between
        the marks is the template's own, and has to be found again, in order, around the contents.
        Templates strip contents, or leave out some of what an earlier turn said: whatever then
        stands between two pieces of the template's is the message's.
        """
        order: list[tuple[str, str, str]] = []

        def mark(role: str, content: str) -> str:
            order.append((f"heatfast{len(order)}mark", content, role))
            return order[-1][0]

        marked = tuple(
            {**message, "content": _with_texts(message["content"], partial(mark, message["role"]))}
            if "content" in message
            else message
            for message in self.messages
        )
        try:
            rest = Conversation(marked, self.arguments).render(tokenizer)
        except InputError:  # a template that looks at what is said
            return None
        # A template may leave a message out, or put the system's into the last of the user's.
        order = sorted((each for each in order if each[0] in rest), key=lambda e: rest.index(e[0]))
        pieces = []
        for name, _, _ in order:
            before, _, rest = rest.partition(name)
            pieces.append(before)
        pieces.append(rest)
        if not text.startswith(pieces[0]):
            return None
        found, place = [], len(pieces[0])
        for number, (_, content, role) in enumerate(order):
            after, last = pieces[number + 1], number + 1 == len(order)
            stop = _end(text, place, content, after, last)
            if stop is None:
                return None
            found.append((place, stop, role))
            place = stop + len(after)
        return found if place == len(text) else None


def _end(text: str, place: int, content: str, after: str, last: bool) -> int | None:
    """Where a content that begins at `place` ends, the template going on with `after`."""
    for written in (content, content.strip()):
        stop = place + len(written)
        if text.startswith(written + after, place) and (not last or stop + len(after) == len(text)):
            return stop
    if last:
        return len(text) - len(after) if text.endswith(after) else None
    # White space is no sign by which to know the template's own again.
    stop = text.find(after, place) if after.strip() else -1
    return None if stop < 0 else stop


def _checked(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(
            f"the messages are {messages!r}: expected a list of at least one message. Write it as "
            "[{'role': 'user', 'content': '...'}]."
        )
    for position, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not ("content" in message or "tool_calls" in message):
            raise InputError(
                f"chat message {position} is {message!r}: expected a dict with 'role' (text) and "
                "'content'. Write it as {'role': 'user', 'content': '...'}."
            )
    return tuple(messages)


def _with_texts(content: Any, change: Callable[[str], str]) -> Any:
    """A content with its text changed, or the texts of its parts; what says nothing stays."""
    if isinstance(content, str):
        return change(content) if content.strip() else content
    if isinstance(content, (list, tuple)):
        return [
            {**part, "text": _with_texts(part["text"], change)}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else _with_texts(part, change)
            if isinstance(part, str)
            else part
            for part in content
        ]
    return content

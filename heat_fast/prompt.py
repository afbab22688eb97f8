"""What was asked, as token ids: prompts (text, ids or chat messages) and targets.

Nothing is padded, truncated or batched here: a prompt is one sequence, exactly as the model will
read it, together with what a report needs to show it to a person.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from heat_fast.chat import Conversation, is_chat
from heat_fast.checks import is_whole
from heat_fast.errors import InputError
from heat_fast.locate import Range, locate, named_ranges
from heat_fast.readable import joined, readable_tokens, special_flags

__all__ = [
    "EncodedPrompt",
    "check_length",
    "encode_prompt",
    "encode_target",
]

# What a tokenizer may return beside the ids without changing what the model computes.
_HARMLESS_KEYS = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "offset_mapping", "special_tokens_mask"}
    | {"length"}
)
# How SentencePiece vocabularies write the space that begins a word.
_BOUNDARY = "▁"
# Texts that a target may be tokenised behind: one that does not merge with what follows is enough.
_BEFORE = ("a", "1", ".")


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as the model reads it.

    token_ids: the N ids.
    tokens: each id as a person would read it (``" the"``, not ``"Ġthe"``); bytes that are no
        whole character as ``<0xE4>``, special tokens by their name; ``#17`` without a tokenizer.
    offsets: half-open character positions of each token in `text`; an empty range for a token
        that was added and is not in the text. None where ids were given, and with tokenizers
        that do not report positions (those written in Python, "slow" ones).
    text: the text that was tokenised (for chat messages the rendered template), or None where
        ids were given.
    special: which tokens are special.
    roles: of chat messages, for each token the role of the message whose content it belongs to (as
        in `heat_fast.spans`), None for the template's own. None for other prompts, and where the
        rendered template cannot be taken apart (`heat_fast.chat`).
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...] | None
    text: str | None
    special: tuple[bool, ...]
    roles: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def followed_by(self, response: Sequence[int], tokenizer: Any) -> EncodedPrompt:
        """The prompt with the beginning of a response to it, which is the assistant's in a chat."""
        tokens = readable_tokens(response, tokenizer)
        text, offsets, roles = self.text, self.offsets, self.roles
        if text is not None:
            said, places = joined(tokens)
            if offsets is not None:
                shifted = ((start + len(text), end + len(text)) for start, end in places)
                offsets = (*offsets, *shifted)
            # A token may end within a character: each of its bytes is a character here.
            text += re.sub("[\udc80-\udcff]", "\ufffd", said)
        if roles is not None:
            roles = (*roles, *("assistant" for _ in response))
        return EncodedPrompt(
            token_ids=(*self.token_ids, *response),
            tokens=(*self.tokens, *tokens),
            offsets=offsets,
            text=text,
            special=(*self.special, *special_flags(response, tokenizer)),
            roles=roles,
        )

    def named(self, parts: Mapping[str, str | Range]) -> dict[str, Range]:
        """Tokens of named parts of the prompt, half-open; see `heat_fast.locate.locate`."""
        return named_ranges(
            parts, lambda where: locate(where, self.text, self.offsets, len(self.token_ids))
        )


def encode_prompt(
    prompt: Any,
    tokenizer: Any,
    vocabulary_size: int,
    max_length: int | None = None,
) -> EncodedPrompt:
    """Turn a prompt into the ids the model will read.

    Parameters
    ----------
    prompt: text (tokenised with the tokenizer's usual special tokens, unless it begins with the
        one for the beginning, as a rendered chat does); token ids as a list, a 1-D integer array or
        tensor, or a tokenizer's output; or chat messages, a list of dicts with ``role`` and
        ``content``, rendered by the tokenizer's chat template (see `heat_fast.chat`).
    tokenizer: a Hugging Face tokenizer; may be None where ids are given.
    vocabulary_size: rows of the model's embedding matrix; ids lie in ``[0, vocabulary_size)``.
    max_length: most tokens the model can read, or None for no limit.

    Raises
    ------
    InputError: empty prompt, several prompts, padding, ids outside the vocabulary or not whole
        numbers, no tokenizer or no chat template where one is needed, too many tokens.

    >>> encode_prompt([3, 1, 2], None, vocabulary_size=10).token_ids
    (3, 1, 2)
    """
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] | None = None
    roles: tuple[str | None, ...] | None = None
    if isinstance(prompt, str):
        text = prompt
        begun = getattr(tokenizer, "bos_token", None)
        rendered = bool(begun) and prompt.startswith(str(begun))
        token_ids, offsets = _tokenize(prompt, tokenizer, add_special_tokens=not rendered)
    elif is_chat(prompt):
        conversation = Conversation.of(prompt)
        text = conversation.render(tokenizer)
        # The template has written the special tokens into the text already.
        token_ids, offsets = _tokenize(text, tokenizer, add_special_tokens=False)
        roles = conversation.roles(text, offsets, tokenizer)
    elif isinstance(prompt, Mapping):
        token_ids = _ids_of_mapping(prompt, "prompt")
    else:
        token_ids = _ids_of_sequence(prompt, "prompt")
    if not token_ids:
        raise InputError(
            "the prompt is empty: expected at least one token, because the target is predicted "
            "from the last one. Pass some text or token ids."
        )
    _check_vocabulary(token_ids, vocabulary_size, "prompt", made_by_tokenizer=text is not None)
    if max_length is not None:
        check_length(len(token_ids), 1, max_length)
    return EncodedPrompt(
        token_ids=token_ids,
        tokens=readable_tokens(token_ids, tokenizer),
        offsets=offsets,
        text=text,
        special=special_flags(token_ids, tokenizer),
        roles=roles,
    )


def encode_target(target: Any, tokenizer: Any, vocabulary_size: int) -> tuple[int, ...] | None:
    """Turn a target into ids; None (the model's own next token) stays None.

    Text is tokenised by itself, without special tokens, and its tokens follow the prompt's. With a
    byte-level tokenizer (GPT-2, Llama 3, Qwen) the space belongs to the word, so write it:
    ``" Paris"``. A SentencePiece tokenizer (Llama 2, Mistral) that begins every text with a
    word boundary makes the same tokens of ``"Paris"`` and ``" Paris"`` here; a target that begins
    with anything but a letter or a digit, such as ``"."``, ``"'s"`` or a newline, has no boundary
    of its own. A single id is a target of one token.

    Raises
    ------
    InputError: a target with no tokens, ids outside the vocabulary or not whole numbers, text
        without a tokenizer.

    >>> encode_target(4, None, vocabulary_size=10)
    (4,)
    """
    if target is None:
        return None
    if isinstance(target, str):
        token_ids = _tokenize_target(target, tokenizer)
    elif isinstance(target, Mapping):
        token_ids = _ids_of_mapping(target, "target")
    elif _is_scalar(target):
        token_ids = (_whole_number(_unwrap(target), "target", None),)
    else:
        token_ids = _ids_of_sequence(target, "target")
    if not token_ids:
        raise InputError(
            f"the target {target!r} has no tokens: expected at least one. Pass some text, a token "
            "id or a list of ids, or None for the model's own next token."
        )
    _check_vocabulary(
        token_ids, vocabulary_size, "target", made_by_tokenizer=isinstance(target, str)
    )
    return token_ids


def check_length(
    prompt_tokens: int, target_tokens: int, max_length: int | None, window: int | None = None
) -> None:
    """Raise InputError where prompt and target together exceed the model's context.

    The last target token is only predicted, never read, so ``prompt_tokens + target_tokens - 1``
    positions are needed. A prompt that is cut into windows of `window` tokens is run window by
    window, so that only these have to fit.
    """
    cut = window is not None and window < prompt_tokens
    prompt_tokens = min(prompt_tokens, window or prompt_tokens)
    needed = prompt_tokens + target_tokens - 1
    if max_length is None or needed <= max_length:
        return
    parts = f"{'a window' if cut else 'the prompt'} has {prompt_tokens} tokens"
    if target_tokens > 1:
        parts += (
            f" and the target {target_tokens}, which needs {needed} positions (the last target "
            "token is not read)"
        )
    shorten = f"Shorten the input by {needed - max_length} tokens"
    raise InputError(
        f"{parts}: expected at most {max_length}, the length of the model's context. "
        f"{'Choose a smaller window' if cut else shorten}, or use a model with a longer context."
    )


# --- text ---------------------------------------------------------------------------------------


def _tokenize(
    text: str, tokenizer: Any, *, add_special_tokens: bool, what: str = "prompt"
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...] | None]:
    if tokenizer is None:
        raise InputError(
            f"the {what} is text but there is no tokenizer: expected one to turn it into token "
            "ids. Pass the model's tokenizer, or token ids instead of text."
        )
    if not text:
        return (), None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the {what} is not valid Unicode at character {error.start}: expected text without "
            "lone surrogates. Decode it with the encoding it was written in."
        ) from error
    with_offsets = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_offsets_mapping=with_offsets,
        verbose=False,
    )
    token_ids = tuple(int(token_id) for token_id in encoding["input_ids"])
    if add_special_tokens and not text.strip():
        # Some tokenizers drop white space; what is left would be special tokens alone.
        bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        token_ids = token_ids if len(bare) else ()
    if not with_offsets:
        return token_ids, None
    offsets = [(int(start), int(end)) for start, end in encoding["offset_mapping"]]
    return token_ids, _untrimmed(token_ids, offsets, text, tokenizer)


def _untrimmed(
    token_ids: tuple[int, ...], offsets: list[Range], text: str, tokenizer: Any
) -> tuple[Range, ...]:
    """The characters of each token, where a tokenizer trims white space off them.

    A token of nothing else is left with an empty range then, as one that was added. It gets back
    what lies between its neighbours, as much as it has characters; others stay trimmed.
    """
    empty = [start == end for start, end in offsets]
    if not any(empty):
        return tuple(offsets)
    added = special_flags(token_ids, tokenizer)
    tokens = readable_tokens(token_ids, tokenizer)
    following, low = len(text), 0
    limits = []  # where the next token with characters begins
    for start, end in reversed(offsets):
        limits.append(following)
        following = start if start < end else following
    limits.reverse()
    found = []
    for index, (start, end) in enumerate(offsets):
        if empty[index] and not added[index] and tokens[index].isspace():
            start, end = low, min(low + len(tokens[index]), max(low, limits[index]))
        found.append((start, end))
        low = max(low, end)
    return tuple(found)


def _tokenize_target(text: str, tokenizer: Any) -> tuple[int, ...]:
    """The ids of a target as it follows the prompt.

    Some tokenizers put a word boundary in front of every text. A target that begins with a letter
    or digit keeps it, as `are` stands for the word; in front of anything else, as `.` or ` are`, it
    would be a token more than the text has, or another token.
    """
    token_ids, _ = _tokenize(text, tokenizer, add_special_tokens=False, what="target")
    if not token_ids or text[0].isalnum():
        return token_ids
    if not str(tokenizer.convert_ids_to_tokens(token_ids[0])).startswith(_BOUNDARY):
        return token_ids
    for before in _BEFORE:
        ids, _ = _tokenize(before, tokenizer, add_special_tokens=False)
        both, _ = _tokenize(before + text, tokenizer, add_special_tokens=False, what="target")
        if both[: len(ids)] == ids and len(both) > len(ids):
            return both[len(ids) :]
    return token_ids


# --- ids ----------------------------------------------------------------------------------------


#: What to do with a message where there should be a prompt, or a target.
_SINGLE = {
    "prompt": "a list of messages. Put it in a list.",
    "target": "what it says, text or token ids. Pass its content.",
}


def _ids_of_mapping(encoding: Mapping[str, Any], what: str) -> tuple[int, ...]:
    """The ids of a tokenizer's output, after checking that nothing else in it matters."""
    if "role" in encoding:
        raise InputError(f"the {what} is a single chat message: expected {_SINGLE[what]}")
    if "input_ids" not in encoding:
        raise InputError(
            f"the {what} is a mapping with {sorted(map(str, encoding))}: expected a tokenizer's "
            "output with 'input_ids'. Pass text, token ids or chat messages."
        )
    unknown = sorted(str(key) for key in encoding if key not in _HARMLESS_KEYS)
    if unknown:
        raise InputError(
            f"the tokenizer's output also has {unknown}, which would be ignored: expected "
            "input_ids and attention_mask alone. Pass the ids by themselves."
        )
    token_ids = _ids_of_sequence(encoding["input_ids"], what)
    if "attention_mask" in encoding:
        mask = _ids_of_sequence(encoding["attention_mask"], "attention_mask")
        if len(mask) != len(token_ids):
            raise InputError(
                f"attention_mask has {len(mask)} entries for {len(token_ids)} tokens: expected as "
                "many as tokens. Tokenise one prompt without padding."
            )
        holes = [position for position, value in enumerate(mask) if value != 1]
        if holes:
            raise InputError(
                f"attention_mask is not 1 at position {holes[0]} ({len(holes)} such positions): "
                "expected a prompt without padding or holes, because every token is attributed. "
                "Tokenise it with padding=False, or pass the unmasked ids alone."
            )
    if any(_ids_of_sequence(encoding.get("token_type_ids", ()), "token_type_ids")):
        raise InputError(
            "token_type_ids are not all 0: expected a single-segment prompt, because the model is "
            "run without them. Pass the ids by themselves."
        )
    return token_ids


def _ids_of_sequence(values: Any, what: str) -> tuple[int, ...]:
    """A flat tuple of whole numbers from a list, array or tensor; a batch of one is unwrapped."""
    values = _unwrap(values)
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InputError(
            f"the {what} is of type {type(values).__name__}: expected text, token ids or chat "
            "messages. Pass one of these."
        )
    if values and any(_is_nested(value) for value in values):
        if len(values) > 1:
            raise InputError(
                f"the {what} is a batch of {len(values)}: expected a single one. Attribute them "
                "one after the other (one Attributor serves them all)."
            )
        return _ids_of_sequence(values[0], what)
    if any(isinstance(value, str) for value in values):
        raise InputError(
            f"the {what} is a list of texts: expected a single text, or a list of token ids. "
            "Join the texts, or attribute them one after the other."
        )
    return tuple(_whole_number(value, what, position) for position, value in enumerate(values))


def _is_nested(value: Any) -> bool:
    return not isinstance(value, (str, bytes)) and isinstance(_unwrap(value), Sequence)


def _is_scalar(value: Any) -> bool:
    return isinstance(_unwrap(value), numbers.Number)


def _unwrap(values: Any) -> Any:
    """Python numbers and lists from an array or tensor, anything else as it is."""
    try:
        return values.tolist() if hasattr(values, "tolist") else values
    except RuntimeError as error:  # on the meta device, or not strided
        raise InputError(
            f"the values of a {type(values).__name__} cannot be read ({error}): expected token ids "
            "in memory. Pass them as a list."
        ) from error


def _whole_number(value: Any, what: str, position: int | None) -> int:
    value = _unwrap(value)
    if not is_whole(value):
        where = "" if position is None else f" at position {position}"
        raise InputError(
            f"the {what} holds {value!r} of type {type(value).__name__}{where}: expected integer "
            "token ids. Pass ids as ints (or an integer tensor)."
        )
    return int(value)


def _check_vocabulary(
    token_ids: Sequence[int], vocabulary_size: int, what: str, *, made_by_tokenizer: bool
) -> None:
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary_size:
            do = (
                "The tokenizer does not belong to this model; load both from the same place."
                if made_by_tokenizer
                else "Check that the ids were made by this model's tokenizer."
            )
            raise InputError(
                f"token id {token_id} at position {position} of the {what} is outside the model's "
                f"vocabulary: expected 0 to {vocabulary_size - 1}. {do}"
            )

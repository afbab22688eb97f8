"""Token ids as a person reads them."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

# Bytes below 0x80 are characters of their own.
_SHOWN_BYTE = re.compile(r"<0x([89A-F][0-9A-F])>")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def readable_tokens(token_ids: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    """Each id as the piece of text a person would read; `tokenizer` may be None."""
    if tokenizer is None:
        return tuple(f"#{token_id}" for token_id in token_ids)
    special = _special_ids(tokenizer)
    readable = {
        token_id: _readable_token(token_id, tokenizer, token_id in special)
        for token_id in set(token_ids)
    }
    return tuple(readable[token_id] for token_id in token_ids)


def special_flags(token_ids: Sequence[int], tokenizer: Any) -> tuple[bool, ...]:
    """Which ids are special tokens; `tokenizer` may be None."""
    special = frozenset() if tokenizer is None else _special_ids(tokenizer)
    return tuple(token_id in special for token_id in token_ids)


def text_of(tokens: Sequence[str]) -> str:
    """The text of readable tokens; bytes that make a character are shown as that.

    Example:
        >>> text_of((" caf", "<0xC3>", "<0xA9>", "<0xF0>"))
        ' café<0xF0>'
    """
    return _show_bytes(b"".join(map(_raw, tokens)))


def joined(tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text of readable tokens, and the characters of each; bytes become characters again.

    A token that is a part of a character has that character, as its neighbours have.
    """
    raw = [_raw(token) for token in tokens]
    text = b"".join(raw).decode("utf-8", errors="surrogateescape")
    sizes = [len(each.encode("utf-8", errors="surrogateescape")) for each in text]
    starts = [0, *accumulate(sizes)]
    ends = list(accumulate(len(each) for each in raw))
    pairs = [
        (bisect_right(starts, end - len(each)) - 1, bisect_left(starts, end))
        for end, each in zip(ends, raw, strict=True)
    ]
    return text, pairs


def _raw(token: str) -> bytes:
    """The bytes of a readable token."""
    text, *rest = _SHOWN_BYTE.split(token)
    raw = text.encode("utf-8", errors="surrogatepass")
    for byte, text in zip(rest[::2], rest[1::2], strict=True):
        raw += bytes.fromhex(byte) + text.encode("utf-8", errors="surrogatepass")
    return raw


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    marked = {token_id for token_id, token in added.items() if getattr(token, "special", False)}
    return frozenset(marked.union(getattr(tokenizer, "all_special_ids", None) or ()))


def _readable_token(token_id: int, tokenizer: Any, special: bool) -> str:
    # A model's embedding may have more rows than its tokenizer has tokens.
    piece = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
    if piece is None:
        return f"#{token_id}"
    piece = str(piece)
    if special:
        return piece
    # Decoders strip the space before a first word, so a token's own text is what a second copy
    # of it adds to the first.
    once = _decode(tokenizer, [token_id])
    twice = _decode(tokenizer, [token_id, token_id])
    if "\N{REPLACEMENT CHARACTER}" not in once and twice.startswith(once):
        return twice[len(once) :]
    raw = _bytes_of_piece(piece)
    return once if raw is None else _show_bytes(raw)


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return str(
        tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _bytes_of_piece(piece: str) -> bytes | None:
    """The bytes behind a byte-fallback piece (``<0xE4>``) or a byte-level one, else None."""
    match = _BYTE_PIECE.fullmatch(piece)
    if match:
        return bytes([int(match.group(1), 16)])
    if all(character in _BYTE_OF_CHARACTER for character in piece):
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies, the other way round.

    Bytes that are visible Latin-1 characters stand for themselves; the others, in order, are
    written as the characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _show_bytes(raw: bytes) -> str:
    """Whole characters as they are, every other byte as ``<0xE4>``."""
    shown = raw.decode("utf-8", errors="surrogateescape")
    return re.sub(r"[\udc80-\udcff]", lambda match: f"<0x{ord(match.group()) - 0xDC00:02X}>", shown)

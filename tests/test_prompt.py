"""Prompts and targets as token ids, with real tokenizers made on the spot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from heat_fast.errors import InputError
from heat_fast.prompt import check_length, encode_prompt, encode_target
from heat_fast.readable import readable_tokens

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'forbidden' %}{{ raise_exception('no such role here') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """Byte-level BPE (as in GPT-2, Llama 3, Qwen) that puts <s> first and has a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "<end>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def word_level() -> Any:
    """One id per word, nothing added, no chat template."""
    vocabulary = {"<unk>": 0, "red": 1, "ball": 2, "[pad]": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="[pad]")


class SlowTokenizer:
    """What a tokenizer written in Python looks like: no offsets to be had."""

    is_fast = False
    all_special_ids = (0,)
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __len__(self) -> int:
        return 128

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert not options.get("return_offsets_mapping")
        start = [0] if options.get("add_special_tokens", True) else []
        return {"input_ids": start + [ord(character) for character in text]}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return "<s>" if token_id == 0 else chr(token_id)

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return "".join(self.convert_ids_to_tokens(token_id) for token_id in token_ids)


# --- text -----------------------------------------------------------------------------------------


def test_text_gets_special_tokens_offsets_and_readable_tokens(byte_level: Any) -> None:
    encoded = encode_prompt("the cat", byte_level, len(byte_level))
    assert encoded.token_ids == tuple(byte_level("the cat")["input_ids"])
    assert encoded.tokens == ("<s>", "the", " cat")
    assert encoded.special == (True, False, False)
    assert encoded.offsets == ((0, 0), (0, 3), (3, 7))
    assert encoded.text == "the cat"
    assert len(encoded) == 3


@pytest.mark.parametrize(
    "text", ["the mat\n\n sat", "é 你好 🙂 the", "a\tb", "עברית the", "x" * 40]
)
def test_offsets_are_half_open_and_cover_the_text(byte_level: Any, text: str) -> None:
    encoded = encode_prompt(text, byte_level, len(byte_level))
    assert encoded.offsets is not None
    covered = set[int]()
    for start, end in encoded.offsets:
        assert 0 <= start <= end <= len(text)
        covered.update(range(start, end))
    assert covered == set(range(len(text)))
    for token, (start, end) in zip(encoded.tokens[1:], encoded.offsets[1:], strict=True):
        assert token == text[start:end] or token.startswith("<0x")


def test_trimmed_white_space_gets_its_characters_back(byte_level: Any) -> None:
    trimming = copy.deepcopy(byte_level)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "the\n   \n\ncat \t sat  "
    encoded = encode_prompt(text, trimming, len(trimming))
    whole = encode_prompt(text, byte_level, len(byte_level))
    assert encoded.offsets is not None and whole.offsets is not None
    assert encoded.token_ids == whole.token_ids[1:]
    for token, trimmed, pair in zip(
        encoded.tokens, encoded.offsets, whole.offsets[1:], strict=True
    ):
        body = token.strip() or token
        start = pair[0] + token.index(body)
        assert trimmed == (start, start + len(body)), token


def test_pieces_of_a_character_are_shown_as_bytes(byte_level: Any) -> None:
    encoded = encode_prompt("é", byte_level, len(byte_level))
    assert encoded.tokens == ("<s>", "<0xC3>", "<0xA9>")


def test_tokens_read_the_same_from_text_and_from_ids(byte_level: Any) -> None:
    from_text = encode_prompt("the cat é", byte_level, len(byte_level))
    from_ids = encode_prompt(list(from_text.token_ids), byte_level, len(byte_level))
    assert from_ids.tokens == from_text.tokens
    assert from_ids.special == from_text.special
    assert from_ids.offsets is None
    assert from_ids.text is None


def test_slow_tokenizer_has_no_offsets() -> None:
    encoded = encode_prompt("ab", SlowTokenizer(), 128)
    assert encoded.token_ids == (0, 97, 98)
    assert encoded.tokens == ("<s>", "a", "b")
    assert encoded.special == (True, False, False)
    assert encoded.offsets is None
    assert encoded.text == "ab"


def test_empty_prompts_are_rejected(byte_level: Any, word_level: Any) -> None:
    for prompt in ("", [], (), torch.tensor([], dtype=torch.int64), np.array([], dtype=int), [[]]):
        with pytest.raises(InputError, match="prompt is empty"):
            encode_prompt(prompt, byte_level, len(byte_level))
    with pytest.raises(InputError, match="prompt is empty"):
        encode_prompt("  \n ", word_level, 4)
    # White space is a prompt where the tokenizer has tokens for it.
    assert len(encode_prompt(" ", byte_level, len(byte_level))) == 2


def test_text_without_tokenizer_and_invalid_unicode(byte_level: Any) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        encode_prompt("the", None, 10)
    with pytest.raises(InputError, match="not valid Unicode at character 1"):
        encode_prompt("a\udc80", byte_level, len(byte_level))


# --- chat -----------------------------------------------------------------------------------------


def test_chat_is_rendered_once_with_one_set_of_special_tokens(byte_level: Any) -> None:
    messages = [{"role": "system", "content": "the"}, {"role": "user", "content": "cat sat"}]
    encoded = encode_prompt(messages, byte_level, len(byte_level))
    assert encoded.text == "<|system|>the<end><|user|>cat sat<end><|assistant|>"
    assert "<s>" not in encoded.tokens
    assert encoded.tokens[0] == "<|system|>"
    assert encoded.tokens[-1] == "<|assistant|>"
    assert encoded.offsets is not None
    for token, (start, end), special in zip(
        encoded.tokens, encoded.offsets, encoded.special, strict=True
    ):
        assert encoded.text[start:end] == token
        assert special == token.startswith("<")
    expected = byte_level.apply_chat_template(messages, add_generation_prompt=True)
    assert list(encoded.token_ids) == list(expected["input_ids"])


def test_a_rendered_chat_begins_once(byte_level: Any) -> None:
    encoded = encode_prompt("<s><|user|>the cat", byte_level, len(byte_level))
    plain = encode_prompt("<|user|>the cat", byte_level, len(byte_level))
    assert encoded.token_ids == plain.token_ids
    assert encoded.offsets is not None and encoded.offsets[0] == (0, 3)


def test_chat_errors(byte_level: Any, word_level: Any) -> None:
    message = {"role": "user", "content": "a"}
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt([message], word_level, 4)
    with pytest.raises(InputError, match="no tokenizer"):
        encode_prompt([message], None, 4)
    with pytest.raises(InputError, match="Put it in a list"):
        encode_prompt(message, byte_level, 300)
    with pytest.raises(InputError, match="chat message 1"):
        encode_prompt([message, {"content": "a"}], byte_level, 300)
    with pytest.raises(InputError, match="chat message 1"):
        encode_prompt([message, "text"], byte_level, 300)
    with pytest.raises(InputError, match="no such role here"):
        encode_prompt([{"role": "forbidden", "content": "a"}], byte_level, 300)


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        torch.tensor([[1, 2, 3]]),
        np.array([1, 2, 3], dtype=np.uint16),
        [np.int64(1), torch.tensor(2), 3],
        {"input_ids": [1, 2, 3]},
        {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)},
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_ids_in_their_usual_forms(prompt: Any) -> None:
    if isinstance(prompt, dict) and "attention_mask" in prompt:
        prompt["attention_mask"] = prompt["attention_mask"].long()
    encoded = encode_prompt(prompt, None, 10)
    assert encoded.token_ids == (1, 2, 3)
    assert encoded.tokens == ("#1", "#2", "#3")
    assert encoded.special == (False, False, False)
    assert encoded.offsets is None
    assert all(type(token_id) is int for token_id in encoded.token_ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, True], "True of type bool at position 1"),
        ([1, 2.0], "2.0 of type float at position 1"),
        (torch.tensor([1.0]), "1.0 of type float at position 0"),
        (torch.tensor([True]), "True of type bool"),
        (torch.tensor([1, 2], device="meta"), "a Tensor cannot be read (Cannot copy out of meta"),
        (torch.tensor([1, 2]).to_sparse(), "a Tensor cannot be read"),
        ({"input_ids": torch.tensor([1], device="meta")}, "expected token ids in memory"),
        ([None], "None of type NoneType"),
        ([[1], [2]], "batch of 2"),
        (torch.zeros(3, 4, dtype=torch.int64), "batch of 3"),
        (["a", "b"], "list of texts"),
        (7, "of type int"),
        (None, "of type NoneType"),
        (b"text", "of type bytes"),
        ({"ids": [1]}, "input_ids"),
        ({"input_ids": [1], "position_ids": [4]}, "position_ids"),
        ({"input_ids": [1, 2], "attention_mask": [0, 1]}, "position 0"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "position 1"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "1 entries for 2 tokens"),
        ({"input_ids": [1, 2], "token_type_ids": [0, 1]}, "token_type_ids"),
    ],
)
def test_ids_that_cannot_be_used(prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match="expected") as caught:
        encode_prompt(prompt, None, 10)
    assert message in str(caught.value)


def test_tokenizer_output_is_accepted_and_padding_rejected(word_level: Any) -> None:
    assert encode_prompt(word_level("red ball"), word_level, 4).token_ids == (1, 2)
    one = word_level(["red ball"], return_tensors="pt")
    assert encode_prompt(one, word_level, 4).token_ids == (1, 2)
    padded = word_level(["red"], padding="max_length", max_length=3, return_tensors="pt")
    with pytest.raises(InputError, match="padding"):
        encode_prompt(padded, word_level, 4)
    with pytest.raises(InputError, match="batch of 2"):
        encode_prompt(word_level(["red", "red ball"], padding=True), word_level, 4)


@pytest.mark.parametrize("token_id", [10, -1, 2**40])
def test_ids_outside_the_vocabulary_are_named_with_their_position(token_id: int) -> None:
    with pytest.raises(InputError, match=f"token id {token_id} at position 2 .* 0 to 9"):
        encode_prompt([1, 2, token_id], None, 10)
    with pytest.raises(InputError, match=f"token id {token_id} at position 0 of the target"):
        encode_target(token_id, None, 10)


def test_tokenizer_of_another_model(word_level: Any) -> None:
    with pytest.raises(InputError, match="does not belong to this model"):
        encode_prompt("red ball", word_level, 2)


def test_ids_beyond_the_tokenizer_are_still_shown(word_level: Any) -> None:
    # Models often have more embedding rows than their tokenizer has tokens.
    assert readable_tokens([1, 9], word_level)[1] == "#9"


def test_length_limit() -> None:
    assert len(encode_prompt([1] * 5, None, 10, max_length=5)) == 5
    with pytest.raises(InputError, match=r"has 6 tokens: expected at most 5.*Shorten .* 1 token"):
        encode_prompt([1] * 6, None, 10, max_length=5)
    check_length(4, 2, 5)
    check_length(10**9, 10, None)
    check_length(10**9, 2, 5, window=4)
    with pytest.raises(InputError, match=r"a window has 4 tokens .* Choose a smaller window"):
        check_length(10**9, 3, 5, window=4)
    with pytest.raises(InputError, match=r"the prompt has 4 tokens .* Shorten the input by 1 "):
        check_length(4, 3, 5, window=9)
    with pytest.raises(InputError, match=r"4 tokens and the target 3, which needs 6"):
        check_length(4, 3, 5)


# --- targets --------------------------------------------------------------------------------------


def test_targets_in_their_usual_forms(byte_level: Any) -> None:
    size = len(byte_level)
    assert encode_target(None, byte_level, size) is None
    bare = tuple(byte_level(" cat", add_special_tokens=False)["input_ids"])
    assert encode_target(" cat", byte_level, size) == bare
    assert byte_level.bos_token_id not in bare
    for one in (7, np.int32(7), torch.tensor(7), [7], torch.tensor([7])):
        assert encode_target(one, None, size) == (7,)
    assert encode_target([7, 8], None, size) == (7, 8)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "no tokens"),
        ([], "no tokens"),
        (True, "bool"),
        (1.5, "float"),
        ([1, False], "position 1"),
        (["a"], "list of texts"),
        ([[1], [2]], "batch of 2"),
        (object(), "type object"),
    ],
)
def test_targets_that_cannot_be_used(byte_level: Any, target: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_target(target, byte_level, len(byte_level))


def test_target_text_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="target is text but there is no tokenizer"):
        encode_target("a", None, 10)


# --- targets of tokenizers that begin every text with a word boundary -----------------------------


def boundary_tokenizer(scheme: str, *, prepend: bool) -> Any:
    """Words with their boundary, as SentencePiece writes it.

    prepend: put a boundary in front of the text whatever it begins with, as Llama 2 does; else
    Metaspace with its own scheme.
    """
    vocabulary = {"<unk>": 0, "▁": 1, "▁mom": 2, "mom": 3, "▁dad": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if prepend:
        tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_target_has_one_word_boundary_with_and_without_a_space() -> None:
    tokenizer = boundary_tokenizer("never", prepend=True)
    # The test is about something: by itself the tokenizer makes two tokens of it.
    assert tokenizer(" mom")["input_ids"] == [1, 2]
    assert encode_target(" mom", tokenizer, 5) == encode_target("mom", tokenizer, 5) == (2,)
    assert encode_target(" mom dad", tokenizer, 5) == (2, 4)
    # Two spaces are one boundary and a space; one by itself is not two.
    assert encode_target("  mom", tokenizer, 5) == (1, 2)
    assert encode_target(" ", tokenizer, 5) == (1,)
    # Prompts are left as the model was trained to read them.
    assert encode_prompt(" mom", tokenizer, 5).token_ids == (1, 2)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_targets_keep_what_the_scheme_makes(scheme: str) -> None:
    tokenizer = boundary_tokenizer(scheme, prepend=False)
    assert encode_target(" mom", tokenizer, 5) == (2,)
    assert encode_target("mom", tokenizer, 5) == ((3,) if scheme == "never" else (2,))


def test_a_space_that_is_its_own_token_is_kept() -> None:
    # "never" with a word that has no piece with a boundary: the lone boundary is the text's space.
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "b": 3}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert encode_target(" ab", fast, 4) == (1, 2, 3)


def test_byte_level_targets_keep_their_space(byte_level: Any) -> None:
    size = len(byte_level)
    assert readable_tokens(encode_target(" cat", byte_level, size) or (), byte_level) == (" cat",)
    assert encode_target(" cat", byte_level, size) != encode_target("cat", byte_level, size)


def test_story_model_targets(local_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(local_model("stories3M"), local_files_only=True)
    assert len(encode_target("mom", tokenizer, 4096) or ()) == 1
    assert encode_target(" mom", tokenizer, 4096) == encode_target("mom", tokenizer, 4096)
    assert encode_target(" 你", tokenizer, 4096) == encode_target("你", tokenizer, 4096)


@pytest.mark.parametrize(
    "text", [".", ",", "!", "\n", "'s", '"', " (", " ", ". She loved", "\n\nA"]
)
def test_punctuation_follows_without_a_space(text: str, local_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(local_model("stories3M"), local_files_only=True)
    told = readable_tokens(encode_target(text, tokenizer, 4096) or (), tokenizer)
    assert "".join(told) == text
    prompt = "Once upon a time there was a girl"
    whole = tokenizer(prompt + text)["input_ids"]
    assert encode_target(text, tokenizer, 4096) == tuple(
        whole[len(tokenizer(prompt)["input_ids"]) :]
    )


# --- a sentencepiece-style tokenizer --------------------------------------------------------------


def test_sentencepiece_style_tokens(local_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(local_model("stories3M"), local_files_only=True)
    encoded = encode_prompt("Once upon\n 你<s>", tokenizer, 4096, 512)
    assert encoded.tokens[:3] == ("<s>", " Once", " upon")
    assert encoded.tokens[-1] == "<s>"
    assert encoded.special[0] and encoded.special[-1] and not any(encoded.special[1:-1])
    assert "\n" in encoded.tokens
    assert encoded.tokens[-4:-1] == ("<0xE4>", "<0xBD>", "<0xA0>")
    assert encoded.offsets is not None
    assert encoded.offsets[-4:-1] == ((11, 12),) * 3

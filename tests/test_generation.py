"""Chat messages, generated responses, parts of responses, and responses in chunks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

import heat_fast
from assertions import assert_close
from families import build, prompt_ids
from heat_fast import Attributor, HeatConfig
from heat_fast.errors import ConfigError, InputError
from heat_fast.prompt import EncodedPrompt, encode_prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chat(model_folder: str) -> Any:
    """A byte-level tokenizer with a chat template and its special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


# --- roles ----------------------------------------------------------------------------------------


def test_every_token_has_the_role_of_its_message(chat: Any) -> None:
    # Contents that look like the template, and one that it strips.
    messages = [
        {"role": "system", "content": "user"},
        {"role": "user", "content": "  assistant\nuser "},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": "ok"},
    ]
    encoded = encode_prompt(messages, chat, len(chat))
    assert encoded.roles is not None
    spoken = said(encoded)
    assert spoken["system"] == "user"
    assert spoken["user"] == "assistant\nuserok"
    assert spoken["assistant"] == "user"
    assert spoken[None].count("<|im_start|>") == 5
    assert all(role is None for role, s in zip(encoded.roles, encoded.special, strict=True) if s)


def said(encoded: Any) -> dict[Any, str]:
    """What each role says, all of its messages together."""
    spoken: dict[Any, str] = {}
    for token, role in zip(encoded.tokens, encoded.roles, strict=True):
        spoken[role] = spoken.get(role, "") + token
    return spoken


def test_a_rewritten_message_is_what_stands_in_its_place(chat: Any) -> None:
    """As templates of reasoning models leave out what an earlier turn thought."""
    chat.chat_template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>hmm</think> two"},
        {"role": "user", "content": "three"},
    ]
    encoded = encode_prompt(messages, chat, len(chat))
    assert "hmm" not in encoded.text
    assert said(encoded) | {None: ""} == {"user": "onethree", "assistant": "two", None: ""}


def test_a_template_may_put_a_message_elsewhere_or_leave_it_out(chat: Any) -> None:
    """As Mistral's does, whose system message is in the last of the user's."""
    chat.chat_template = (
        "{% set system = messages[0]['content'] %}{% for m in messages[1:] if m.role != 'tool' %}"
        "{{ '[INST] ' if m.role == 'user' }}{{ system ~ '\\n\\n' if loop.last }}{{ m['content'] }}"
        "{{ ' [/INST]' if m.role == 'user' else '</s>' }}{% endfor %}"
    )
    messages = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "one"},
        {"role": "tool", "content": "secret"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    encoded = encode_prompt(messages, chat, len(chat))
    assert encoded.text == "[INST] one [/INST]two</s>[INST] brief\n\nthree [/INST]"
    spoken = said(encoded)
    del spoken[None]
    assert {role: text.strip() for role, text in spoken.items()} == {
        "system": "brief",
        "user": "onethree",
        "assistant": "two",
    }


def test_a_template_that_cannot_be_taken_apart_is_told_of(chat: Any) -> None:
    chat.chat_template = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}Go"
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    with pytest.warns(UserWarning, match="rewrites the messages.*roles are None"):
        assert encode_prompt(messages, chat, len(chat)).roles is None
    assert encode_prompt("hi", chat, len(chat)).roles is None


def test_the_text_parts_of_a_content_are_its_message(chat: Any) -> None:
    chat.chat_template = CHATML.replace(
        "m['content']", "(m['content'] | map(attribute='text') | join(' and '))"
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    encoded = encode_prompt([{"role": "user", "content": parts}], chat, len(chat))
    assert said(encoded)["user"] == "onetwo"
    chat.chat_template = CHATML.replace("m['content']", "(m['content'] | join(' and '))")
    encoded = encode_prompt([{"role": "user", "content": ["one", "two"]}], chat, len(chat))
    assert said(encoded)["user"] == "onetwo"


def test_the_template_is_told_what_it_takes(chat: Any) -> None:
    chat.chat_template = "{{ 'Think. ' if thinking }}" + CHATML
    messages = [{"role": "user", "content": "one"}]
    prompt = {"messages": messages, "chat_template_kwargs": {"thinking": True}}
    encoded = encode_prompt(prompt, chat, len(chat))
    assert encoded.text == "Think. " + encode_prompt(messages, chat, len(chat)).text
    assert said(encoded)["user"] == "one"
    silent = {**prompt, "chat_template_kwargs": {"add_generation_prompt": False}}
    assert encode_prompt(silent, chat, len(chat)).text.endswith("<|im_end|>\n")
    for wrong, match in (
        ({"messages": messages, "tools": []}, "conversation has 'tools'"),
        ({"messages": messages, "chat_template_kwargs": {"tokenize": True}}, "'tokenize'"),
        ({"messages": messages, "chat_template_kwargs": [1]}, "expected a mapping"),
        ({"messages": []}, "at least one message"),
    ):
        with pytest.raises(InputError, match=match):
            encode_prompt(wrong, chat, len(chat))


def test_an_answer_that_has_begun_goes_on(chat: Any) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "I say"}]
    encoded = encode_prompt(messages, chat, len(chat))
    assert encoded.text.endswith("assistant\nI say")
    assert said(encoded)["assistant"] == "I say"
    begins = encode_prompt([*messages[:1], {**messages[1], "tool_calls": []}], chat, len(chat))
    assert begins.text == encoded.text
    calls = [*messages[:1], {**messages[1], "tool_calls": [{"function": {"name": "f"}}]}]
    blank = [*messages[:1], {**messages[1], "content": " "}]
    for each in (calls, blank):
        assert encode_prompt(each, chat, len(chat)).text.endswith("<|im_start|>assistant\n")
    chat.chat_template = CHATML.replace("| trim", "| upper")
    with pytest.raises(InputError, match="'add_generation_prompt': True} to begin another"):
        encode_prompt(messages, chat, len(chat))
    chat.chat_template = None
    own = {"messages": messages[:1], "chat_template_kwargs": {"chat_template": CHATML}}
    assert encode_prompt(own, chat, len(chat)).text.startswith("<|im_start|>user\none")


def test_special_and_template_tokens_can_be_left_out_of_the_ranking(chat: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    messages = [{"role": "user", "content": "hello"}]
    result = heat_fast.attribute(LlamaForCausalLM(config), chat, messages, variant="gs")
    assert sum(result.template) == len(result) - len("hello")
    shown = result.top(len(result), special=False)
    assert "".join(row.token for row in sorted(shown, key=lambda row: row.index)) == "hello"
    assert [row.score for row in shown] == sorted((row.score for row in shown), reverse=True)
    assert len(result.top(len(result))) == len(result)
    assert result.by_segment({"all": "hello"})["all"].score == pytest.approx(
        sum(row.score for row in shown)
    )


# --- a part of a response, and chunks -------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"probes": 1},
        {"estimator": "coded", "probes": 1, "codes": 3},
        {"curvature": "gauss_newton", "probes": 2},
        {"variant": "lr", "rank": 3},
        {"variant": "win", "window": 9, "tail": 2, "probes": 1},
        {"variant": "gs", "rollout": "input_path", "layers": 2},
    ],
    ids=str,
)
def test_a_part_or_chunks_of_a_response_give_the_rows_of_the_whole(
    settings: dict[str, Any],
) -> None:
    model = build("llama", dtype=torch.float64)
    prompt, response = prompt_ids("llama", 13), prompt_ids("llama", 5, seed=1)
    attributor = Attributor(
        model, None, HeatConfig.preset(settings.pop("variant", "full"), **settings)
    )
    whole = attributor.attribute(prompt, response)
    part = attributor.attribute(prompt, response, target_span=(2, 4))
    chunked = Attributor(model, None, attributor.config.replace(response_chunk=2))
    pieces = chunked.attribute(prompt, response)
    assert part.target_ids == tuple(response[2:4])
    assert pieces.target_ids == whole.target_ids == tuple(response)
    for name in whole.array_names():
        expected = getattr(whole, name).double()
        # Results are rounded to float32; the float64 runs before differ by far less.
        tolerance = {"rtol": 1e-6, "atol": 1e-9 * float(expected.abs().max())}
        assert_close(name, expected, getattr(pieces, name).double(), **tolerance)
        assert_close(name, expected[2:4], getattr(part, name).double(), **tolerance)
    assert part.metadata["response"]["token_ids"] == tuple(response)
    assert part.metadata["response"]["span"] == (2, 4)
    assert "response" not in whole.metadata


def test_a_part_of_a_response_by_its_text(demo: Any) -> None:
    prompt, response = demo.examples[0].prompt, " Fenston is it."
    result = heat_fast.attribute(
        demo.model, demo.tokenizer, prompt, response, "gs", target_span="is it"
    )
    assert "".join(result.target_tokens) == " is it"


@pytest.mark.parametrize("settings", [{}, {"window": 8, "sink": 1, "tail": 2, "overlap": 0.3}])
def test_the_response_before_a_part_of_it_can_be_scored(settings: dict[str, Any]) -> None:
    """As if it were the prompt's end, whose scores are the same."""
    model = build("llama", dtype=torch.float64)
    prompt, response = prompt_ids("llama", 13), prompt_ids("llama", 5, seed=1)
    attributor = Attributor(model, None, HeatConfig(probes=2, **settings))
    found = attributor.attribute(prompt, response, target_span=(2, 4), score_response=True)
    same = attributor.attribute([*prompt, *response[:2]], response[2:4])
    assert found.token_ids == (*prompt, *response[:2]) and found.lead_ids == ()
    for name in same.array_names():
        assert torch.equal(getattr(found, name), getattr(same, name)), name
    assert found.segments == {"prompt": (0, 13), "response": (13, 15)}
    if not settings:
        plain = attributor.attribute(prompt, response, target_span=(2, 4))
        for name in plain.array_names():
            expected = getattr(plain, name)
            actual = getattr(found, name)[..., : expected.shape[-1]]
            assert_close(name, expected, actual, rtol=1e-5)


def test_a_scored_response_is_a_part_of_a_text(demo: Any, tmp_path: Path) -> None:
    prompt, response = demo.examples[0].prompt, " Fenston is it."
    named = {"fact": "The mountain of Mirmora is Fenston."}
    result = heat_fast.attribute(
        demo.model,
        demo.tokenizer,
        prompt,
        response,
        "gs",
        target_span="it",
        score_response=True,
        segments=named,
    )
    assert result.metadata["scored_response"] == 2
    result.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ">Prompt, and 2 tokens of the response after it</h2>" in page
    said = result.by_segment()["response"]
    assert set(result.segments) == {"fact", "response"} and said.text == " Fenston is"
    assert (said.start, said.stop) == (len(result) - 2, len(result))
    assert 0 < said.share < 1


def test_a_scored_response_of_a_chat_is_the_assistants(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(demo.tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": demo.examples[0].prompt}]
    settings: dict[str, Any] = {"variant": "gs", "target_span": (2, 3), "score_response": True}
    result = heat_fast.attribute(demo.model, demo.tokenizer, chat, " Fenston is it.", **settings)
    assert result.roles is not None and result.roles[-3:] == (None, "assistant", "assistant")
    assert "assistant" in {span.name for span in result.by_role()}


def test_bytes_of_a_character_before_a_scored_part_are_characters() -> None:
    """One each, in the text as in the offsets."""
    tokens = ("ok", " ", "<0xF0>", "<0x9F>", " then")
    encoded = EncodedPrompt((1,), ("Was?",), ((0, 4),), "Was?", (False,))
    with mock.patch("heat_fast.prompt.readable_tokens", lambda *_: tokens):
        whole = encoded.followed_by([2, 3, 4, 5, 6], None)
    assert whole.text == "Was?ok \ufffd\ufffd then" and whole.offsets is not None
    assert whole.text[slice(*whole.offsets[-1])] == " then"


def test_a_response_that_cannot_be_scored() -> None:
    model = build("llama")
    for settings in ({}, {"target": [3, 4]}, {"target": [3, 4], "target_span": (0, 1)}):
        with pytest.raises(InputError, match="a target_span that begins later"):
            heat_fast.attribute(model, None, [1, 2], score_response=True, **settings)
    named = {"segments": {"response": (0, 1)}, "target_span": (1, 2)}
    with pytest.raises(InputError, match="a segment 'response' beside score_response=True"):
        heat_fast.attribute(model, None, [1, 2], [3, 4], score_response=True, **named)
    wrong: dict[str, Any] = {"score_response": 1}
    with pytest.raises(InputError, match="score_response=1: expected True or False"):
        heat_fast.attribute(model, None, [1, 2], [3, 4], **wrong)


def test_chunks_are_estimated_as_they_are_run() -> None:
    model = build("llama")
    config = HeatConfig(probes=1, response_chunk=2)
    prompt, response = prompt_ids("llama", 9), prompt_ids("llama", 5, seed=1)
    told = heat_fast.estimate(model, 9, 5, config, calibrate=False)
    counts = Attributor(model, None, config).attribute(prompt, response).metadata["counts"]
    assert (told.hvp, told.branches) == (counts["hvp"], counts["branches"])
    once = heat_fast.estimate(model, 9, 5, config.replace(response_chunk=None), calibrate=False)
    assert told.branches == 3 * once.branches
    assert told.total_flops > once.total_flops


def test_wrong_parts_and_chunks() -> None:
    model = build("llama")
    with pytest.raises(InputError, match=r"target_span=\(0, 1\) without a target"):
        heat_fast.attribute(model, None, [1, 2], target_span=(0, 1))
    with pytest.raises(InputError, match="no range of the 2 target tokens"):
        heat_fast.attribute(model, None, [1, 2], [3, 4], target_span=(1, 3))
    with pytest.raises(ConfigError, match=r"response_chunk=2 with coverage=0\.9"):
        HeatConfig(response_chunk=2, coverage=0.9)


# --- generation -----------------------------------------------------------------------------------


def test_what_the_model_generates_is_explained(demo: Any) -> None:
    prompt = demo.examples[0].prompt
    result = heat_fast.generate_and_attribute(
        demo.model, demo.tokenizer, prompt, max_new_tokens=3, variant="gs"
    )
    assert result.target_tokens[0] == " Fenston"
    direct = heat_fast.attribute(demo.model, demo.tokenizer, prompt, list(result.target_ids), "gs")
    assert torch.equal(result.target_scores, direct.target_scores)
    assert result.metadata["generation"] == {"max_new_tokens": 3, "seed": 0}


def test_a_generation_config_may_ask_for_a_record(demo: Any) -> None:
    prompt, config = demo.examples[0].prompt, demo.model.generation_config
    config.return_dict_in_generate = True
    try:
        result = heat_fast.generate_and_attribute(
            demo.model, demo.tokenizer, prompt, max_new_tokens=1, variant="gs"
        )
    finally:
        config.return_dict_in_generate = False
    assert result.target_tokens == (" Fenston",)


def test_parts_of_the_prompt_are_found_before_a_response_is_made(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = demo.examples[0].prompt
    result = heat_fast.generate_and_attribute(
        demo.model, demo.tokenizer, prompt, max_new_tokens=1, variant="gs", segments={"a": "Answer"}
    )
    assert result.by_segment()["a"].text.strip() == "Answer"
    monkeypatch.setattr(demo.model, "generate", lambda *_, **__: pytest.fail("it was generated"))
    with pytest.raises(InputError, match="segment 'a': 'nowhere' does not occur"):
        heat_fast.generate_and_attribute(
            demo.model, demo.tokenizer, prompt, segments={"a": "nowhere"}
        )


def test_model_and_random_state_are_left_as_found() -> None:
    model = build("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    settings = model.generation_config.to_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()

    def sampled(seed: int) -> tuple[int, ...]:
        return heat_fast.generate_and_attribute(
            model,
            None,
            [5, 6, 7],
            max_new_tokens=6,
            generation={"do_sample": True, "temperature": 2.0},
            variant="gs",
            seed=seed,
        ).target_ids

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(2, 6)}) > 1
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_end_of_a_response_is_no_part_of_it() -> None:
    model = build("llama")
    first = heat_fast.generate_and_attribute(model, None, [5, 6, 7], max_new_tokens=4, variant="gs")
    assert len(first.target_ids) == 4
    end = first.target_ids[-1]
    keep = first.target_ids.index(end)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    again = heat_fast.generate_and_attribute(model, None, [5, 6, 7], max_new_tokens=4, variant="gs")
    assert again.target_ids == (first.target_ids[:keep] or (end,))


def test_whole_numbers_of_numpy_are_taken() -> None:
    model, prompt = build("llama"), [5, 6, 7]
    model.generation_config.eos_token_id = None
    found = heat_fast.generate_and_attribute(
        model,
        None,
        prompt,
        max_new_tokens=numpy.int64(3),
        generation={"num_beams": numpy.int64(2), "length_penalty": numpy.float32(0.5)},
        target_span=(numpy.int64(0), numpy.int64(2)),
        variant="gs",
    )
    assert len(found.target_ids) == 2
    told = found.metadata["generation"]
    assert told == {"max_new_tokens": 3, "seed": 0, "num_beams": 2, "length_penalty": 0.5}
    assert {type(value) for value in told.values()} == {int, float}
    for wrong in (numpy.int64(0), numpy.float64(1), True):
        with pytest.raises(InputError, match="expected a whole number of at least 1"):
            heat_fast.generate_and_attribute(
                model, None, prompt, max_new_tokens=wrong, variant="gs"
            )


@pytest.mark.parametrize(
    ("name", "length", "new", "message"),
    [
        # Learned positions end; rotary ones go on, but the attribution would refuse the response.
        (
            "gpt2",
            60,
            10,
            "needs 69 positions (the last new token is not read): expected at most 64",
        ),
        ("gpt2", 60, 10, "Pass max_new_tokens=5 or less"),
        ("opt", 64, 2, "Pass max_new_tokens=1 or less"),
        ("llama", 250, 20, "Pass max_new_tokens=7 or less"),
        ("gpt2", 100, 1, "the prompt has 100 tokens: expected at most 64"),
        ("gpt2", 100, 1, "Shorten the prompt by 36 tokens"),
        ("llama", 300, 1, "the prompt has 300 tokens: expected at most 256"),
    ],
)
@pytest.mark.parametrize("windows", [{}, {"window": 32, "tail": 8}], ids=["whole", "windows"])
def test_what_does_not_fit_is_not_generated(
    windows: dict[str, int],
    name: str,
    length: int,
    new: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    model: Any = build(name)
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("it was generated"))
    with pytest.raises(InputError, match=re.escape(message)):
        heat_fast.generate_and_attribute(
            model, None, prompt_ids(name, length), max_new_tokens=new, variant="gs", **windows
        )


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama_bias"])
def test_what_just_fits_is_generated(name: str) -> None:
    model, prompt = build(name), prompt_ids(name, 60)
    model.generation_config.eos_token_id = None
    found = heat_fast.generate_and_attribute(
        model, None, prompt, max_new_tokens=5, variant="gs", layers=1, coverage=0.5
    )
    assert len(found.target_ids) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 0}, InputError, "max_new_tokens=0: expected a whole number"),
        ({"generation": 3}, InputError, "generation is int: expected a mapping"),
        ({"generation": {"num_return_sequences": 2}}, InputError, "holds 'num_return_sequences'"),
        ({"generation": {"no_such": 2}}, InputError, "the model cannot generate with"),
        ({"temperature": 0.5}, ConfigError, "go into generation={...}"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    import re

    with pytest.raises(error, match=re.escape(message)):
        heat_fast.generate_and_attribute(build("llama"), None, [5, 6], variant="gs", **arguments)

"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    T5Config,
    ViTConfig,
)
from typer.testing import CliRunner

import heat_fast
from heat_fast.cli import app
from heat_fast.errors import InputError, NumericalError, OutputError, UnsupportedModelError

PROMPT = "the red ball"
Run = Callable[..., Any]


@pytest.fixture
def run(model_folder: str) -> Run:
    """``run(*options)`` is `heat-fast attribute` on the tiny model, in this process."""

    def call(*options: str, model: str | None = model_folder, **keywords: Any) -> Any:
        chosen = [] if model is None else ["--model", model]
        return CliRunner().invoke(app, ["attribute", *chosen, *options], **keywords)

    return call


class Recorder:
    """Stands in for the engine where only what the command line hands over is of interest."""

    calls: list[dict[str, Any]]

    def __init__(self, outcome: Any = None) -> None:
        self.calls = []
        self.outcome = outcome

    def __call__(self, model: Any, tokenizer: Any, config: Any) -> Any:
        self.calls.append({"model": model, "tokenizer": tokenizer, "config": config})
        return self

    def attribute(self, prompt: Any, target: Any, **told: Any) -> Any:
        self.calls[-1] |= {
            "prompt": prompt,
            "target": target,
            **told,
        }
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Recorder]:
    def install(outcome: Any) -> Recorder:
        module: Any = ModuleType("heat_fast.attributor")
        module.Attributor = Recorder(outcome)
        monkeypatch.setitem(sys.modules, "heat_fast.attributor", module)
        recorder: Recorder = module.Attributor
        return recorder

    return install


def failed(outcome: Any, code: int, *words: str) -> None:
    """The outcome is one line on standard error with these words, and this exit code."""
    assert outcome.exit_code == code, outcome.output
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("heat-fast: error: ")
    assert "Traceback" not in outcome.stderr
    for word in words:
        assert word in outcome.stderr


# --- it works -------------------------------------------------------------------------------------


def test_prints_a_report(run: Run) -> None:
    outcome = run("--prompt", PROMPT, "--target", "s!", "--top", "3", "--probes", "2")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr == ""
    assert "\x1b" not in outcome.stdout
    for rank in (1, 2, 3):
        assert f"[{rank}|" in outcome.stdout
    assert "[4|" not in outcome.stdout
    for words in ("curvature", "information", "Targets s (", "LlamaForCausalLM | variant full"):
        assert words in outcome.stdout


def test_json_on_standard_output_is_all_there_is(run: Run) -> None:
    outcome = run("--prompt", PROMPT, "--json", "-", "--probes", "2")
    assert outcome.exit_code == 0, outcome.output
    data = json.loads(outcome.stdout)
    assert "".join(data["tokens"]) == PROMPT
    assert len(data["scores"]) == len(PROMPT)
    assert data["metadata"]["config"]["probes"] == 2


def test_writes_both_files_with_the_same_result(run: Run, tmp_path: Path) -> None:
    table, file = tmp_path / "r.json", tmp_path / "r.safetensors"
    outcome = run(
        "--prompt", PROMPT, "--json", str(table), "--save", str(file), "--probes", "1", "--quiet"
    )
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output == ""
    assert heat_fast.load(file).to_dict() == json.loads(table.read_text())


def test_matches_the_library_call(run: Run, model_folder: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "r"
    outcome = run(
        "--prompt", PROMPT, "--save", str(file), "--probes", "3", "--seed", "5", "--device", "cpu"
    )
    assert outcome.exit_code == 0, outcome.output
    assert f"saved {file}" in outcome.stderr
    direct = heat_fast.attribute(
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
        PROMPT,
        probes=3,
        seed=5,
    )
    # The same program on the same inputs: equal to the last bit.
    assert torch.equal(heat_fast.load(file).scores, direct.scores)


def test_options_reach_the_engine(run: Run, engine: Callable[[Any], Recorder]) -> None:
    recorder = engine(NumericalError("stop here"))
    options = {
        "--variant": "gs",
        "--curvature": "hessian",
        "--estimator": "coded",
        "--codes": "auto",
        "--normalize": "sum",
        "--layers": "7",
        "--window": "300",
        "--overlap": "0.25",
        "--sink": "2",
        "--tail": "9",
        "--window-weights": "uniform",
        "--probes": "3",
        "--seed": "4",
        "--beta": "0.1",
        "--gamma": "0.2",
        "--alpha": "0.3",
        "--rollout": "input_path",
        "--masking": "sentinel",
        "--sentinel-token": "9",
        "--aggregate": "max",
        "--coverage": "0.9",
        "--branch-tolerance": "0.02",
        "--device": "cpu",
        "--dtype": "float64",
        "--target": " blue",
        "--prompt": PROMPT,
    }
    run(*[part for pair in options.items() for part in pair])
    call = recorder.calls[0]
    assert call["config"] == heat_fast.HeatConfig.preset(
        "gs",
        curvature="hessian",
        estimator="coded",
        codes="auto",
        normalize="sum",
        layers=7,
        window=300,
        overlap=0.25,
        sink=2,
        tail=9,
        window_weights="uniform",
        probes=3,
        seed=4,
        beta=0.1,
        gamma=0.2,
        alpha=0.3,
        rollout="input_path",
        masking="sentinel",
        sentinel_token=9,
        aggregate="max",
        coverage=0.9,
        branch_tolerance=0.02,
    )
    assert (call["prompt"], call["target"]) == (PROMPT, " blue")
    assert call["progress"] is True
    assert call["model"].dtype == torch.float64
    assert not call["model"].training


def test_counts_may_be_automatic_and_normalize_may_be_none(
    run: Run, engine: Callable[[Any], Recorder]
) -> None:
    recorder = engine(NumericalError("stop here"))
    run("--prompt", "a", "--probes", "auto", "--normalize", "none")
    run("--prompt", "a", "--codes", "16", "--estimator", "coded")
    low_rank = ["--rank", "9", "--rank-scope", "token", "--passes", "2", "--sketch", "1.5"]
    run("--prompt", "a", "--variant", "lr", *low_rank)
    first, second, third = (call["config"] for call in recorder.calls)
    assert third == heat_fast.HeatConfig(
        variant="lr", rank=9, rank_scope="token", passes=2, sketch=1.5
    )
    assert first == heat_fast.HeatConfig(probes="auto", normalize=None)
    assert second == heat_fast.HeatConfig(estimator="coded", codes=16)


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"a b\n", "a b"),
        (b"a b\r\n", "a b"),
        (b"a b\n\n", "a b\n"),
        ("é".encode(), "é"),
        (b"\xef\xbb\xbfa", "a"),
    ],
)
def test_prompt_from_file_and_standard_input(
    run: Run, engine: Callable[[Any], Recorder], tmp_path: Path, data: bytes, prompt: str
) -> None:
    recorder = engine(NumericalError("stop here"))
    (tmp_path / "prompt").write_bytes(data)
    run("--prompt-file", str(tmp_path / "prompt"))
    run("--prompt-file", "-", input=data)
    assert [call["prompt"] for call in recorder.calls] == [prompt, prompt]


def test_messages_of_a_chat(run: Run, engine: Callable[[Any], Recorder], tmp_path: Path) -> None:
    recorder = engine(NumericalError("stop here"))
    messages = [{"role": "user", "content": "Why é?"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    run("--messages", str(tmp_path / "chat.json"))
    run("--messages", "-", input=json.dumps(messages).encode())
    conversation = {"messages": messages, "chat_template_kwargs": {"thinking": False}}
    run("--messages", "-", input=json.dumps(conversation).encode())
    assert [call["prompt"] for call in recorder.calls] == [messages, messages, conversation]
    for wrong in (b"{}", b"[]", b'["a"]', b'[{"role": "user"}]', b'[{"role": 1, "content": "a"}]'):
        failed(run("--messages", "-", input=wrong), 2, "standard input holds no conversation")
    failed(run("--messages", "-", input=b"Hello"), 2, "standard input is not JSON", "line 1")


def test_parts_of_the_prompt_get_names(run: Run, tmp_path: Path) -> None:
    told = run("--prompt", "the red ball", "--segment", "colour=red", "--segment", "rest=7:12")
    assert told.exit_code == 0, told.output
    assert re.search(r"Score by segment: (colour|rest|elsewhere) \d+%, ", told.stdout)
    (tmp_path / "part.txt").write_text("red ball\n")
    told = run("--prompt", "the red ball", "--segment", f"part=@{tmp_path}/part.txt", "--json", "-")
    assert json.loads(told.stdout)["metadata"]["segments"] == {"part": [4, 12]}
    for wrong, words in (
        ("colour=@none.txt", "cannot read 'none.txt'"),
        ("colour", "--segment colour: expected NAME=TEXT"),
        ("=red", "--segment =red: expected NAME=TEXT"),
        ("colour=blue", "segment 'colour': 'blue' does not occur in the prompt"),
        ("colour=7:99", "segment 'colour': (7, 99) is no range of the 12 characters"),
    ):
        failed(run("--prompt", "the red ball", "--segment", wrong), 2, words)
    twice = ["--segment", "a=the", "--segment", "a=red"]
    failed(run("--prompt", "the red ball", *twice), 2, "--segment a=... is given twice")


def test_without_a_model_the_embedded_one_explains_its_example(demo: Any, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    outcome = CliRunner().invoke(app, ["attribute", "--probes", "1", "--json", str(file)])
    assert outcome.exit_code == 0, outcome.output
    data = json.loads(file.read_text())
    assert data["prompt_text"] == demo.examples[0].prompt
    assert data["target_tokens"] == [demo.examples[0].answer]


def test_a_real_story_model(run: Run, local_model: Callable[[str], Path]) -> None:
    outcome = run(
        *("--prompt", "Once upon a time there was a", "--probes", "1", "--json", "-"),
        model=str(local_model("stories3M")),
    )
    assert outcome.exit_code == 0, outcome.output
    data = json.loads(outcome.stdout)
    assert data["tokens"][:2] == ["<s>", " Once"]
    assert data["special"][:2] == [True, False]


# --- wrong requests: exit code 2, before anything is loaded ---------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "a", "--prompt-file", "b"], ["both --prompt and --prompt-file"]),
        (["--prompt", "a", "--messages", "b"], ["both --messages and a prompt"]),
        (["--messages", "no-such-file"], ["no-such-file", "No such file"]),
        (["--prompt", ""], ["prompt is empty"]),
        ([], ["--model without a prompt"]),
        (["--prompt", "a", "--target", ""], ["--target is empty"]),
        (["--prompt", "a", "--variant", "ful"], ["unknown variant", "Did you mean 'full'"]),
        (["--prompt", "a", "--variant", "ful"], ["--variant: unknown"]),
        (["--prompt", "a", "--beta", "-1"], ["error: --beta -1.0 is", "at least 0"]),
        (["--prompt", "a", "--beta", "nan"], ["error: --beta nan is"]),
        (
            ["--prompt", "a", "--beta", "0", "--gamma", "0"],
            ["--beta, --gamma and --alpha are all 0", "(--beta 0.5, --gamma 0.5 are"],
        ),
        (["--prompt", "a", "--probes", "0"], ["error: --probes 0 is", "or 'auto'"]),
        (["--prompt", "a", "--probes", "few"], ["--probes few", "or auto"]),
        (["--prompt", "a", "--codes", "2.5"], ["--codes 2.5", "or auto"]),
        (["--prompt", "a", "--codes", "1", "--estimator", "coded"], ["--estimator coded with"]),
        (
            ["--prompt", "a", "--masking", "sentinel"],
            ["--masking sentinel needs --sentinel-token,", "Pass --sentinel-token <id>, or --mask"],
        ),
        (["--prompt", "a", "--sentinel-token", "3"], ["--sentinel-token 3 has no effect"]),
        (["--prompt", "a", "--rollout", "value"], ["error: --rollout value is", "'value_path'"]),
        (["--prompt", "a", "--normalize", "mean"], ["error: --normalize mean is", "or None"]),
        (
            ["--prompt", "a", "--variant", "gs", "--estimator", "row"],
            ["--estimator row has no effect with --curvature grad_squared"],
        ),
        (
            ["--prompt", "a", "--rank-scope", "token"],
            ["--rank-scope token has no effect with --estimator block", "leave --rank-scope out"],
        ),
        (["--prompt", "a", "--dtype", "int8"], ["--dtype int8", "bfloat16"]),
        (["--prompt", "a", "--device", "toaster"], ["--device toaster"]),
        (["--prompt", "a", "--device", "meta"], ["--device meta"]),
        (["--prompt", "a", "--save", "-"], ["--save -"]),
        (["--prompt", "a", "--save", "/"], ["is a directory"]),
        (["--prompt", "a", "--json", "no-such-folder/r"], ["does not exist"]),
        (["--prompt", "a", "--json", "r", "--save", "./r"], ["different files"]),
        (["--prompt-file", "no-such-file"], ["no-such-file", "No such file"]),
        (["--prompt-file", "/"], ["cannot read '/'"]),
    ],
)
def test_usage_errors(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # A model that does not exist shows that none of these got as far as loading it.
    failed(run(*options, model="./no-such-model"), 2, *words)
    assert os.listdir(tmp_path) == []


def test_prompt_files_must_hold_text(run: Run) -> None:
    failed(run("--prompt-file", "-", input=b"ab\xff"), 2, "standard input is not UTF-8", "byte 2")
    failed(run("--prompt-file", "-", input=b"\n"), 2, "prompt is empty")


def test_option_errors_of_the_parser(run: Run) -> None:
    for options in (["--frobnicate"], ["--top", "0"], ["--probes", "many"], ["stray"]):
        outcome = run("--prompt", "a", *options)
        assert outcome.exit_code == 2
        assert "Traceback" not in outcome.output


def test_a_prompt_the_model_cannot_read_is_a_usage_error(run: Run) -> None:
    failed(run("--prompt", "x" * 33), 2, "33 tokens", "32")


def test_a_sentinel_outside_the_vocabulary_names_the_option(run: Run) -> None:
    options = ("--masking", "sentinel", "--sentinel-token", "256")
    failed(run("--prompt", "a", *options), 2, "error: --sentinel-token 256 is", "0 to 255")


def test_quoted_prompts_stay_as_they_are(run: Run, engine: Callable[[Any], Recorder]) -> None:
    engine(InputError("the target 'beta=1' has no tokens"))
    failed(run("--prompt", "a"), 2, "the target 'beta=1' has no tokens")


# --- failures: exit code 1 ------------------------------------------------------------------------


def test_models_that_cannot_be_loaded(run: Run, tmp_path: Path, model_folder: str) -> None:
    failed(run("--prompt", "a", model=str(tmp_path / "none")), 1, "no model folder")
    failed(run("--prompt", "a", model=str(tmp_path)), 1, "cannot load the configuration")
    if importlib.util.find_spec("peft") is None:
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
        failed(run("--prompt", "a", model=str(adapter)), 1, "pip install peft")
    (tmp_path / "config.json").write_text((Path(model_folder) / "config.json").read_text())
    failed(run("--prompt", "a", model=str(tmp_path)), 1, "cannot load the tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((Path(model_folder) / name).read_text())
    failed(run("--prompt", "a", model=str(tmp_path)), 1, "cannot load the weights")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    failed(run("--prompt", "a", model=str(tmp_path)), 1, "cannot load the weights")
    # The tests forbid the network, so a hub id is out of reach.
    failed(
        run("--prompt", "a", model="nobody/nothing"),
        1,
        "nobody/nothing",
        "there is no folder of that name here",
        "the hub could not be reached",
    )
    failed(run("--prompt", "a", model="a b c"), 1, "no folder of that name", "Repo id must")


def test_the_loaders_own_words_end_before_the_next_sentence(
    run: Run, tmp_path: Path, model_folder: str
) -> None:
    for file in Path(model_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    outcome = run("--prompt", "a", model=str(tmp_path))
    failed(outcome, 1, "cannot load the weights")
    assert outcome.stderr.split(" Expected a folder")[0].endswith((".", "!", "?"))


def test_html_writes_the_page(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "why.html"
    outcome = run("--prompt", PROMPT, "--html", str(path), "--curvature", "none")
    assert outcome.exit_code == 0, outcome.output
    assert f"wrote {path}" in outcome.stderr
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "</html>" in page
    for options, message in (
        (("--html", "-"), "--html -: expected a file name"),
        (("--html", str(path), "--json", str(path)), "--json and --html both name"),
        (("--html", str(tmp_path)), "is a directory"),
    ):
        outcome = run("--prompt", PROMPT, *options)
        assert outcome.exit_code == 2
        assert message in outcome.stderr


def test_the_clients_logs_are_for_debug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    import transformers

    log = logging.getLogger("huggingface_hub.test")

    def load(*arguments: Any, **options: Any) -> None:
        log.error("Retrying in 1s")
        raise OSError("no connection")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", load)
    hub = logging.getLogger("huggingface_hub")
    level, seen = hub.level, []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    hub.addHandler(handler)
    try:
        failed(run("--prompt", "a", model="nobody/nothing"), 1, "no connection. Expected")
        assert seen == []
        hub.setLevel(logging.WARNING)
        assert run("--prompt", "a", "--debug", model="nobody/nothing").exit_code == 1
        assert seen == ["Retrying in 1s"]
    finally:
        hub.removeHandler(handler)
        hub.setLevel(level)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (T5Config(), "encoder-decoder"),
        (BartConfig(), "encoder-decoder"),
        (ViTConfig(), "not a causal language model"),
    ],
)
def test_models_of_another_kind(run: Run, tmp_path: Path, config: Any, words: str) -> None:
    config.save_pretrained(tmp_path)
    failed(run("--prompt", "a", model=str(tmp_path)), 1, words, "decoder-only")


def test_an_architecture_without_a_view(run: Run, tmp_path: Path, model_folder: str) -> None:
    from transformers import BertLMHeadModel

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((Path(model_folder) / name).read_text())
    config = BertConfig(
        vocab_size=256,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    failed(run("--prompt", "a", model=str(tmp_path)), 1, "BertLMHeadModel")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NumericalError("layer 3 gave nan"), ["layer 3 gave nan"]),
        (UnsupportedModelError("no view"), ["no view"]),
        (OutputError("disk full"), ["disk full"]),
        (KeyboardInterrupt(), ["interrupted"]),
        (RuntimeError("odd"), ["unexpected RuntimeError: odd", "--debug"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_of_the_engine(
    run: Run, engine: Callable[[Any], Recorder], error: BaseException, words: list[str]
) -> None:
    engine(error)
    failed(run("--prompt", "a"), 1, *words)


def test_debug_adds_the_traceback_and_keeps_the_exit_code(
    run: Run, engine: Callable[[Any], Recorder]
) -> None:
    engine(NumericalError("layer 3"))
    outcome = run("--prompt", "a", "--debug")
    assert outcome.exit_code == 1
    assert "Traceback" in outcome.stderr and "heat-fast: error: layer 3" in outcome.stderr
    outcome = run("--prompt", "a", "--variant", "ful", "--debug")
    assert outcome.exit_code == 2
    assert "Traceback" in outcome.stderr


def test_nan_weights_are_an_error_and_write_nothing(
    run: Run, model_folder: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    file = tmp_path / "result"
    outcome = run("--prompt", "a b", "--save", str(file), model=str(tmp_path))
    failed(outcome, 1, "block 1")
    assert not file.exists()


# --- as a program ---------------------------------------------------------------------------------


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from heat_fast.cli import main; main()", *arguments]


def test_version_and_help_import_nothing_heavy(repository: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from heat_fast.cli import app\n"
        "for line in (['--version'], ['--help'], ['attribute', '--help']):\n"
        "    outcome = CliRunner().invoke(app, line)\n"
        "    assert outcome.exit_code == 0, outcome.output\n"
        "    print(outcome.output)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    assert output.startswith(f"heat-fast {heat_fast.__version__}\n")
    for option in ("--model", "--prompt-file", "--target", "--variant", "--json", "--save"):
        assert option in output


def test_runs_as_a_module_and_says_that_piped_input_is_ignored(
    repository: Path, model_folder: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "heat_fast", "attribute", "--probes", "1", "--json"]
    outcome = subprocess.run(
        [*command, "-"], cwd=repository, input="a prompt", capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["metadata"]["config"]["probes"] == 1
    assert outcome.stderr.startswith("note: standard input is ignored")
    assert "--prompt-file -" in outcome.stderr and outcome.stderr.count("\n") == 1
    # With a prompt, or without a pipe, there is nothing to say.
    for options, stream in ((["--prompt", "a"], subprocess.PIPE), (["--beta", "-1"], None)):
        outcome = subprocess.run(
            [*command, "no-such-folder/r", *options],
            cwd=repository,
            stdin=subprocess.DEVNULL if stream is None else stream,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert outcome.returncode == 2
        assert "note:" not in outcome.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("options", [[], ["--json", "-"]])
def test_standard_output_that_is_full_is_an_ordinary_failure(
    repository: Path, model_folder: str, options: list[str]
) -> None:
    command = program(
        *("attribute", "--model", model_folder, "--prompt", "a b", "--probes", "1"), *options
    )
    with open("/dev/full", "wb") as full:
        outcome = subprocess.run(
            command, cwd=repository, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("heat-fast: error: cannot write to standard output: No space")
    assert outcome.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("options", [["--version"], ["--help"], ["attribute", "--help"]])
def test_help_into_a_full_standard_output_is_an_ordinary_failure(
    repository: Path, options: list[str]
) -> None:
    with open("/dev/full", "wb") as full:
        outcome = subprocess.run(
            program(*options), cwd=repository, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("heat-fast: error: cannot write to standard output: No space")
    assert outcome.stderr.count("\n") == 1


def test_completion_is_that_of_the_program_under_python_too(repository: Path) -> None:
    shown = [
        subprocess.run(
            [*command, "--show-completion", "bash"],
            cwd=repository,
            env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in (program(), [sys.executable, "-m", "heat_fast"])
    ]
    for text in shown:
        assert text.splitlines()[-1].endswith(" heat-fast")
        assert "_HEAT_FAST_COMPLETE=complete_bash" in text and "python" not in text


def test_help_shows_the_choices() -> None:
    output = CliRunner().invoke(app, ["attribute", "--help"], env={"COLUMNS": "140"}).output
    for option, choices in (
        ("--variant", "[full|lr|ls|win|lr+win|ls+win|gs]"),
        ("--curvature", "[hessian|gauss_newton|grad_squared|none]"),
        ("--estimator", "[block|coded|row|low_rank]"),
        ("--probes", "N|auto"),
        ("--normalize", "[none|sum]"),
    ):
        line = next(line for line in output.splitlines() if option in line)
        assert choices in line


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_goes_to_a_terminal_on_standard_error_only(
    repository: Path, model_folder: str
) -> None:
    import pty

    terminal, standard_error = pty.openpty()
    command = program(
        *("attribute", "--model", model_folder, "--prompt", PROMPT, "--probes", "1", "--json", "-")
    )
    process = subprocess.Popen(
        command,
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=standard_error,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(standard_error)
    shown = b""
    try:
        # Reading fails on Linux once the other side has closed the terminal.
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:
        pass
    finally:
        os.close(terminal)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert json.loads(output)["prompt_text"] == PROMPT
    assert b"curvature" in shown and b"information" in shown
    assert b"100%" in shown and b"left" in shown


def test_a_terminal_that_speaks_ascii(repository: Path, model_folder: str) -> None:
    command = program("attribute", "--model", model_folder, "--prompt", "é 你", "--probes", "1")
    outcome = subprocess.run(
        command,
        cwd=repository,
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert rb"\xe9" in outcome.stdout
    assert b"#" * 10 in outcome.stdout

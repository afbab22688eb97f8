"""The other commands: show, compare, estimate, bench, info, a file of options, completion."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import heat_fast
from heat_fast.cli import app
from heat_fast.comparison import compare_results
from heat_fast.config import HeatConfig
from heat_fast.errors import InputError
from heat_fast.result import Attribution
from test_result import make

COMMANDS = ("attribute", "batch", "show", "compare", "estimate", "bench", "evaluate", "info")


def run(*arguments: object, **keywords: Any) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments], **keywords)


def worked(*arguments: object) -> str:
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return str(outcome.stdout)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with results of every kind in it."""
    monkeypatch.chdir(tmp_path)
    one = make(id="one")
    two = make([[0.0, 2.0, 1.0], [0.0, 3.0, 0.0]], id="two")
    one.save("one.safetensors")
    two.save("two.safetensors")
    make(token_ids=(7, 8, 9)).save("other.safetensors")
    Path("one.json").write_text(json.dumps(one.to_dict()))
    heat_fast.write_jsonl([one, two], "both.jsonl")
    heat_fast.write_jsonl([one, two, one], "twice.jsonl")
    heat_fast.write_jsonl([], "empty.jsonl")
    Path("broken.json").write_text("{")
    return tmp_path


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    text = " ".join(run(name, "--help", env={"COLUMNS": "200"}).output.split())
    assert f"Example: heat-fast {name}" in text
    assert "--config" in text and "--debug" in text


def test_every_setting_has_an_option() -> None:
    text = run("attribute", "--help", env={"COLUMNS": "200"}).output
    for field in dataclasses.fields(HeatConfig):
        assert f"--{field.name.replace('_', '-')} " in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "none.safetensors"], "there is no file 'none.safetensors'"),
        (["show", "broken.json"], "is damaged: it is not JSON"),
        (["show", "both.jsonl"], "holds several results"),
        (["show", "both.jsonl", "--id", "three"], "no result 'three'"),
        (["show", "empty.jsonl"], "holds no results"),
        (["show", "twice.jsonl", "--id", "one"], "several results 'one': expected ids of one"),
        (["show", "one.json", "--id", "one"], "holds one result"),
        (["show", "one.json", "--json", "no-folder/x"], "does not exist"),
        (["show", "one.json", "--html", "-"], "--html -: expected a file name"),
        (["compare"], "compare needs two saved results"),
        (["compare", "one.json"], "Give both"),
        (["compare", "one.json", "other.safetensors"], "are of different prompts"),
        (["compare", "one.json", "one.json", "--prompt", "a"], "without --against"),
        (["compare", "one.json", "one.json", "--messages", "a"], "without --against"),
        (["compare", "one.json", "one.json", "--model", "m"], "--model without --against"),
        (
            ["compare", "one.json", "one.json", "--device", "auto", "--variant", "full"],
            "--device, --variant without --against or --against-target: expected nothing",
        ),
        (["compare", "one.json", "one.json", "--dtype", "auto"], "--dtype without --against"),
        (["compare", "one.json", "one.json", "--probes", "3"], "--probes without --against"),
        (["compare", "one.json", "--against", "gs"], "Drop one"),
        (["compare", "--against", "gs", "--prompt", "a", "--id", "1"], "--id without saved"),
        (["compare", "--against", "gs", "--prompt", "a", "--messages", "b"], "both --messages and"),
        (["compare", "--against", "gs", "--messages", "one.json"], "holds no conversation"),
        (["compare", "--against", "gs", "--model", "a"], "--prompt-file F or --messages F"),
        (["compare", "--against", "g", "--prompt", "a"], "--against: unknown variant 'g'"),
        (["compare", "one.json", "one.json", "--id", "one"], "holds one result"),
        (["compare", "--against", "gs", "--prompt", ""], "prompt is empty"),
        (["estimate", "--beta", "-1"], "--beta -1.0 is not valid"),
        (["estimate", "--json", "no-folder/x"], "does not exist"),
        (["estimate", "--dtype", "int8"], "--dtype int8: expected one of"),
        (["bench", "--window", "3"], "--window 3 has no room"),
        (["bench", "--dtype", "int8"], "--dtype int8: expected one of"),
        (["bench", "--device", "toaster"], "--device toaster"),
        (["info", "--json", "no-folder/x"], "does not exist"),
        (["info", "--json", "/"], "is a directory"),
        (["info", "--config", "none.toml"], "cannot read --config none.toml"),
    ],
    ids=" ".join,
)
def test_wrong_requests(folder: Path, arguments: list[str], words: str) -> None:
    before = os.listdir(folder)
    outcome = run(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("heat-fast: error: ")
    assert words in outcome.stderr
    assert os.listdir(folder) == before


@pytest.mark.parametrize("name", ["estimate", "bench"])
def test_counts_below_one_are_refused(name: str) -> None:
    assert run(name, "--tokens", "0").exit_code == 2
    assert run(name, "--targets", "-1").exit_code == 2


@pytest.mark.parametrize("name", ["one.parquet", "one.jsonl"])
def test_a_result_is_read_whatever_its_name(name: str, folder: Path) -> None:
    Path("one.safetensors").rename(name)
    assert worked("show", name, "--json", "-") == Path("one.json").read_text() + "\n"


def test_one_line_of_json_is_read_whatever_its_name(folder: Path) -> None:
    Path("one.json").rename("one.pq")
    worked("show", "one.pq")


def test_windows_of_one_variant_are_not_the_others() -> None:
    given = ("--window", "80", "--tail", "24", "--curvature", "none", "--json", "-")
    cut = json.loads(worked("compare", "--variant", "full", "--against", "win", *given))
    assert cut["rank_correlation"]["score"] < 0.99
    back = json.loads(worked("compare", "--variant", "win", "--against", "full", *given))
    assert back["rank_correlation"]["score"] == pytest.approx(cut["rank_correlation"]["score"])
    given = ("--layers", "2", "--probes", "1", "--json", "-")
    cut = json.loads(worked("compare", "--variant", "full", "--against", "ls", *given))
    assert cut["rank_correlation"]["gate"] < 0.99


def test_many_results_are_no_single_one(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    heat_fast.write_parquet([make()], "one.parquet")
    with pytest.raises(InputError, match=r"holds many results.*read_parquet"):
        heat_fast.load("one.parquet")


# --- show -----------------------------------------------------------------------------------------


def test_show_reads_every_kind_of_file(folder: Path) -> None:
    texts = {
        worked("show", "one.safetensors"),
        worked("show", "one.json"),
        worked("show", "both.jsonl", "--id", "one"),
        worked("show", "both.jsonl", "--id", "1"),
    }
    assert len(texts) == 1
    assert "[1|<s>]" in texts.pop()
    assert "[1|the]" in worked("show", "both.jsonl", "--id", "two")
    hidden = worked("show", "one.json", "--no-special", "--top", "1")
    assert "[1|the]" in hidden and "[1|<s>]" not in hidden


def test_show_reads_parquet(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    heat_fast.write_parquet(heat_fast.read_jsonl("both.jsonl"), "both.parquet")
    assert worked("show", "both.parquet", "--id", "two") == worked("show", "two.safetensors")


def test_show_writes_json_and_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.loads(worked("show", "both.jsonl", "--id", "two", "--json", "-"))
    assert data == heat_fast.load("two.safetensors").to_dict()

    def to_html(self: Attribution, path: str) -> None:
        Path(path).write_text(f"page of {self.id}")

    monkeypatch.setattr(Attribution, "to_html", to_html, raising=False)
    assert worked("show", "two.safetensors", "--html", "page.html") == ""
    assert Path("page.html").read_text() == "page of two"


# --- compare --------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans() -> None:
    def ranks(values: list[float]) -> list[float]:
        """One more than how many are lower, and half of the others that are equal."""
        return [
            sum(each < value for each in values) + (1 + values.count(value)) / 2 for value in values
        ]

    rows = torch.randint(0, 6, (2, 1, 40)).float()  # with ties
    names = tuple(f"t{number}" for number in range(40))
    left, right = (make(row.tolist(), tokens=names, text=None, offsets=None) for row in rows)
    comparison = compare_results(left, right)
    expected = statistics.correlation(*(ranks(row[0].tolist()) for row in rows))
    assert comparison.correlations["score"] == pytest.approx(expected, abs=1e-12)
    assert comparison.overlap(40) == 1
    assert 0 <= comparison.overlap(5) < 1
    flat = make([[1.0] * 40], tokens=names, text=None, offsets=None)
    assert compare_results(left, flat).correlations["gate"] is None
    with pytest.raises(InputError, match="different prompts, of 40 and 3 tokens: exp"):
        compare_results(left, make())


def test_compare_shows_saved_results_side_by_side(folder: Path) -> None:
    text = worked("compare", "one.safetensors", "two.safetensors", "--top", "1")
    body = [line.split() for line in text.splitlines()]
    assert ["0", "<s>", "1", "2.00", "3", "0.00"] in body
    assert ["1", "the", "2", "1.00", "1", "2.50"] in body
    assert not any(line[:2] == ["2", "·cat"] for line in body)
    assert "rank correlation (Spearman): score -0.866" in text
    assert "leading 1 tokens in common: 0%" in text
    data = json.loads(worked("compare", "one.json", "two.safetensors", "--json", "-"))
    assert data["rank_correlation"]["score"] == pytest.approx(-(0.75**0.5))
    assert data["overlap"] == {"k": 3, "share": 1.0}
    assert [each["ranks"] for each in data["leading"]] == [[2, 1], [1, 3], [3, 2]]


def test_compare_one_result_with_one_of_many(folder: Path) -> None:
    text = worked("compare", "one.json", "both.jsonl", "--id", "one", "--top", "3")
    assert "100%" in text
    assert "100%" in worked("compare", "both.jsonl", "one.json", "--id", "1", "--top", "3")


def test_a_file_of_options_leaves_saved_results_to_be_compared(folder: Path) -> None:
    """One file serves several commands: what has no effect here is not asked for here."""
    Path("o.toml").write_text(
        'model = "./none"\ndevice = "toaster"\nvariant = "gs"\nprompt = "a"\nagainst = "lr"\n'
        'target = "b"\ntop = 1\n'
    )
    saved = ("compare", "one.json", "two.safetensors")
    assert worked(*saved, "--config", "o.toml") == worked(*saved, "--top", "1")
    outcome = run(*saved, "--config", "o.toml", "--variant", "lr")
    assert outcome.exit_code == 2 and "--variant without --against" in outcome.stderr


def test_compare_two_variants_on_one_prompt(model_folder: str) -> None:
    options = ("--model", model_folder, "--prompt", "abcd", "--probes", "1", "--json", "-")
    data = json.loads(worked("compare", "--variant", "full", "--against", "gs", *options))
    assert (data["left"], data["right"]) == ("full", "gs")
    assert data["same_targets"]
    assert data["rank_correlation"]["gate"] == pytest.approx(1)
    assert sorted(each["index"] for each in data["leading"]) == [0, 1, 2, 3]
    same = json.loads(worked("compare", "--variant", "gs", "--against", "gs", *options))
    assert all(each["scores"][0] == each["scores"][1] for each in same["leading"])


def test_compare_two_targets_on_one_prompt(model_folder: str) -> None:
    options = ("--model", model_folder, "--prompt", "abcd", "--variant", "gs")
    options += ("--target", "e", "--against-target", "fg")
    data = json.loads(worked("compare", *options, "--json", "-"))
    assert (data["left"], data["right"]) == ("gs 'e'", "gs 'fg'")
    assert not data["same_targets"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        loader.from_pretrained(model_folder) for loader in (AutoModelForCausalLM, AutoTokenizer)
    )
    pair = (heat_fast.attribute(model, tokenizer, "abcd", each, "gs") for each in ("e", "fg"))
    odds = compare_results(*pair).log_odds_drop()
    for each in data["leading"]:
        assert each["log_odds_drop"] == pytest.approx(odds[each["index"]].item(), rel=1e-4)
    text = worked("compare", *options)
    assert "log odds" in text and "above 0 it speaks for the first" in text
    assert f"{odds[0].item():+.2f}" in text
    told = worked("compare", *options, "--branch-tolerance", "0.02")
    assert "no log odds of the targets: result 0 has branch_tolerance=0.02" in told
    assert "above 0" not in told


def test_compare_two_variants_on_a_chat(
    folder: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "abcd"}]
    Path("chat.json").write_text(json.dumps(messages))
    asked = []

    def attribute(self: Any, prompt: Any, target: Any, **_: Any) -> Attribution:
        asked.append(prompt)
        return heat_fast.load("one.json")

    monkeypatch.setattr(heat_fast.Attributor, "attribute", attribute)
    options = ("compare", "--against", "gs", "--model", model_folder, "--quiet")
    worked(*options, "--messages", "chat.json")
    assert run(*options, "--messages", "-", input=json.dumps(messages)).exit_code == 0
    assert asked == [messages] * 4


# --- estimate, bench, info ------------------------------------------------------------------------


def test_an_estimate_of_what_may_be_left_out_is_an_upper_bound(model_folder: str) -> None:
    options = ("--model", model_folder, "--tokens", "9", "--no-time")
    windows = ("--window", "6", "--tail", "2", "--window-tolerance", "0.1")
    assert "at most" not in worked("estimate", *options)
    assert "at most" not in worked("estimate", *options, *windows[:4])
    assert "at most" not in worked("estimate", *options, *windows[4:])  # one window
    for more in (("--coverage", "0.9"), windows):
        most = worked("estimate", *options, *more)
        for line in ("masked prompts", "FLOPs in all"):
            assert any(each.startswith(line) and "at most" in each for each in most.splitlines())


def test_estimate_tells_what_the_library_tells(model_folder: str) -> None:
    from transformers import AutoModelForCausalLM

    options = ("--model", model_folder, "--tokens", "9", "--targets", "2", "--no-time")
    data = json.loads(worked("estimate", *options, "--probes", "2", "--json", "-"))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    told = heat_fast.estimate(model, 9, 2, HeatConfig(probes=2), calibrate=False)
    assert data == {**dataclasses.asdict(told), "total_flops": told.total_flops}
    assert data["hvp"] == 36
    text = worked("estimate", *options, "--probes", "auto")
    assert "at most 1,152" in text and "not timed" in text


@pytest.mark.parametrize(("tokens", "targets"), [(1, 1), (3, 5), (1, 30), (7, 1)])
def test_an_estimate_of_a_short_prompt_is_timed(
    model_folder: str, tokens: int, targets: int
) -> None:
    options = ("--model", model_folder, "--tokens", str(tokens), "--targets", str(targets))
    data = json.loads(worked("estimate", *options, "--variant", "gs", "--json", "-"))
    assert data["seconds"] > 0


def test_bench_measures_what_it_says(model_folder: str) -> None:
    options = ("--model", model_folder, "--tokens", "9", "--targets", "2", "--variant", "gs")
    data = json.loads(worked("bench", *options, "--json", "-"))
    parts = ("trunk", "gate", "information", "curvature")
    assert set(data["flops"]) == set(parts)
    assert 0 < sum(data["seconds"][part] for part in parts) <= data["seconds"]["total"] * 1.01
    assert data["counts"]["branches"] == 9
    assert data["estimated_peak_bytes"] > 0 and data["estimated_seconds"] > 0
    longer = ("--model", model_folder, "--tokens", "28", "--variant", "gs", "--json", "-")
    whole, some = (
        json.loads(worked("bench", *longer, *more)) for more in ((), ("--coverage", "0.05"))
    )
    assert some["counts"]["branches"] < whole["counts"]["branches"] == 28
    for name in ("flops", "bytes_moved"):
        less = {part for part in parts if some[name][part] < whole[name][part]}
        assert less == {"information"}, name
    text = worked("bench", *options, "--repeat", "2")
    for words in (*parts, "total", "GFLOP/s", "9 prompt and 2 target tokens", "beyond the model"):
        assert words in text


def test_info_tells_versions_and_kernels() -> None:
    data = json.loads(worked("info", "--json", "-"))
    assert data["heat_fast"] == heat_fast.__version__
    assert data["packages"]["torch"] == torch.__version__
    assert data["build"] == heat_fast.build_info()
    assert "LlamaForCausalLM" in data["models"]
    text = worked("info")
    for words in (heat_fast.__version__, torch.__version__, "cpu", "CPU kernels", "Triton"):
        assert words in text


# --- a file of options ----------------------------------------------------------------------------


def test_a_file_sets_options_and_the_line_wins(folder: Path, model_folder: str) -> None:
    Path("o.toml").write_text(
        f'model = "{model_folder}"\nvariant = "gs"\nseed = 3\nbeta = 0.25\nprompt-file = "p"\n'
        'quiet = true\nnormalize = "none"\nprobes = 4\ntokens = 7\n'
    )
    Path("p").write_text("abc")
    data = json.loads(worked("attribute", "--config", "o.toml", "--seed", "5", "--json", "-"))
    Path("auto.toml").write_text('probes = "auto"\nprobes-max = 2\nbeta = 1\nid = 3\nlimit = 5\n')
    more = ("--config", "auto.toml", "--prompt", "a", "--model", model_folder, "--json", "-")
    auto = json.loads(worked("attribute", *more))["metadata"]["config"]
    assert (auto["probes"], auto["probes_max"], auto["beta"]) == ("auto", 2, 1.0)
    config = data["metadata"]["config"]
    assert (config["variant"], config["seed"], config["beta"]) == ("gs", 5, 0.25)
    assert (config["probes"], data["prompt_text"]) == (4, "abc")
    # `tokens` is no option of attribute, but of estimate, which takes the same file.
    told = json.loads(worked("estimate", "--config", "o.toml", "--no-time", "--json", "-"))
    assert told["branches"] == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("probe = 4", "unknown option 'probe': expected the name of an option"),
        ("probe = 4", "Did you mean 'probes'"),
        ("probes = ", "is not TOML"),
        ("[attribute]\nprobes = 1", "attribute"),
        ("beta = 1979-05-27", 'beta = "1979-05-27": expected a number. Correct it.'),
        ('probes = "few"', 'probes = "few": expected a whole number or "auto"'),
        ('probes = "3"', 'probes = "3": expected a whole number or "auto"'),
        ("codes = true", 'codes = true: expected a whole number or "auto"'),
        ("beta = -1", "--beta -1.0 is not valid"),
        ('layers = "all"', 'layers = "all": expected a whole number'),
        ("seed = true", "seed = true: expected a whole number. Correct it."),
        ('seed = "3"', 'seed = "3": expected a whole number'),
        ("top-k = 2.0", "top-k = 2.0: expected a whole number"),
        ("window = [3]", "window = [3]: expected a whole number"),
        ("beta = true", "beta = true: expected a number"),
        ('beta = "0.5"', 'beta = "0.5": expected a number'),
        ('quiet = "yes"', 'quiet = "yes": expected true or false'),
        ("special = 1", "special = 1: expected true or false"),
        ("variant = true", "variant = true: expected text or a number"),
        ("target = {a = 1}", 'target = {"a": 1}: expected text or a number'),
        ('segment = ["a=b", true]', 'segment = ["a=b", true]: expected text or a number'),
        ("tokens = true", "tokens = true: expected a whole number"),  # of another command
    ],
)
def test_wrong_files_of_options(folder: Path, text: str, words: str) -> None:
    Path("o.toml").write_text(text)
    outcome = run("attribute", "--prompt", "a", "--config", "o.toml", "--model", "./none")
    assert outcome.exit_code == 2, outcome.output
    assert words in outcome.stderr


# --- the shell ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("heat-fast ", {"attribute", "batch", "show"}),
        ("heat-fast attribute --vari", {"--variant"}),
        ("heat-fast batch --variant l", {"lr", "ls", "lr+win", "ls+win"}),
        ("heat-fast bench --estimator ", {"block", "coded", "row", "low_rank"}),
    ],
)
def test_the_shell_completes(line: str, expected: set[str]) -> None:
    words = line.split(" ")
    outcome = run(
        env={
            "_HEAT_FAST_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        },
        prog_name="heat-fast",
    )
    assert expected <= set(outcome.output.split())


def test_commands_that_need_no_model_load_none(folder: Path, repository: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from heat_fast.cli import app\n"
        "for name in ('batch', 'show', 'compare', 'estimate', 'bench', 'info'):\n"
        "    assert CliRunner().invoke(app, [name, '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'pandas', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)


def test_a_file_may_give_one_of_several_without_brackets(folder: Path) -> None:
    Path("one.toml").write_text('segment = "where=mountain of Mirmora is"\nvariant = "gs"\n')
    Path("two.toml").write_text('segment = ["where=mountain of Mirmora is"]\nvariant = "gs"\n')
    found = [
        json.loads(worked("attribute", "--config", name, "--json", "-"))
        for name in ("one.toml", "two.toml")
    ]
    assert [set(each["metadata"]["segments"]) for each in found] == [{"where"}, {"where"}]

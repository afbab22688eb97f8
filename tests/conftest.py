"""What every test shares: no network, few threads, fixed seeds, and the models to test on."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read by the hub client when it is imported, so before anything imports transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import numpy
import pytest
import torch

# Read when Triton is first imported. The interpreter serves what asks for impl="triton" by name.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from heat_fast import gpu, native
from heat_fast.kernels.dispatch import using

if TYPE_CHECKING:
    from heat_fast.demo import Demo

pytest.register_assert_rewrite("assertions", "families")

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = Path(os.environ.get("HEAT_FAST_MODELS", REPOSITORY.parent / "shared" / "data" / "models"))
SEED = 20240517

# The same examples in every run, however loaded the machine is.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    # The matrices of the tests are too small to gain from more threads, and lose on a busy machine.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(skip)


class Figures:
    """Measured figures that tests report without demanding them; printed after the run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Keep a line for the end of the run."""
        self.lines.append(line)


_FIGURES = Figures()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # One of several processes hands its figures to the one that prints them.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = _FIGURES.lines


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _FIGURES.lines += getattr(node, "workeroutput", {}).get("figures", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES.lines:
        terminalreporter.section("figures")
        for line in _FIGURES.lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def figures() -> Figures:
    """Where a test leaves a figure to be printed after the run."""
    return _FIGURES


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def local_model() -> Callable[[str], Path]:
    """``local_model(name)`` is the folder of a model on disk, or skips the test without it."""

    def find(name: str) -> Path:
        path = MODELS / name
        if not (path / "config.json").is_file():
            pytest.skip(f"no model at {path} (HEAT_FAST_MODELS names the folder to look in)")
        return path

    return find


@pytest.fixture(scope="session")
def demo() -> Demo:
    """The embedded model with its tokenizer and example prompts; not to be modified."""
    # Here and not above: a session that runs none of these tests need not load it.
    from heat_fast.demo import load_demo_model

    return load_demo_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama with a byte-level tokenizer, as save_pretrained() writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["native", "reference"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with the compiled kernels and with torch alone."""
    if request.param == "native" and not native.available():
        pytest.skip(f"the compiled extension is missing: {native.missing()}")
    with using(request.param, torch.device("cpu")):
        yield request.param


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where Triton's kernels run: the GPU, or the CPU in Triton's interpreter.

    In the interpreter every launch is watched for races and stray addresses; on a GPU
    compute-sanitizer does so, where it is installed.
    """
    if gpu.missing():
        pytest.skip(f"Triton's kernels cannot run: {gpu.missing()}")
    if not gpu.interpreted():
        yield torch.device("cuda")
        return
    from sanitizer import sanitized

    with sanitized():
        yield torch.device("cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN: a number that nothing has written fails every comparison."""

    def fill(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poison(*args: Any, **options: Any) -> torch.Tensor:
            made = make(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poison

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, fill(getattr(owner, name)))

"""What the engine promises besides its numbers: determinism, the user's model left as it was,
memory running out, interruption, progress, short dtypes, broken weights, and honest counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import families
import heat_fast
from assertions import assert_close
from heat_fast import ConfigError, HeatError, InputError, NumericalError
from oracles import COMPONENTS, Measured, measure

if TYPE_CHECKING:
    from heat_fast.demo import Demo

LENGTH = 9
PROBES = 2
# Another batching, another order of float32 sums: a few hundred roundings of 6e-8 at the worst.
ROUNDING = 2e-5

few_families = pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gptj"])


def ids_of(name: str = "llama", length: int = LENGTH) -> list[int]:
    return families.prompt_ids(name, length)


def same(label: str, expected: Measured, actual: Measured, rtol: float) -> None:
    for part, values in expected.parts.items():
        assert_close(f"{label} {part}", values, actual[part], rtol=rtol)


# --- determinism --------------------------------------------------------------------------------

ESTIMATORS: dict[str, dict[str, Any]] = {
    "block": {},
    "coded": {"estimator": "coded", "codes": 5},
    "row": {"estimator": "row", "probes": 5},
    "low_rank": {"variant": "lr", "rank": 7},
    "low_rank_two_passes": {"variant": "lr", "rank": 7, "passes": 2},
    "low_rank_by_token": {"variant": "lr", "rank": 3, "rank_scope": "token"},
    "gauss_newton": {"curvature": "gauss_newton"},
}
each_estimator = pytest.mark.parametrize("settings", ESTIMATORS.values(), ids=ESTIMATORS)


@each_estimator
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_batch_size_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    model, ids = families.build(name), ids_of(name)
    settings = {"probes": PROBES} | settings
    expected = measure(model, ids, [4, 6], token_budget=4096, **settings)
    for budget in (1, 7, 64):
        actual = measure(model, ids, [4, 6], token_budget=budget, **settings)
        same(f"budget {budget}", expected, actual, ROUNDING)
        assert actual.result.metadata["token_budget"] == budget


@each_estimator
def test_runs_repeat_to_the_last_bit(settings: dict[str, Any]) -> None:
    model, ids = families.build("llama"), ids_of()
    first = measure(model, ids, [4, 6], **({"probes": PROBES} | settings))
    torch.manual_seed(99)
    torch.randn(7)
    second = measure(model, ids, [4, 6], **({"probes": PROBES} | settings))
    for part, values in first.parts.items():
        assert torch.equal(values, second[part]), part


def test_number_of_threads_changes_nothing() -> None:
    model, ids = families.build("llama"), ids_of()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(measure(model, ids, [4, 6], probes=PROBES))
    finally:
        torch.set_num_threads(before)
    same("threads", results[0], results[1], ROUNDING)


# The demo model's four blocks are passed up, down and up again as tangents, ten products each, with
# sums of at most 352 terms (its feed-forward layer) in another order: so many roundings of 2^-24,
# independent. Eight times that for the differences that a second derivative takes (runs in float64
# agree to 1e-13 whatever the budget).
DEMO_ROUNDING = 8 * (3 * 4 * 10 * 352) ** 0.5 * 2.0**-24


@each_estimator
def test_batches_and_threads_change_nothing_on_a_trained_model(
    settings: dict[str, Any], demo: Demo
) -> None:
    ids = list(demo.tokenizer(demo.examples[0].prompt)["input_ids"])[-33:]
    settings = {"probes": PROBES} | settings
    expected = measure(demo.model, ids, None, **settings)
    before = torch.get_num_threads()
    try:
        for threads, budget in ((1, 1), (1, 70), (1, 4096), (2, None)):
            torch.set_num_threads(threads)
            actual = measure(demo.model, ids, None, token_budget=budget, **settings)
            same(f"{threads} threads, budget {budget}", expected, actual, DEMO_ROUNDING)
            order = expected.result.scores.argsort(descending=True)[:5]
            assert torch.equal(actual.result.scores.argsort(descending=True)[:5], order)
    finally:
        torch.set_num_threads(before)


# --- the model is left as it was found ----------------------------------------------------------


class Adapter(nn.Module):
    """A linear layer with a low-rank addition under heavy dropout."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(0.5)
        self.low = nn.Linear(base.in_features, 3)
        self.high = nn.Linear(3, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.high(self.low(self.dropout(x)))
        return self.base(x) + added


def snapshot(model: Any) -> dict[str, Any]:
    """Everything about a model that a run could disturb."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(getattr(m, hook)) for hook in hooks] for name, m in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "parameters": {
            name: (id(value), value.requires_grad, value.grad, value._version)
            for name, value in model.named_parameters()
        },
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "buffers": {name: value.tolist() for name, value in model.named_buffers()},
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "random": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
        "default_dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def lived_in(name: str, attn: str = "eager") -> Any:
    """A model in the middle of someone's work: adapter, mixed modes, frozen weights, a hook."""
    model = families.build(name, attn=attn)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    model.train()
    blocks: Any = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    blocks[1].eval()
    if name == "llama":
        blocks[0].mlp.up_proj = Adapter(blocks[0].mlp.up_proj)
    model.register_forward_hook(lambda *_: None)
    return model


def check_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        assert value == after[key], key


@pytest.mark.parametrize(
    ("name", "attn"),
    [
        ("llama", "sdpa"),
        ("gpt2", "eager"),
        ("phi3_longrope_short", "sdpa"),
        ("phi3_longrope_long", "eager"),
        ("gemma3_text", "sdpa"),
    ],
)
def test_model_is_left_as_it_was_found(name: str, attn: str) -> None:
    model, ids = lived_in(name, attn), ids_of(name)
    before = snapshot(model)
    heat_fast.attribute(model, None, ids, [4, 6], probes=1)
    check_untouched(before, snapshot(model))


def test_long_rope_switches_back_to_short() -> None:
    """A context over the threshold must not leave the long frequencies in the model."""
    model = families.build("phi3_longrope_long")
    short = torch.tensor([families.prompt_ids("phi3_longrope_long", 3)])
    with torch.no_grad():
        expected = model(short).logits
        heat_fast.attribute(model, None, ids_of("phi3_longrope_long"), 4, probes=1)
        assert torch.equal(expected, model(short).logits)


def test_long_rope_and_chunks_of_a_response() -> None:
    """The first chunks' contexts are under the threshold; the tables are those of the whole."""
    model, ids = families.build("phi3_longrope_long"), families.prompt_ids("phi3_longrope_long", 3)
    expected = heat_fast.attribute(model, None, ids, [7, 8, 9], variant="gs")
    for chunk in (1, 2):
        found = heat_fast.attribute(model, None, ids, [7, 8, 9], variant="gs", response_chunk=chunk)
        assert_close("scores", expected.target_scores, found.target_scores, rtol=1e-4)


@pytest.mark.parametrize("prompt", [19, 31, 43])
def test_low_rank_of_targets_out_of_reach(prompt: int) -> None:
    """A target that windowed attention keeps from the prompt has a Hessian of exactly 0."""
    model, ids = families.build("mistral", torch.float64), families.prompt_ids("mistral", prompt)
    settings: dict[str, Any] = {"target_span": (6, 7), "layers": 1, "rank": 8}
    found = heat_fast.attribute(model, None, ids, list(range(7, 15)), "lr", **settings)
    assert not found.curvature.any()


def test_dropout_is_off_during_a_run() -> None:
    model = lived_in("llama")
    actual = measure(model, ids_of(), 4, probes=PROBES)
    expected = measure(model.eval(), ids_of(), 4, probes=PROBES)
    for part, values in expected.parts.items():
        assert torch.equal(values, actual[part]), part


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_mode_of_the_caller_changes_nothing(mode: Callable[[], Any]) -> None:
    model = families.build("llama")
    expected = measure(model, ids_of(), [4, 6], probes=PROBES)
    with mode():
        actual = measure(model, ids_of(), [4, 6], probes=PROBES)
    for part, values in expected.parts.items():
        assert_close(f"{mode.__name__} {part}", values, actual[part], rtol=1e-6)


# --- memory running out -------------------------------------------------------------------------

FAILURES = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to ..."),
    "python": lambda: MemoryError(),
    "extension": lambda: RuntimeError("gram could not run: out of memory (CUDA error 2)"),
    "triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."),
}
# The kernel that is patched, and which of its arguments has the batch in its second dimension.
KERNELS = {"branch_attention": 0, "attention_tangent": 1, "attention_adjoint_tangent": 1}
SINGLE = {"attention_adjoint": 1}  # runs one sequence; its second dimension is another


def limit_batch(
    monkeypatch: pytest.MonkeyPatch, kernel: str, most: int, failure: Callable[[], BaseException]
) -> list[int]:
    """Let a kernel fail for batches over `most`; the list records the sizes that were tried."""
    where = f"heat_fast.decoder.attention.{kernel}"
    original: Any = getattr(__import__("heat_fast.decoder.attention", fromlist=["x"]), kernel)
    tried: list[int] = []

    def limited(*arguments: Any) -> Any:
        tried.append(arguments[(KERNELS | SINGLE)[kernel]].shape[1])
        if tried[-1] > most:
            raise failure()
        return original(*arguments)

    monkeypatch.setattr(where, limited)
    return tried


def check_counts(actual: Measured, expected: Measured) -> None:
    """A batch that failed is not counted (branch tokens depend on the batches that were run)."""
    for unit in ("hvp", "branches"):
        assert actual.result.metadata["counts"][unit] == expected.result.metadata["counts"][unit]


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_running_out_of_memory_halves_and_goes_on(
    kernel: str, failure: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = families.build("llama"), ids_of()
    settings: dict[str, Any] = {"probes": PROBES, "token_budget": 96}
    expected = measure(model, ids, [4, 6], **settings)
    tried = limit_batch(monkeypatch, kernel, 3, failure)
    calls: list[tuple[str, int, int]] = []
    actual = measure(model, ids, [4, 6], progress=lambda *call: calls.append(call), **settings)
    check_progress(calls)
    same(kernel, expected, actual, ROUNDING)
    assert max(tried) > 3, "the limit was never met"
    retries = actual.result.metadata["out_of_memory_retries"]
    assert retries >= 1
    assert actual.result.metadata["token_budget"] == 96 >> retries
    check_counts(actual, expected)


@pytest.mark.parametrize("estimator", ["coded", "row"])
def test_other_estimators_survive_running_out_of_memory(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = families.build("gpt2"), ids_of("gpt2")
    settings: dict[str, Any] = {"probes": 6, "estimator": estimator, "codes": 7}
    expected = measure(model, ids, [4, 6], **settings)
    limit_batch(monkeypatch, "attention_adjoint_tangent", 2, FAILURES["cuda"])
    actual = measure(model, ids, [4, 6], **settings)
    same(estimator, expected, actual, ROUNDING)
    assert actual.result.metadata["out_of_memory_retries"] >= 1
    check_counts(actual, expected)


def fail_calls(monkeypatch: pytest.MonkeyPatch, stage: str, failing: set[int]) -> list[int]:
    """Let some calls of a stage's kernels with a batch over 1 fail; the list has all their sizes.

    Calls are numbered from 0 in the order of an undisturbed run; `-1` fails all of them.
    """
    kernels = {
        "information": ["branch_attention"],
        "curvature": ["attention_tangent", "attention_adjoint_tangent"],
    }[stage]
    module = __import__("heat_fast.decoder.attention", fromlist=["x"])
    sizes: list[int] = []
    for kernel in kernels:

        def limited(original: Any, where: int, *arguments: Any) -> Any:
            size = arguments[where].shape[1]
            if size > 1:
                sizes.append(size)
                if len(sizes) - 1 in failing or -1 in failing:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(*arguments)

        patched = partial(limited, getattr(module, kernel), KERNELS[kernel])
        monkeypatch.setattr(module, kernel, patched)
    return sizes


OUT_OF_MEMORY = [
    *(("information", name) for name in ("block", "gauss_newton")),
    *(("curvature", name) for name in ("block", "coded", "row")),
]


@pytest.mark.parametrize("targets", [[4], [4, 6, 8]], ids=["one", "response"])
@pytest.mark.parametrize(("stage", "estimator"), OUT_OF_MEMORY)
def test_memory_may_run_out_at_any_moment(
    stage: str, estimator: str, targets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first batch, a middle one and the last, at its last call; twice; until one is left."""
    model, ids = families.build("llama"), ids_of()
    settings = {"probes": PROBES, "token_budget": 30} | ESTIMATORS[estimator]
    with monkeypatch.context() as patch:
        calls = fail_calls(patch, stage, set())
        expected = measure(model, ids, targets, **settings)
    last = len(calls) - 1
    assert last > 4
    for failing in ({0}, {last // 2}, {last}, {0, 1}, {1, last // 2, last}, {-1}):
        steps: list[tuple[str, int, int]] = []
        with monkeypatch.context() as patch:
            fail_calls(patch, stage, failing)
            progress = partial(lambda steps, *step: steps.append(step), steps)
            actual = measure(model, ids, targets, progress=progress, **settings)
        same(f"{stage} {estimator} {failing}", expected, actual, ROUNDING)
        check_counts(actual, expected)
        check_progress(steps)
        retries = actual.result.metadata["out_of_memory_retries"]
        assert retries >= 1 if failing == {-1} else 1 <= retries <= len(failing)


def test_targets_that_do_not_fit_together_are_taken_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No more than two targets' adjoints at a time: the group is halved until it fits."""
    model, ids, targets = families.build("llama"), ids_of(), [4, 6, 8, 10, 12]
    expected = measure(model, ids, targets, probes=PROBES)
    original, alive = heat_fast.pipeline.run_adjoint, []

    def limited(*arguments: Any) -> Any:
        nonlocal alive
        alive = [reference for reference in alive if reference() is not None]
        if len(alive) >= 2:
            raise FAILURES["cuda"]()
        adjoint = original(*arguments)
        alive.append(weakref.ref(adjoint))
        return adjoint

    monkeypatch.setattr("heat_fast.pipeline.run_adjoint", limited)
    steps: list[tuple[str, int, int]] = []
    actual = measure(model, ids, targets, probes=PROBES, progress=lambda *step: steps.append(step))
    same("targets in turn", expected, actual, ROUNDING)
    check_counts(actual, expected)
    assert actual.result.metadata["out_of_memory_retries"] == 1
    assert actual.result.metadata["token_budget"] == expected.result.metadata["token_budget"]
    done = [step for part, step, _ in steps if part == "curvature"]
    assert done == sorted(done) and steps[-2][1] == steps[-2][2]


@pytest.mark.parametrize(
    "kernel", ["attention_tangent", "attention_adjoint", "attention_adjoint_tangent"]
)
def test_no_room_for_a_single_sequence_is_an_error(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.build("llama")
    limit_batch(monkeypatch, kernel, 0, FAILURES["cuda"])
    with pytest.raises(HeatError, match="out of memory even with one sequence"):
        heat_fast.attribute(model, None, ids_of(), 4, probes=1)


def test_other_runtime_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = limit_batch(monkeypatch, "attention_tangent", 0, lambda: RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        heat_fast.attribute(families.build("llama"), None, ids_of(), 4, probes=1)
    assert len(tried) == 1


# --- counts, progress and interruption ----------------------------------------------------------


def check_progress(calls: list[tuple[str, int, int]]) -> None:
    """Each component rises from 0 to exactly the total it began with, and never stands still."""
    for component in {name for name, _, _ in calls}:
        steps = [(done, of) for name, done, of in calls if name == component]
        done = [step for step, _ in steps]
        assert done[0] == 0 and done[-1] == steps[0][1], component
        assert done == sorted(set(done)), component
        assert len({of for _, of in steps}) == 1, component


PRODUCTS: dict[str, tuple[dict[str, Any], int]] = {
    "block": ({}, LENGTH * PROBES),
    "coded": ({"estimator": "coded", "codes": 5}, 5 * PROBES),
    "all_codes": ({"estimator": "coded", "codes": 99}, 16 * PROBES),
    "row": ({"estimator": "row"}, PROBES),
    "low_rank": ({"estimator": "low_rank", "rank": 7}, 14 + 4),
    "low_rank_two_passes": ({"estimator": "low_rank", "rank": 7, "passes": 2}, 2 * 14 + 4),
    "low_rank_by_token": (
        {"estimator": "low_rank", "rank": 3, "sketch": 1.5, "rank_scope": "token"},
        LENGTH * (5 + 4),
    ),
    "gauss_newton": ({"curvature": "gauss_newton"}, PROBES),
    "grad_squared": ({"curvature": "grad_squared"}, 0),
    "none": ({"curvature": "none"}, 0),
}


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize(("settings", "products"), PRODUCTS.values(), ids=PRODUCTS)
def test_counts(settings: dict[str, Any], products: int, targets: int) -> None:
    result = heat_fast.attribute(
        families.build("llama"),
        None,
        ids_of(),
        [4, 6, 8][:targets],
        probes=PROBES,
        token_budget=40,
        **settings,
    )
    counts = result.metadata["counts"]
    assert counts["hvp"] == (products * targets if "curvature" not in settings else 0)
    assert counts["branches"] == LENGTH


def test_branch_tokens_are_the_rows_that_were_run() -> None:
    """One branch at a time runs its suffix alone; a batch runs from its first branch's token."""
    counts = []
    for budget in (1, 22, 10_000):
        result = heat_fast.attribute(
            families.build("llama"), None, ids_of(), [4, 6], curvature="none", token_budget=budget
        )
        counts.append(result.metadata["counts"]["branch_tokens"])
    positions = LENGTH + 1
    assert counts[0] == sum(positions - first for first in range(LENGTH))
    assert counts[0] < counts[1] < counts[2] == LENGTH * positions


@pytest.mark.parametrize("component", ["trunk", "gate", "information", "curvature", "total"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3_longrope_long"])
def test_interruption_leaves_the_model_usable(name: str, component: str) -> None:
    """At the component's start, in its middle and at its end."""
    model, ids = lived_in(name, "sdpa"), ids_of(name)
    calls: list[str] = []
    expected = measure(
        model, ids, 4, probes=1, token_budget=30, progress=lambda part, *_: calls.append(part)
    )
    before = snapshot(model)
    count = calls.count(component)
    for moment in {1, (count + 1) // 2, count}:
        left = moment

        def interrupt(part: str, done: int, total: int) -> None:
            nonlocal left
            left -= part == component
            if left == 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            heat_fast.attribute(model, None, ids, 4, probes=1, token_budget=30, progress=interrupt)
        check_untouched(before, snapshot(model))
    again = measure(model, ids, 4, probes=1, token_budget=30)
    for part, values in expected.parts.items():
        assert torch.equal(values, again[part]), part


@pytest.mark.parametrize("settings", ESTIMATORS.values(), ids=ESTIMATORS)
def test_interruption_of_every_estimator(settings: dict[str, Any]) -> None:
    """After the first products, with several targets; attributes of torch are left alone too."""
    model, ids = lived_in("gemma2"), ids_of("gemma2")
    before = snapshot(model)

    def interrupt(part: str, done: int, total: int) -> None:
        if part == "curvature" and 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heat_fast.attribute(
            model,
            None,
            ids,
            [4, 6],
            progress=interrupt,
            **({"probes": PROBES, "token_budget": 20} | settings),
        )
    check_untouched(before, snapshot(model))


# --- short dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("instructions", [True, False], ids=["torch", "widened"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few_families
def test_half_precision(
    name: str, dtype: torch.dtype, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same rounded weights in float32, with torch's products and with wider ones.

    Three blocks of about ten roundings each, independent, so about sqrt(30) of half an ulp reaches
    the residual stream; a divergence and a Hessian depend on it quadratically and pass it twice.
    Eight times that covers what was not counted: 0.17 of the largest entry for bfloat16 (8 bits),
    0.02 for float16 (11 bits).
    """
    monkeypatch.setattr("heat_fast.decoder.product.has_instructions", lambda _: instructions)
    ids = ids_of(name)
    short = families.build(name, dtype=dtype)
    exact = families.build(name, dtype=dtype).float()
    actual = measure(short, ids, [4, 6], probes=4)
    expected = measure(exact, ids, [4, 6], probes=4)
    bound = 8 * 30**0.5 * torch.finfo(dtype).eps / 2
    for part, values in expected.parts.items():
        assert actual[part].dtype == torch.float32
        assert_close(f"{name} {dtype} {part}", values, actual[part], rtol=bound)
    assert actual.result.metadata["dtype"] == str(dtype).removeprefix("torch.")
    best = int(expected.result.scores.argmax())
    assert best in actual.result.scores.topk(2).indices.tolist()


# --- numbers that are not finite ----------------------------------------------------------------


@contextmanager
def weight_entry(weight: Tensor, value: float) -> Iterator[None]:
    with torch.no_grad():
        kept = weight[0, 0].clone()
        weight[0, 0] = value
        yield
        weight[0, 0] = kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_broken_weight_is_reported_with_its_block(name: str, value: float) -> None:
    model = families.build(name)
    if name == "llama":
        weights = {"block 1": model.model.layers[1].mlp.down_proj.weight}
        weights |= {"block 2": model.model.layers[2].self_attn.v_proj.weight}
    else:
        weights = {"block 1": model.transformer.h[1].mlp.c_proj.weight}
        weights |= {"block 2": model.transformer.h[2].attn.c_attn.weight}
    for block, weight in weights.items():
        with weight_entry(weight, value), pytest.raises(NumericalError, match=block):
            heat_fast.attribute(model, None, ids_of(name), 4, probes=1)


def test_broken_embeddings_and_logits_are_reported() -> None:
    model = families.build("llama_bias")
    ids = ids_of("llama_bias")
    with torch.no_grad():
        model.lm_head.weight[4] = float("nan")
    with pytest.raises(NumericalError, match="logits"):
        heat_fast.attribute(model, None, ids, 4, probes=1)
    with torch.no_grad():
        model.lm_head.weight[4] = 0
        model.get_input_embeddings().weight[ids[2]] = float("nan")
    with pytest.raises(NumericalError, match="input embeddings"):
        heat_fast.attribute(model, None, ids, 4, probes=1)


def test_overflow_in_float16_is_reported_with_its_block() -> None:
    """Finite weights, a product over 65,504."""
    model = families.build("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e4)
    with pytest.raises(NumericalError, match=r"block 1.*float16"):
        heat_fast.attribute(model, None, ids_of(), 4, probes=1)


def test_overflow_in_a_branch_is_reported_with_its_block() -> None:
    """The context is fine, the replaced token is not."""
    model = families.build("gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("inf")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().nan_to_num(posinf=0.0))
    with pytest.raises(NumericalError, match="block 0 with token 0 masked"):
        heat_fast.attribute(
            model, None, ids_of("gpt2"), 4, probes=1, masking="sentinel", sentinel_token=0
        )


def steep(factor: float) -> Any:
    """A float16 model whose gradient and scaled Hessian product grow as 1 / factor; with sharp
    attention in block 0 the product is the larger one."""
    model = families.build("llama_bias", dtype=torch.float16)
    for block in model.model.layers:
        block.input_layernorm.variance_epsilon = 0.0
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
        model.model.layers[0].self_attn.q_proj.weight.mul_(10)
    return model


def test_overflow_in_a_sweep_is_reported_with_its_block() -> None:
    """Shrinking the embeddings until something passes 65,504: all is well for a long while, then
    it is the Hessian product, in the block that meets the small numbers."""
    # A zero embedding has no root mean square, and these norms have no eps.
    masking: dict[str, Any] = {"masking": "sentinel", "sentinel_token": 5}
    for power in range(18, 60, 2):
        try:
            measure(steep(0.8**power), ids_of("llama_bias"), 4, probes=1, **masking)
        except NumericalError as error:
            assert power > 18
            assert "the tangent of the gradient at block 0" in str(error)
            return
    pytest.fail("nothing overflowed")


# --- targets, inputs ----------------------------------------------------------------------------


@few_families
def test_the_default_target_is_the_models_own_next_token(name: str) -> None:
    model, ids = families.build(name), ids_of(name)
    with torch.no_grad():
        greedy = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    actual = measure(model, ids, None, probes=PROBES)
    assert actual.result.target_ids == (greedy,)
    for target in (greedy, [greedy], torch.tensor([greedy])):
        given = measure(model, ids, target, probes=PROBES)
        assert given.result.target_ids == (greedy,)
        for part, values in actual.parts.items():
            assert torch.equal(values, given[part]), part


class Letters:
    """A tokenizer of one letter per token: 'a' is 3."""

    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") + 3 for letter in text]}

    def __len__(self) -> int:
        return 29

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return chr(token_id - 3 + ord("a"))

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(map(self.convert_ids_to_tokens, token_ids))


def test_text_and_ids_are_the_same_request() -> None:
    model = families.build("llama")
    text = heat_fast.attribute(model, Letters(), "heat", "map", probes=PROBES)
    prompt, target = [10, 7, 3, 22], [15, 3, 18]
    ids = heat_fast.attribute(model, None, prompt, target, probes=PROBES)
    assert text.token_ids == ids.token_ids == tuple(prompt)
    assert text.target_ids == ids.target_ids == tuple(target)
    assert text.tokens == ("h", "e", "a", "t")
    assert text.target_tokens == ("m", "a", "p")
    for part in COMPONENTS:
        assert torch.equal(getattr(text, part), getattr(ids, part)), part


def test_an_attributor_serves_many_prompts_and_sees_edited_weights() -> None:
    model = families.build("llama")
    attributor = heat_fast.Attributor(model, None, heat_fast.HeatConfig(probes=1))
    first = attributor.attribute(ids_of(), 4)
    attributor.attribute(ids_of(length=4), 4)
    assert torch.equal(first.scores, attributor.attribute(ids_of(), 4).scores)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert not torch.allclose(first.scores, attributor.attribute(ids_of(), 4).scores)


def test_one_token_is_enough() -> None:
    result = heat_fast.attribute(families.build("llama"), None, [5], 4, probes=PROBES)
    assert_close("gate", [[1.0]], result.gate, rtol=1e-6)
    assert result.scores.shape == (1,)
    assert float(result.scores) > 0


def test_the_longest_context_fits() -> None:
    model = families.build("opt")
    longest = model.config.max_position_embeddings
    ids = ids_of("opt", longest - 1)
    result = heat_fast.attribute(model, None, ids, [4, 5], curvature="none")
    assert result.gate.shape == (2, longest - 1)


@pytest.mark.parametrize(
    ("error", "words", "prompt", "target", "settings"),
    [
        (InputError, "prompt is empty", [], 4, {}),
        (InputError, "at most 64", [5] * 65, 4, {}),
        (InputError, "at most 64", [5] * 63, [4, 4, 4], {}),
        (InputError, "outside the model's vocabulary", [5, 69], 4, {}),
        (InputError, "outside the model's vocabulary", [5, 6], [4, -1], {}),
        (InputError, "has no tokens", [5, 6], [], {}),
        (InputError, "no tokenizer", "some text", 4, {}),
        (InputError, "no tokenizer", [5, 6], "text", {}),
        (InputError, "batch of 2", [[5, 6], [7, 8]], 4, {}),
        (InputError, "sentinel_token=69", [5], 4, {"masking": "sentinel", "sentinel_token": 69}),
        (InputError, "without padding", {"input_ids": [5, 6], "attention_mask": [0, 1]}, 4, {}),
        (ConfigError, "unknown variant 'fast'", [5, 6], 4, {"variant": "fast"}),
        (ConfigError, "beta=-1", [5, 6], 4, {"beta": -1}),
        (ConfigError, "unknown setting 'probe'", [5, 6], 4, {"probe": 3}),
    ],
)
def test_bad_input_gets_a_clear_error(
    error: type[HeatError], words: str, prompt: Any, target: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(error, match=words):
        heat_fast.attribute(families.build("opt"), None, prompt, target, **settings)


def test_a_path_is_not_a_model() -> None:
    with pytest.raises(InputError, match="from_pretrained"):
        heat_fast.attribute("some/model", None, [5, 6], 4)

"""The metrics against cases worked by hand, and what they promise of the model and of errors."""

from __future__ import annotations

import doctest
import importlib
import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import families
import heat_fast
from assertions import assert_close
from heat_fast import InputError, NumericalError, metrics
from heat_fast.forward import log_probs, padded_log_probs
from heat_fast.metrics import Case, Measurement

MODULES = (
    "_estimate _model alignment deletion downstream intervention robustness soft_masks".split()
)


class Bag(nn.Module):
    """Logits are the sum of the embeddings so far: a token adds 1 to the logit of its own id."""

    def __init__(self, vocabulary: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, vocabulary, dtype=torch.float64)
        nn.init.eye_(self.embed.weight)
        self.batches: list[tuple[int, ...]] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, inputs_embeds: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        self.batches.append(tuple(inputs_embeds.shape))
        return SimpleNamespace(logits=inputs_embeds.cumsum(1)[:, -logits_to_keep:])


def chance(*counts: int, target: int = 0) -> float:
    """The probability of a token when the tokens of a vocabulary of 4 were seen so often."""
    return math.exp(counts[target]) / sum(math.exp(count) for count in counts)


def hellinger(left: list[float], right: list[float]) -> float:
    apart = sum((a**0.5 - b**0.5) ** 2 for a, b in zip(left, right, strict=True))
    return (apart / 2) ** 0.5


def spread(*counts: int) -> list[float]:
    return [chance(*counts, target=token) for token in range(4)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"heat_fast.metrics.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0


# --- measurements ---------------------------------------------------------------------------------


def test_the_bootstrap_converges_to_the_error_of_a_mean() -> None:
    values = torch.randn(400, dtype=torch.float64)
    found = Measurement.of(values.tolist())
    assert found.stderr is not None
    # 1000 draws: the relative error of a standard deviation is 1 / sqrt(2000); five of them.
    assert_close("stderr", values.std() / 20, found.stderr, rtol=5 / 2000**0.5)
    assert found == Measurement.of(values.tolist())
    assert found.stderr != Measurement.of(values.tolist(), seed=1).stderr
    assert Measurement.of([2.0]).stderr is None


# --- soft masks -----------------------------------------------------------------------------------


def test_soft_scores_with_masks_that_are_certain() -> None:
    """Retention of 0 and 1 leaves nothing to chance: distances are those of known bags."""
    case = Case([0, 1], 0, [1.0, 0.0])
    own, nothing = spread(1, 1, 0, 0), spread(0, 0, 0, 0)
    left, right = spread(1, 0, 0, 0), spread(0, 1, 0, 0)
    whole = hellinger(own, nothing)
    kept = metrics.soft_ns(Bag(), [case], masks=3).value
    lost = metrics.soft_nc(Bag(), [case], masks=3).value
    assert_close("Soft-NS", max(0, 1 - hellinger(own, left) / whole), kept, rtol=1e-12)
    assert_close("Soft-NC", hellinger(own, right) / whole, lost, rtol=1e-12)


@pytest.mark.parametrize("metric", [metrics.soft_ns, metrics.soft_nc])
def test_soft_scores_converge_to_the_expectation(metric: Callable[..., Measurement]) -> None:
    """One token, whose only element that is not 0 is retained with probability 0.3 or 0.7."""
    case, masks = Case([0], 0, [0.3]), 4000
    found = metric(Bag(), [case], masks=masks, normalize="none").value
    # Retained: distance 0. Masked: distance H_0. Both metrics have the mean 0.3.
    assert abs(found - 0.3) < 5 * (0.3 * 0.7 / masks) ** 0.5
    assert found == pytest.approx(metric(Bag(), [case], masks=masks, normalize="none").value)


def test_masks_are_complements_and_shared_by_methods() -> None:
    case = Case([0], 0, [0.3])
    one = [
        metric(Bag(), [case], masks=9, normalize="none").value
        for metric in (metrics.soft_ns, metrics.soft_nc)
    ]
    assert one[0] == pytest.approx(one[1], abs=1e-12)
    # The same numbers: whoever retains more, retains what another retained, and more.
    higher = metrics.soft_ns(Bag(), [Case([0], 0, [0.6])], masks=9, normalize="none").value
    assert higher >= one[0]


def test_normalisation_of_retention() -> None:
    case, same = Case([0, 1], 0, [2.0, -4.0]), Case([0, 1], 0, [1.0, 0.0])
    assert metrics.soft_ns(Bag(), [case]) == metrics.soft_ns(Bag(), [same])
    equal, half = Case([0, 1], 0, [7, 7]), Case([0, 1], 0, [0.5, 0.5])
    for normalize in ("minmax", "sum"):
        assert metrics.soft_nc(Bag(), [equal], normalize=normalize) == metrics.soft_nc(
            Bag(), [half], normalize="none"
        )


def test_a_first_token_that_is_kept() -> None:
    case = Case([0, 1], 0, [0.0, 1.0])
    assert metrics.soft_ns(Bag(), [case], keep_first=1).value == pytest.approx(1)
    with pytest.raises(NumericalError, match=r"lower keep_first"):
        metrics.soft_ns(Bag(), [case], keep_first=len(case.token_ids))
    assert metrics.soft_ns(Bag(), [case]).value < 1
    found = metrics.aopc_order(Bag(), [Case([0, 1], 0, [9, 1])], keep_first=1).value
    expected = (chance(1, 1, 0, 0) - chance(1, 0, 0, 0)) / 2
    assert_close("AOPC", expected, found, rtol=1e-12)


def test_log_ratio() -> None:
    found = metrics.log_ratio(Measurement.of([1.0, 3.0, 0.0]), Measurement.of([1.0, 0.0, 1.0]))
    assert found.value == pytest.approx(math.log(2))
    assert found.per_example == (0.0, math.inf, -math.inf)
    twice = metrics.log_ratio(Measurement.of([2.0, 4.0]), Measurement.of([1.0, 2.0]))
    assert twice.stderr == pytest.approx(0, abs=1e-12)  # examples are drawn in pairs
    cases = metrics.random_cases([Case([1, 2], 0, [0, 0])] * 2, seed=3)
    assert len({float(score) for case in cases for score in case.scores}) == 4


# --- deletion -------------------------------------------------------------------------------------


def test_deletion_by_hand() -> None:
    case = Case([0, 0, 1, 2], 0, [0.5, 0.4, 0.3, 0.2])
    whole = chance(2, 1, 1, 0)
    fewer, none = chance(1, 1, 1, 0), chance(0, 1, 1, 0)
    expected = {
        "comprehensiveness": whole - fewer,  # round(0.2 * 4) = 1 token
        "sufficiency": whole - chance(1, 0, 0, 0),
        "aopc_fractions": (4 * (whole - fewer) + whole - none) / 5,
        "aopc_order": (
            (whole - fewer)
            + 2 * (whole - none)
            - (chance(0, 0, 1, 0) - none)
            + whole
            - chance(0, 0, 0, 0)
        )
        / 5,
    }
    for name, value in expected.items():
        assert_close(name, value, getattr(metrics, name)(Bag(), [case]).value, rtol=1e-12)


def test_the_best_order_has_the_largest_area() -> None:
    best, worst = Case([0, 1, 0, 2], 0, [2, 0, 1, 0]), Case([0, 1, 0, 2], 0, [0, 2, 0, 1])
    for metric in (metrics.aopc_order, metrics.aopc_fractions, metrics.comprehensiveness):
        assert metric(Bag(), [best]).value > metric(Bag(), [worst]).value
    assert metrics.sufficiency(Bag(), [best]).value < metrics.sufficiency(Bag(), [worst]).value


def test_counterfactual_area_follows_the_original_order() -> None:
    case = Case([0, 1], 0, [1, 0])
    found = metrics.aopc_counterfactual(Bag(), [case], [([2, 1], 2)], steps=1).value
    expected = (chance(0, 1, 1, 0, target=2) - chance(0, 1, 0, 0, target=2)) / 2
    assert_close("CF-AOPC", expected, found, rtol=1e-12)


def test_masking_by_the_mean_embedding() -> None:
    found = metrics.aopc_order(Bag(), [Case([0], 0, [1])], masking="mean").value
    # The mean embedding adds 1/4 to every logit alike.
    assert_close("AOPC", (chance(1, 0, 0, 0) - 0.25) / 2, found, rtol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batches_change_nothing_and_the_model_is_left_alone(name: str) -> None:
    # Eager attention of Hugging Face's Llama takes its softmax in float32 whatever the model's
    # dtype, and its last bit depends on the padding.
    attn = "sdpa" if name == "llama" else "eager"
    model = families.build(name, dtype=torch.float64, attn=attn).train()
    ids = families.prompt_ids(name, 9)
    cases = [Case(ids, 4, torch.rand(9)), Case(ids[:5], 6, torch.rand(5))]
    parameters = [each.clone() for each in model.parameters()]
    states = torch.get_rng_state(), random.getstate()
    for metric in (metrics.soft_ns, metrics.soft_nc, metrics.aopc_order, metrics.aopc_fractions):
        one, many = metric(model, cases, rows=1), metric(model, cases, rows=1000)
        assert_close(metric.__name__, one.per_example, many.per_example, rtol=1e-9)
    assert all(module.training for module in model.modules())
    assert all(each.grad is None for each in model.parameters())
    assert all(bool((a == b).all()) for a, b in zip(parameters, model.parameters(), strict=True))
    assert bool((torch.get_rng_state() == states[0]).all()) and random.getstate() == states[1]


def test_batches_keep_to_the_budget() -> None:
    model = Bag()
    metrics.aopc_order(model, [Case([0, 1, 2], 0, [1, 2, 3])], rows=6)
    assert [shape[:2] for shape in model.batches] == [(2, 3), (2, 3)]


def test_evidence_of_the_embedded_model_is_found_faithful(demo: Any) -> None:
    """Scores that mark the evidence take more of the prediction with them than random ones."""
    cases = []
    for example in demo.examples[:4]:
        encoded = demo.tokenizer(example.prompt, return_offsets_mapping=True)
        inside = [
            float(any(start < end and start >= a and end <= b for a, b in [example.fact]))
            for start, end in encoded["offset_mapping"]
        ]
        target = demo.tokenizer(example.answer, add_special_tokens=False)["input_ids"][0]
        cases.append(Case(encoded["input_ids"], target, inside))
    marked = metrics.comprehensiveness(demo.model, cases, keep_first=1)
    chance_level = metrics.comprehensiveness(demo.model, metrics.random_cases(cases), keep_first=1)
    assert marked.value > 0.5 and marked.value > chance_level.value


@pytest.mark.parametrize("name", ["llama_bias", "gpt2"])
def test_prompts_fit_the_context_of_the_model(name: str) -> None:
    model = families.build(name)
    ids = families.prompt_ids(name, 65)
    fits, long = (Case(ids[:count], 4, range(count)) for count in (64, 65))
    for metric in (
        metrics.soft_ns,
        metrics.soft_nc,
        metrics.comprehensiveness,
        metrics.sufficiency,
        metrics.aopc_fractions,
        metrics.aopc_order,
        metrics.filter_delta,
        metrics.snippet_delta,
        metrics.patch_effects,
    ):
        with pytest.raises(InputError, match=r"case 1: the prompt has 65 tokens: .* at most 64"):
            metric(model, [fits, long])
    assert len(metrics.patch_effects(model, [fits])[0]) == 64
    assert len(metrics.comprehensiveness(model, [fits])) == 1


@pytest.mark.parametrize("kind", [numpy.array, torch.tensor, tuple])
def test_ids_are_numbers_of_any_kind(kind: Any) -> None:
    target = kind([1, 0])[1]
    found, model = Case(kind([0, 1]), target, [1, 0]), Bag()
    for metric in (metrics.soft_ns, metrics.aopc_order, metrics.comprehensiveness):
        assert metric(model, [found]) == metric(model, [GOOD])

    def attribute(model: Any, ids: Any, target: Any) -> Tensor:
        embedded: Tensor = model.embed(torch.as_tensor(ids))
        return embedded[:, int(target)]

    moved, same = (
        metrics.sensitivity(model, attribute, [(ids, aim)])
        for ids, aim in ((kind([0, 1]), target), ([0, 1], 0))
    )
    assert moved == same and same.value > 0
    foil, plain = (kind([2, 1]), kind([2])[0]), ([2, 1], 2)
    area = metrics.aopc_counterfactual(model, [found], [foil])
    assert area == metrics.aopc_counterfactual(model, [GOOD], [plain])


# --- what scores are good for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "drop, count, masked",
    [(0.7, 90, 63), (0.29, 100, 29), (0.6, 7, 4), (numpy.float32(0.7), 90, 63), (1, 5, 5)],
)
def test_the_share_that_is_masked_is_exact(drop: float, count: int, masked: int) -> None:
    # No embedding of the whole prompt is 0.
    model, zeros = Bag(), []
    model.register_forward_pre_hook(
        lambda _, __, given: zeros.append(int((given["inputs_embeds"] == 0).all(-1).sum())),
        with_kwargs=True,
    )
    metrics.filter_delta(model, [Case([0] * count, 0, range(count))], drop=drop)
    assert sum(zeros) == masked


# --- alignment ------------------------------------------------------------------------------------


def test_dsa_by_hand() -> None:
    first, second = [[0, 1], [0]], [[2, 3], [1, 2]]
    found = metrics.dsa([[1, 1, 5, 3, 90], [0, 2, 2]], [[2], [1, 2]], first, second)
    assert found.per_example == pytest.approx((0.3, 1.0))
    assert found.value == pytest.approx(0.65)


@given(st.lists(st.floats(0, 1e6), min_size=4, max_size=9), st.floats(0.01, 100))
def test_dsa_stays_in_its_range_whatever_the_scale(scores: list[float], scale: float) -> None:
    segments: Any = [[2]], [[0, 1]], [[2, 3]]
    if sum(scores[:4]) < 1e-3:
        return
    found = metrics.dsa([scores], *segments).value
    assert -1 - 1e-12 <= found <= 1 + 1e-12
    scaled = metrics.dsa([[scale * each for each in scores]], *segments).value
    assert scaled == pytest.approx(found, abs=1e-9)


def test_token_f1_and_span_scores_by_hand() -> None:
    scores = [[0.1, 0.9, 0.8, 0.0, 0.7]]
    assert metrics.token_f1(scores, [[1, 3]]).value == 0.5
    assert metrics.token_f1(scores, [[1, 3]], k=3).value == pytest.approx(2 / 5)
    found = metrics.span_scores(scores, [[(1, 2), (3, 5)]], k=2)
    assert found.precision.value == pytest.approx(1 / 2)
    assert found.recall.value == pytest.approx(1 / 3)
    assert found.f1.value == pytest.approx(2 / 5)
    # Of equal scores the earlier one leads; with fewer tokens than k all of them do.
    assert metrics.token_f1([[1, 1, 1]], [[0]]).value == 1
    assert metrics.span_scores([[1, 1, 1]], [[(0, 1)]]).precision.value == pytest.approx(1 / 3)


@given(st.data())
def test_f1_is_the_harmonic_mean(data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.floats(-9, 9), min_size=2, max_size=8))
    gold = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    k = data.draw(st.integers(1, 9))
    found = metrics.span_scores([scores], [[(each, each + 1) for each in gold]], k=k)
    precision, recall, f1 = (each.value for each in found)
    total = precision + recall
    assert f1 == pytest.approx(2 * precision * recall / total if total else 0.0)
    assert all(0 <= each <= 1 for each in (precision, recall, f1))


# --- robustness -----------------------------------------------------------------------------------


def test_sensitivity_converges_to_the_noise() -> None:
    """Scores that are one element of the embedding have the noise's standard deviation."""
    model = Bag()

    def first_element(model: Any, ids: Any, target: int) -> Tensor:
        assert len(model.embed(torch.tensor(ids[:-1]))) == 3  # not the prompt: no noise
        found: Tensor = model.embed(torch.tensor([*ids, target]))[:-1, 0]
        return found

    found = metrics.sensitivity(model, first_element, [([0, 1, 2, 3], 0)], noise=0.25, samples=500)
    assert_close("sensitivity", 0.25, found.value, rtol=5 / (2 * 500 * 4) ** 0.5)
    assert not model.embed._forward_hooks
    assert float(model.embed.weight.detach()[0, 0]) == 1


def test_sensitivity_of_an_attribution() -> None:
    model, ids = families.build("llama"), families.prompt_ids("llama", 6)

    def scores(model: Any, ids: Any, target: int) -> Tensor:
        return heat_fast.attribute(model, None, ids, target, "gs").scores

    small, large = (
        metrics.sensitivity(model, scores, [(ids, 4)], noise=noise, samples=3, normalize=True)
        for noise in (1e-4, 1e-2)
    )
    assert 0 < small.value < large.value


def test_the_hook_is_gone_after_an_error() -> None:
    model = Bag()

    def fail(model: Any, ids: Any, target: int) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        metrics.sensitivity(model, fail, [([0], 1)])
    assert not model.embed._forward_hooks


def test_active_and_passive() -> None:
    active, passive = (
        ["The", " cat", " ate", " the", " fish"],
        ["The", " fish", " was", " eaten", " by", " the", " cat"],
    )
    pairs = metrics.align_tokens(active, passive)
    assert pairs == [(0, 0), (1, 6), (3, 5), (4, 1)]
    scores, others = [1, 4, 9, 2, 3], [1, 4, 0, 0, 0, 2, 3]
    # Ranks 1 4 2 3 against 1 3 2 4: rho = 1 - 6 * 2 / (4 * 15).
    found = metrics.active_passive([scores], [others], [pairs])
    assert found.value == pytest.approx(0.8)


def test_decoding_stability_by_hand() -> None:
    reference = Measurement.of([1.0, 3.0])
    others = [Measurement.of([1.0, 3.2]), Measurement.of([0.5, 3.0])]
    found = metrics.decoding_stability(reference, others)
    assert found.value == pytest.approx(12.5)
    assert found.per_example == pytest.approx((50.0, 20 / 3))
    assert metrics.decoding_stability(reference, [reference]).value == 0
    assert len(metrics.DECODING_GRID) == 54


def test_window_leakage_is_that_of_windows_and_bounds() -> None:
    model, ids = families.build("llama"), families.prompt_ids("llama", 18)
    cut: Any = {"window": 10, "sink": 1, "tail": 3, "window_weights": "uniform"}
    exact = heat_fast.attribute(model, None, ids, 4, probes=1)
    windowed = heat_fast.attribute(model, None, ids, 4, "win", probes=1, **cut)
    told = metrics.window_leakage([windowed, exact])
    assert told.per_example == (windowed.metadata["windows"]["leakage"], 0.0)
    shift = heat_fast.bounds(model, windowed, exact, sample=1).gate_shift
    assert metrics.window_leakage([windowed], [exact]).value == pytest.approx(float(shift))
    cut = {"window": 10, "sink": 1, "tail": 3, "curvature": "none"}
    alone = heat_fast.attribute(model, None, ids, 4, "win", window_tolerance=0.999999, **cut)
    assert alone.metadata["windows"]["not_swept"]
    with pytest.raises(InputError, match="expected two windows in a row that were swept"):
        metrics.window_leakage([alone])


# --- errors ---------------------------------------------------------------------------------------

GOOD = Case([0, 1], 0, [1, 0])
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "length": (lambda: metrics.soft_ns(Bag(), [Case([0, 1], 0, [1])]), "expected 2, one for each"),
    "nan": (lambda: metrics.soft_nc(Bag(), [Case([0], 0, [math.nan])]), "expected finite"),
    "text": (lambda: metrics.token_f1(["ab"], [[0]]), "expected N numbers"),
    "id": (lambda: metrics.aopc_order(Bag(), [Case([9], 0, [1])]), "not in the vocabulary"),
    "no case": (lambda: metrics.soft_ns(Bag(), []), "at least one"),
    "no Case": (lambda: metrics.soft_ns(Bag(), [[1]]), "expected a Case"),  # type: ignore[list-item]
    "no model": (lambda: metrics.soft_ns(3, [GOOD]), "expected a loaded Hugging Face"),
    "no model to disturb": (
        lambda: metrics.sensitivity(None, lambda *_: [1], [([0], 1)]),
        "expected a loaded Hugging Face",
    ),
    "id of a prompt": (
        lambda: metrics.sensitivity(Bag(), lambda *_: [1], [([9], 1)]),
        "token id 9 of prompt 0 is not in the vocabulary",
    ),
    "batch of ids": (
        lambda: metrics.soft_ns(Bag(), [Case(numpy.array([[0, 1]]), 0, [1, 0])]),
        "token id [0, 1] of case 0",
    ),
    "id of a foil": (
        lambda: metrics.aopc_counterfactual(Bag(), [GOOD], [([0, 9], 1)]),
        "token id 9 of foil 0",
    ),
    "masks": (lambda: metrics.soft_ns(Bag(), [GOOD], masks=0), "masks=0"),
    "seed": (lambda: metrics.soft_ns(Bag(), [GOOD], seed=-1), "seed=-1"),
    "normalize": (lambda: metrics.soft_ns(Bag(), [GOOD], normalize="x"), "'minmax'"),
    "above 1": (
        lambda: metrics.soft_ns(Bag(), [Case([0], 0, [2])], normalize="none"),
        "scores from 0 to 1",
    ),
    "negative": (
        lambda: metrics.soft_ns(Bag(), [Case([0], 0, [-1])], normalize="sum"),
        "a positive mass",
    ),
    "one token": (lambda: metrics.comprehensiveness(Bag(), [Case([0], 0, [1])]), "at least two"),
    "fraction": (lambda: metrics.sufficiency(Bag(), [GOOD], fraction=0), "fraction=0"),
    "fractions": (lambda: metrics.aopc_fractions(Bag(), [GOOD], fractions=()), "no fraction"),
    "keep_first": (lambda: metrics.aopc_order(Bag(), [GOOD], keep_first=2), "Lower it"),
    "masking": (lambda: metrics.aopc_order(Bag(), [GOOD], masking="x"), "'sentinel'"),
    "foils": (lambda: metrics.aopc_counterfactual(Bag(), [GOOD], []), "one foil for each"),
    "foil": (lambda: metrics.aopc_counterfactual(Bag(), [GOOD], [([0], 1)]), "expected as many"),
    "ratio": (
        lambda: metrics.log_ratio(Measurement.of([1]), Measurement.of([1, 2])),
        "the same ones",
    ),
    "ratio of 0": (
        lambda: metrics.log_ratio(Measurement.of([0]), Measurement.of([0])),
        "both means are 0",
    ),
    "no evidence": (lambda: metrics.token_f1([[1, 2]], [[]]), "evidence of example 0 is empty"),
    "outside": (lambda: metrics.token_f1([[1, 2]], [[2]]), "indices from 0 to 1"),
    "pairs": (lambda: metrics.token_f1([[1, 2]], []), "one entry for each example"),
    "k": (lambda: metrics.token_f1([[1, 2]], [[0]], k=0), "k=0"),
    "span": (lambda: metrics.span_scores([[1, 2]], [[(1, 1)]]), "half-open"),
    "dsa below 0": (lambda: metrics.dsa([[1, -2]], [[1]], [[0]], [[1]]), "none below 0"),
    "dsa of 0": (lambda: metrics.dsa([[0, 0]], [[1]], [[0]], [[1]]), "some mass"),
    "segments": (lambda: metrics.dsa([[1, 2]], [[1]], [[0, 1]], [[1]]), "two separate ones"),
    "dsa outside": (lambda: metrics.dsa([[1, 2, 3]], [[2]], [[0]], [[1]]), "a part of it"),
    "samples": (
        lambda: metrics.sensitivity(Bag(), lambda *_: [1], [([0], 1)], samples=1),
        "samples=1",
    ),
    "noise": (lambda: metrics.sensitivity(Bag(), lambda *_: [1], [([0], 1)], noise=0), "noise=0"),
    "method": (lambda: metrics.sensitivity(Bag(), lambda *_: [1, 2], [([0], 1)]), "expected 1"),
    "no mass": (
        lambda: metrics.sensitivity(Bag(), lambda *_: [0], [([0], 1)], normalize=True),
        "some mass",
    ),
    "one pair": (lambda: metrics.active_passive([[1]], [[1]], [[(0, 0)]]), "at least two"),
    "twice": (
        lambda: metrics.active_passive([[1, 2]], [[1, 2]], [[(0, 0), (1, 0)]]),
        "each token once",
    ),
    "equal": (
        lambda: metrics.active_passive([[1, 1]], [[1, 2]], [[(0, 0), (1, 1)]]),
        "can be ranked",
    ),
    "settings": (lambda: metrics.decoding_stability(Measurement.of([1]), []), "at least one"),
    "reference": (
        lambda: metrics.decoding_stability(Measurement.of([0]), [Measurement.of([1])]),
        "to divide by",
    ),
    "no result": (lambda: metrics.window_leakage([]), "no result"),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_errors_say_what_was_wrong_and_what_to_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=r"expected .+\. [A-Z]") as caught:
        call()
    assert message in str(caught.value)


def test_a_prompt_that_does_nothing() -> None:
    model = Bag()
    nn.init.zeros_(model.embed.weight)
    with pytest.raises(NumericalError, match="expected a difference"):
        metrics.soft_ns(model, [GOOD])


def test_contexts_of_several_lengths_have_their_own_long_rope_tables() -> None:
    model = families.build("phi3_longrope_long")  # other factors beyond 4 tokens
    ids = families.prompt_ids("phi3_longrope_long", 6)
    embeddings = model.get_input_embeddings()(torch.tensor(ids))
    contexts = [embeddings, embeddings[:3]]
    with torch.no_grad():
        together = padded_log_probs(model, contexts, 1)
        alone = [log_probs(model, each, 1) for each in contexts]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_targets_beyond_a_smaller_head_are_refused() -> None:
    model, ids = families.build("llama"), families.prompt_ids("llama", 6)
    head: Any = model.get_output_embeddings()
    smaller = torch.nn.Linear(head.in_features, head.out_features - 3, bias=False)
    model.set_output_embeddings(smaller)
    case = Case(ids, head.out_features - 1, [0.1] * 6)
    with pytest.raises(InputError, match="of case 0's target is not in the vocabulary"):
        metrics.comprehensiveness(model, [case])

"""Other attribution methods: cases worked by hand, every family, and other packages' results."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import heat_fast
from assertions import assert_close
from families import FAMILIES, build, prompt_ids
from heat_fast import ConfigError, InputError, MissingPackageError, baselines
from heat_fast.baselines import perturbation
from heat_fast.baselines.case import Case
from heat_fast.forward import log_probs
from heat_fast.planner import Budget
from heat_fast.prompt import encode_prompt

QUICK: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 3},
    "context_cite": {"ablations": 5},
    "progressive_inference": {"passes": 3, "mode": "masked"},
    "reagent": {"steps": 3},
    "causal_tracing": {"samples": 1},
    "faml": {"steps": 3},
    "sea_cot": {"chains": 4, "length": 24},
}
TARGETS = [5, 9, 4]


def quick(name: str, **settings: Any) -> baselines.Baseline:
    if name == "context_cite":
        pytest.importorskip("sklearn")
    return baselines.get(name, **{**QUICK.get(name, {}), **settings})


def linear_case(values: Tensor, slopes: Tensor, rows: int = 4) -> Case:
    """A model whose log-odds of token 0 against token 1 are `sum_i slopes_i . X_i`."""

    class Linear:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

        def get_output_embeddings(self) -> Any:
            return SimpleNamespace(out_features=2)

        def get_input_embeddings(self) -> Any:
            return SimpleNamespace(weight=torch.empty(2, 0))

        def __call__(self, inputs_embeds: Tensor, **_: Any) -> Any:
            log_p = (inputs_embeds * slopes).sum((-1, -2))
            # log(1 - p) beside log p, so that the log-probability itself is linear.
            both = torch.stack((log_p, torch.log(-torch.expm1(log_p))), -1)
            return SimpleNamespace(logits=both[:, None])

    encoded = encode_prompt([3] * len(values), None, 10)
    return Case(Linear(), None, encoded, (0,), values, Budget(rows))


def test_first_order_methods_of_a_linear_model_are_its_terms() -> None:
    values = torch.rand(5, 3, dtype=torch.float64)
    slopes = -torch.rand(5, 3, dtype=torch.float64)
    terms = (values * slopes).sum(-1)[None]
    case = linear_case(values, slopes)
    assert_close("terms", terms, baselines.InputXGradient().scores(case), rtol=1e-12)
    norms = slopes.norm(dim=-1)[None]
    assert_close("norms", norms, baselines.TokenGradients().scores(case), rtol=1e-12)
    # Of a linear function the integral is exact with any number of points.
    found = baselines.IntegratedGradients(steps=2).scores(case)
    assert_close("path", terms, found, rtol=1e-12)
    assert abs(case.notes["completeness_gap"][0]) < 1e-8


def test_integrated_gradients_are_complete_for_every_target() -> None:
    model, ids = build("llama", torch.float64), prompt_ids("llama", 7)
    gaps = []
    # From zero the norms make g change all at once; see the class.
    for steps in (8, 32, 128):
        method = baselines.IntegratedGradients(steps=steps, baseline="mean")
        result = method(model, None, ids, TARGETS)
        gaps.append(max(map(abs, result.metadata["completeness_gap"])))
    whole = model.get_input_embeddings()(torch.tensor([*ids, *TARGETS[:-1]])).detach()
    mean = model.get_input_embeddings().weight.detach().mean(0)
    empty = torch.cat((mean.expand(7, -1), whole[7:]))
    with torch.no_grad():
        ends = [log_probs(model, each, 3)[range(3), TARGETS] for each in (whole, empty)]
    assert gaps[-1] < 1e-4 < gaps[1] < gaps[0], gaps
    total = result.target_scores.double().sum(-1)
    assert_close("completeness", ends[0] - ends[1], total, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_rollout_is_the_product_of_the_attention_matrices(name: str) -> None:
    model, ids = build(name, torch.float64), prompt_ids(name, 8)
    result = baselines.AttentionRollout()(model, None, ids, TARGETS)
    with torch.no_grad():
        output = model(torch.tensor([[*ids, *TARGETS[:-1]]]), output_attentions=True)
    product = torch.eye(10, dtype=torch.float64)
    for attention in output.attentions:
        product = (torch.eye(10) + attention[0].mean(0)) / 2 @ product
    # Hugging Face takes the softmax in float32.
    assert_close("rollout", product[7:, :8], result.target_scores, rtol=1e-5)
    assert_close("row", 1.0, result.target_scores[0].sum(), rtol=1e-5)


def test_deleting_tokens_is_running_the_shorter_prompt() -> None:
    for name in ("llama", "gpt2", "opt", "gemma2"):
        model, ids = build(name, torch.float64), prompt_ids(name, 9)
        subsets = [[0, 3, 8], [8], list(range(9)), [1, 2, 4, 5, 8]]
        with torch.no_grad():
            case = Case.read(model, None, ids, TARGETS)
            case.budget = Budget(22)  # two sequences at a time
            found = case.pick(case.subsets(subsets))
            for row, subset in enumerate(subsets):
                shorter = torch.tensor([[*(ids[index] for index in subset), *TARGETS[:-1]]])
                logits = model(shorter).logits[0, -3:].log_softmax(-1)
                assert_close(name, logits[range(3), TARGETS], found[row], rtol=1e-5)


def test_context_cite_recovers_a_sparse_linear_function(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    truth = torch.zeros(30, dtype=torch.float64)
    truth[[2, 11, 20]] = torch.tensor([2.0, -1.5, 1.0], dtype=torch.float64)

    def subsets(_: Case, kept: list[list[int]]) -> Tensor:
        log_odds = torch.tensor([float(truth[each].sum()) for each in kept]) - 0.3
        pair = torch.stack((log_odds, -log_odds)).sigmoid().log()
        return pair.T[:, None]

    monkeypatch.setattr(Case, "subsets", subsets)
    case = linear_case(torch.zeros(30, 2), torch.zeros(30, 2))
    found = baselines.ContextCite(alpha=1e-3).scores(case)[0]
    assert_close("surrogate", truth, found, rtol=0.03)
    # The penalty of the paper shrinks the weights, and keeps their order and their zeros.
    default = baselines.ContextCite().scores(case)[0]
    assert default.argsort(descending=True)[:2].tolist() == [2, 20]
    assert int(default.argmin()) == 11
    assert float(default[-1]) == 0


@pytest.mark.parametrize("raised", [0.0, 17.0, 35.0])
def test_odds_of_certain_predictions_keep_their_digits(raised: float) -> None:
    """Raising the target alone moves every logit p by as much: the weights stay."""
    pytest.importorskip("sklearn")
    model, ids = build("llama_bias"), prompt_ids("llama_bias", 10)
    head: Any = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    state = np.random.get_state()[1].copy()
    expected = quick("context_cite")(model, None, ids, [9]).scores
    with torch.no_grad():
        head.bias[9] = raised
    found = quick("context_cite")(model, None, ids, [9]).scores
    assert expected.any()
    assert_close("scores", expected, found, rtol=1e-3)
    assert (np.random.get_state()[1] == state).all()


def test_context_cite_fits_as_its_authors_do() -> None:
    pytest.importorskip("sklearn")
    solver = pytest.importorskip("context_cite.solver")
    masks = torch.rand(64, 9) < 0.5
    outputs = torch.randn(64, dtype=torch.float64)
    theirs, _ = solver.LassoRegression(0.01).fit(masks.numpy(), outputs.numpy(), 1)
    ours = perturbation._lasso()(masks.double(), outputs, 0.01)
    assert_close("weights", theirs, ours, rtol=1e-6)


def test_gradients_agree_with_captum() -> None:
    attr = pytest.importorskip("captum.attr")
    model, ids = build("llama", torch.float64), prompt_ids("llama", 7)
    x = model.get_input_embeddings()(torch.tensor([ids])).detach()

    def log_p(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings).logits[:, -1].log_softmax(-1)[:, 5]

    expected = attr.IntegratedGradients(log_p).attribute(x, n_steps=50).sum(-1)
    found = baselines.IntegratedGradients()(model, None, ids, 5)
    assert_close("integrated gradients", expected, found.target_scores, rtol=1e-5)
    expected = attr.InputXGradient(log_p).attribute(x.clone().requires_grad_()).sum(-1)
    found = baselines.InputXGradient()(model, None, ids, 5)
    assert_close("input x gradient", expected, found.target_scores, rtol=1e-5)


def test_prefix_and_suffix_methods_telescope() -> None:
    model, ids = build("gpt2", torch.float64), prompt_ids("gpt2", 8)
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0].softmax(-1)
        last = model(torch.tensor([ids[-1:]])).logits[0, -1].softmax(-1)
    reached = p[:, 5] - p[:, 7]
    found = baselines.get("tdd", direction="forward", alternative=7)(model, None, ids, 5)
    expected = torch.diff(reached, prepend=torch.zeros(1))
    assert_close("forward", expected[None], found.target_scores, rtol=1e-5)
    back = baselines.get("tdd", direction="backward", alternative=7)(model, None, ids, 5)
    assert_close("backward", reached[-1], back.target_scores.sum(), rtol=1e-5, atol=1e-7)
    assert_close("last", last[5] - last[7], back.target_scores[0, -1], rtol=1e-5, atol=1e-7)
    both = baselines.get("tdd", alternative=7)(model, None, ids, 5)
    total = found.target_scores + back.target_scores
    assert_close("both", total, both.target_scores, rtol=1e-5)
    found = baselines.ProgressiveInference()(model, None, ids, 5)
    vocabulary = p.shape[-1]
    assert_close("single", p[-1, 5] - 1 / vocabulary, found.target_scores.sum(), rtol=1e-4)


def test_masked_passes_recover_an_additive_game(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(6, 1, dtype=torch.float64)

    def prefixes(_: Case, embeddings: Tensor, ids: Any) -> Tensor:
        return (0.5 + 0.05 * embeddings.cumsum(1)).log()  # 1 / V = 0.5 with nothing read

    monkeypatch.setattr(Case, "prefixes", prefixes)
    case = linear_case(values, -torch.ones(6, 1, dtype=torch.float64))
    found = baselines.ProgressiveInference(mode="masked", passes=20).scores(case)
    assert_close("Shapley values", 0.05 * values.T, found, rtol=1e-6)


def test_peering_is_the_cosine_at_a_layer() -> None:
    model, ids = build("llama", torch.float64), prompt_ids("llama", 8)
    result = baselines.Peering(layer=2)(model, None, ids, TARGETS)
    with torch.no_grad():
        output = model(torch.tensor([[*ids, *TARGETS]]), output_hidden_states=True)
    states = output.hidden_states[2][0]
    expected = torch.cosine_similarity(states[8:, None], states[None, :8], dim=-1)
    assert_close("cosine", expected, result.target_scores, rtol=1e-5)


def test_causal_tracing_restores_one_state() -> None:
    model, ids = build("llama", torch.float64), prompt_ids("llama", 6)
    with torch.no_grad():
        case = Case.read(model, None, ids, TARGETS)
        other = case.embeddings + torch.randn_like(case.embeddings)
        streams, last = case.streams(other)
        assert_close("run", log_probs(model, other, 3), last[0], rtol=1e-6)
        found = case.patched(0, streams[0], case.embeddings)
        for token in range(6):
            mixed = other.clone()
            mixed[token] = case.embeddings[token]
            expected = log_probs(model, mixed, 3)[range(3), TARGETS]
            assert_close("restored", expected, found[token], rtol=1e-6)
        deeper = case.patched(2, streams[2], streams[2])
        assert_close("same", case.pick(last).expand(6, -1), deeper, rtol=1e-9)
    # Without noise worth the name nothing is left to restore.
    result = baselines.CausalTracing(noise=1e-9)(model, None, ids, TARGETS)
    assert float(result.scores.abs().max()) < 1e-7


def test_leave_one_out_is_the_information_component() -> None:
    model, ids = build("qwen2"), prompt_ids("qwen2", 8)
    result = baselines.LeaveOneOut()(model, None, ids, TARGETS)
    expected = heat_fast.attribute(model, None, ids, TARGETS, curvature="none")
    assert_close("information", expected.information, result.target_scores, rtol=1e-6)
    assert result.metadata["measured"] == ("information", "log_prob_drop", "target_scores")


def test_the_first_step_of_a_mask_goes_where_both_aims_point() -> None:
    """Of `log P = -3 m_0 + m_1` and its complement: m_0 down, m_1 up, by one step of Adam each."""
    values = torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    slopes = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    method = baselines.get("faml", steps=1, rate=0.3)
    found = method.scores(linear_case(values, slopes))
    expected = torch.sigmoid(torch.tensor([[-0.3, 0.3]], dtype=torch.float64))
    assert_close("mask", expected, found, rtol=1e-6)


def test_a_mask_is_learned_where_the_probability_rounds_to_one() -> None:
    """Of log-odds `30 + m_1 - 2 m_2`: keeping has next to no gradient, breaking its full one."""
    values = torch.tensor([[60.0], [1.0], [2.0]])
    slopes = torch.tensor([[1.0], [1.0], [-1.0]])
    case = linear_case(values, slopes)

    class Certain(type(case.model)):
        def __call__(self, inputs_embeds: Tensor, **_: Any) -> Any:
            odds = (inputs_embeds * slopes).sum((-1, -2))
            return SimpleNamespace(logits=torch.stack((odds, torch.zeros_like(odds)), -1)[:, None])

    case.model = Certain()
    assert float(case.log_probs()[0, 0, 0]) == 0.0
    found = baselines.get("faml", steps=1, rate=0.3, sparsity=1e-6).scores(case)
    expected = torch.sigmoid(torch.tensor([[0.3, 0.3, -0.3]]))
    assert_close("mask", expected, found, rtol=1e-5)


def test_logits_bound_how_many_masks_are_learned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama", torch.float64), prompt_ids("llama", 8)
    sizes: list[int] = []
    forward = Case.forward

    def counted(self: Case, embeddings: Tensor, kept: int) -> Tensor:
        sizes.append(len(embeddings))
        return forward(self, embeddings, kept)

    monkeypatch.setattr(Case, "forward", counted)
    together = quick("faml")(model, None, ids, TARGETS)
    assert max(sizes) == 2 * len(TARGETS)
    sizes.clear()
    # Room for the logits of one mask and its complement, at all targets.
    logits = 2 * len(TARGETS) * model.get_output_embeddings().out_features
    monkeypatch.setattr("heat_fast.planner.FORWARD_LOGITS", logits)
    apart = quick("faml")(model, None, ids, TARGETS)
    assert max(sizes) == 2
    assert_close("scores", together.target_scores, apart.target_scores, rtol=1e-9)


def test_chains_weigh_by_entailment_and_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama", torch.float64), [5, 6, 7, 5]
    chains = [[5, 5, 9], [7, 6, 8], [11, 12, 13]]
    method = baselines.get("sea_cot", chains=3, length=3)
    monkeypatch.setattr(type(method), "_sample", lambda *_: chains)
    found = method(model, None, ids, [4, 9])
    weights = []
    for chain, overlap in zip(chains, (1 / 3, 2 / 3, 0.0), strict=True):
        context = model.get_input_embeddings()(torch.tensor([*chain, *ids, 4]))
        after = log_probs(model, context, 2).exp()
        weights.append(torch.stack((after[0, 4], after[1, 9])) * overlap)
    first, second = weights[0] / (weights[0] + weights[1]), weights[1] / (weights[0] + weights[1])
    expected = torch.stack((first, second, second, first), -1)
    assert_close("scores", expected, found.target_scores, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_serves_every_family_and_leaves_the_model(family: str) -> None:
    model, ids = build(family), prompt_ids(family, 8)
    model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    trained = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    for name in baselines.names():
        if name == "context_cite":
            try:
                import sklearn  # noqa: F401
            except ImportError:
                continue
        result = quick(name)(model, None, ids, TARGETS[:2])
        assert result.target_scores.shape == (2, 8), name
        assert result.scores.shape == (8,), name
        assert result.metadata["config"]["variant"] == name
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("name", baselines.names())
def test_batches_do_not_matter_and_seeds_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), prompt_ids("llama", 8)
    result = quick(name)(model, None, ids, TARGETS)
    monkeypatch.setattr("heat_fast.baselines.case.forward_rows", lambda *_: 1)
    again = quick(name)(model, None, ids, TARGETS)
    assert_close(name, result.target_scores, again.target_scores, rtol=1e-3, atol=1e-6)
    other = quick(name, seed=1)(model, None, ids, TARGETS)
    drawn = name in (
        *("random", "context_cite", "progressive_inference", "reagent", "causal_tracing"),
        "sea_cot",
    )
    assert torch.allclose(again.target_scores, other.target_scores) is not drawn


def test_a_result_can_be_read_saved_and_reported(demo: Any, tmp_path: Any) -> None:
    case = demo.examples[0]
    result = baselines.attribute(demo.model, demo.tokenizer, case.prompt, method="input_x_gradient")
    assert float(result.scores.min()) < 0 < float(result.scores.max())
    result.save(tmp_path / "result.safetensors")
    loaded = heat_fast.load(tmp_path / "result.safetensors")
    assert torch.equal(loaded.scores, result.scores)
    assert loaded.metadata["measured"] == ("target_scores",)
    result.to_html(tmp_path / "result.html")
    assert result.span(tokens=(0, 3)).score == pytest.approx(float(result.scores[:3].sum()))
    assert "input_x_gradient" in repr(result)


def test_half_precision_is_served() -> None:
    model = build("llama", torch.bfloat16)
    for name in baselines.names():
        if name != "context_cite":
            result = quick(name)(model, None, prompt_ids("llama", 8))
            assert result.target_scores.shape == (1, 8), name
            assert result.metadata["dtype"] == "bfloat16"


def test_sentences_are_sources(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentencex")
    seen = []

    def fit(kept: Tensor, outputs: Tensor, alpha: float) -> Tensor:
        seen.append(torch.arange(1.0, kept.shape[1] + 1))
        return seen[-1]

    monkeypatch.setattr(perturbation, "_lasso", lambda: fit)
    method = baselines.ContextCite(sources="sentence", ablations=4)
    result = method(demo.model, demo.tokenizer, demo.examples[0].prompt)
    sums = [each.score for each in result.by_sentence() if each.score]
    assert_close("sums", seen[0], sums, rtol=1e-5)
    assert float(result.scores[-1]) == 0


def test_reagent_finds_the_token_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    values, slopes = torch.full((5, 1), 0.1).double(), torch.zeros(5, 1).double()
    slopes[2] = -1  # log p = -0.1, and -5 with token 2 replaced
    case = linear_case(values, slopes)
    embed = torch.nn.Embedding.from_pretrained(torch.full((2, 1), 5.0, dtype=torch.float64))
    monkeypatch.setattr(type(case.model), "get_input_embeddings", lambda _: embed)
    monkeypatch.setattr(
        perturbation, "_draw", lambda _, steps, generator: torch.zeros(steps, 5, dtype=torch.long)
    )
    found = baselines.ReAGent(steps=1, share=0.2, seed=0).scores(case)
    assert_close("sum", 1.0, found.sum(), rtol=1e-12)
    many = baselines.ReAGent(steps=40).scores(case)[0]
    assert int(many.argmax()) == 2
    # One step in which token 2 alone is replaced, by hand.
    drop = math.exp(-0.1) - math.exp(-5.0)
    update = math.log((1 + drop) / (1 - drop))
    expected = math.exp(update) / (math.exp(update) + 4 * math.exp(-update))
    hits = [baselines.ReAGent(steps=1, share=0.2, seed=seed).scores(case) for seed in range(20)]
    assert_close("score", expected, max(float(each.max()) for each in hits), rtol=1e-9)


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown baseline 'gradient'.*expected one of"):
        baselines.get("gradient")
    with pytest.raises(ConfigError) as caught:
        baselines.get("xyz")
    assert str(caught.value).count("random") == 1
    assert str(caught.value).endswith("Choose one of them.")
    with pytest.raises(ConfigError, match=r"unknown setting 'step'.*steps"):
        baselines.get("integrated_gradients", step=3)
    with pytest.raises(ConfigError, match=r"steps=0.*at least 1"):
        baselines.get("integrated_gradients", steps=0)
    with pytest.raises(ConfigError, match=r"direction='up'.*'forward'"):
        baselines.get("tdd", direction="up")
    with pytest.raises(ConfigError, match=r"share=2 .* above 0 and at most 1\. Choose, say, 0\.3"):
        baselines.get("reagent", share=2)
    for noise in ("a", 0, math.inf, math.nan, 10**400):
        with pytest.raises(ConfigError, match=r"noise=.*above 0"):
            baselines.get("causal_tracing", noise=noise)
    for seed in ("x", 1.5, None, True, -1, 2**63):
        with pytest.raises(ConfigError, match=r"seed=.*: expected an integer, at least 0"):
            baselines.get("random", seed=seed)
    model = build("llama")
    with pytest.raises(ConfigError, match=r"layer=9 of a model of 3 blocks"):
        baselines.Peering(layer=9)(model, None, [3, 4])
    with pytest.raises(ConfigError, match=r"alternative=83 is outside"):
        baselines.get("tdd", alternative=83)(model, None, [3, 4])
    with pytest.raises(InputError, match="the prompt is empty"):
        baselines.Random()(model, None, [])
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(MissingPackageError, match=r"heat-fast\[evaluation\]"):
        baselines.ContextCite()(model, None, [3, 4, 5])


@pytest.mark.parametrize("name", ["random", "integrated_gradients", "sea_cot", "leave_one_out"])
def test_numpys_numbers_are_numbers(name: str) -> None:
    """They are kept as Python's, so that the result can be written."""
    given: dict[str, Any] = {"seed": np.int64(3)}
    given |= {
        "integrated_gradients": {"steps": np.int64(2)},
        "sea_cot": {"chains": np.int32(1)},
    }.get(name, {})
    method = baselines.get(name, **given)
    assert method == baselines.get(name, **{key: int(value) for key, value in given.items()})
    assert all(type(getattr(method, key)) is int for key in given)
    json.dumps(method(build("llama"), None, [3, 4], [5]).metadata)

"""The oracle itself: `heat_fast.reference` against Hugging Face, finite differences and hand-made
formulas, without any help from the fast path.

Tolerances. "exact": float64 against float64 through another order of operations, 1e-10 of the
largest entry. "float32": a model run natively in float32 (unit roundoff 6e-8, three blocks, inner
sums of about 60 terms) against the float64 copy, 1e-4. Finite differences: central, step 1e-6, so
truncation is about 1e-12 and roundoff about 1e-16 / 1e-6 times third derivatives of up to 1e4.
"""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import families
import heat_fast.reference as reference_module
from assertions import assert_close
from heat_fast.errors import ConfigError, HeatError, InputError
from heat_fast.reference import Reference, attribute

LENGTH = 7
TARGET = 11
EXACT = 1e-10
FLOAT32 = 1e-4

#: Families whose attention gives a share to no token.
SINKS = ("gpt_oss",)
every_family = pytest.mark.parametrize("name", families.FAMILIES)


def signs(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def setup(name: str, length: int = LENGTH) -> tuple[Any, list[int], Reference, Tensor]:
    model = families.build(name)
    ids = families.prompt_ids(name, length)
    reference = Reference(model)
    return model, ids, reference, reference.embed(ids)


@every_family
def test_forward_agrees_with_the_model_given_token_ids(name: str) -> None:
    model, ids, reference, embeddings = setup(name)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        actual = reference.log_distribution(embeddings)
    assert actual.dtype == torch.float64
    assert_close(f"{name} log P", expected, actual, rtol=FLOAT32)


@every_family
def test_attentions_are_the_models_own(name: str) -> None:
    model, ids, reference, embeddings = setup(name)
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_attentions=True)
    expected = torch.stack([layer[0] for layer in output.attentions])
    weights, _ = reference.attentions_and_values(embeddings)
    assert_close(f"{name} attentions", expected, weights, rtol=FLOAT32)
    rows = weights.sum(-1)
    if name in SINKS:
        assert float(rows.min()) > 0 and float(rows.max()) < 1
    else:
        assert_close(f"{name} row sums", torch.ones(rows.shape), rows, rtol=EXACT)
    assert float(weights.triu(1).abs().max()) == 0.0


@every_family
def test_values_and_output_projections_rebuild_the_attention_output(name: str) -> None:
    """sum_h A_h V_h W_O,h + bias is what the attention module returns (before any second norm)."""
    _, _, reference, embeddings = setup(name)
    seen: list[tuple[Tensor, Tensor | None]] = []
    for module in reference.model.modules():
        for child_name, child in module.named_children():
            inside = "Attention" in type(module).__name__
            if inside and child_name in ("o_proj", "out_proj", "dense", "c_proj"):
                child.register_forward_hook(
                    lambda child, _, output: seen.append((output[0].detach(), child.bias))
                )
    weights, values = reference.attentions_and_values(embeddings)
    assert len(seen) == len(values) == len(weights) == 3
    for layer, projection in enumerate(reference.output_projections()):
        heads, _, size = values[layer].shape
        blocks = projection.reshape(heads, size, -1)
        rebuilt = torch.einsum("hij,hjs,hsd->id", weights[layer], values[layer], blocks)
        output, bias = seen[layer]
        rebuilt = rebuilt if bias is None else rebuilt + bias
        assert_close(f"{name} layer {layer}", output, rebuilt, rtol=EXACT)


@every_family
@pytest.mark.parametrize("rollout", ["value_path", "input_path"])
def test_gate_is_a_simplex_and_flow_is_conserved(name: str, rollout: str) -> None:
    _, _, reference, embeddings = setup(name)
    gate = reference.gate(embeddings, rollout)
    assert float(gate.min()) >= 0
    assert_close(f"{name} gate sum", 1.0, gate.sum(), rtol=EXACT)
    # Each factor of either product has rows that sum to one, so every head's flow does too.
    flow = reference.rollout(embeddings, rollout)
    if name in SINKS:
        assert float(flow.sum(-1).max()) < 1
    else:
        assert_close(f"{name} flow", torch.ones(flow.shape[:2]), flow.sum(-1), rtol=EXACT)


def test_value_path_equals_one_vector_walked_down_the_layers() -> None:
    _, _, reference, embeddings = setup("llama")
    weights, _ = reference.attentions_and_values(embeddings)
    walker = torch.zeros(LENGTH, dtype=torch.float64)
    walker[-1] = 1.0
    expected = torch.empty(weights.shape[:3], dtype=torch.float64)
    for layer in reversed(range(len(weights))):
        expected[layer] = torch.einsum("i,hij->hj", walker, weights[layer])
        walker = (walker + walker @ weights[layer].mean(0)) / 2
    assert_close("value path", expected, reference.rollout(embeddings), rtol=EXACT)
    mass = (expected * reference.value_norms(embeddings)).sum((0, 1))
    assert_close("gate", mass / mass.sum(), reference.gate(embeddings), rtol=EXACT)


def test_input_path_follows_one_head_through_the_layers() -> None:
    _, _, reference, embeddings = setup("gpt2")
    weights, _ = reference.attentions_and_values(embeddings)
    state = torch.zeros(weights.shape[1], LENGTH, LENGTH, dtype=torch.float64)
    state += torch.eye(LENGTH, dtype=torch.float64)
    expected = []
    for layer in weights:
        state = (state + layer @ state) / 2
        expected.append(state[:, -1])
    actual = reference.rollout(embeddings, "input_path")
    assert_close("input path", torch.stack(expected), actual, rtol=EXACT)


@every_family
def test_gradient_and_hessian_against_finite_differences(name: str) -> None:
    """Also shows that nothing is rounded to float32: roundoff would then be 1e-7 / 1e-6."""
    _, _, reference, embeddings = setup(name)
    direction = signs(*embeddings.shape)
    step = 1e-6 * direction
    with torch.no_grad():
        up = reference.log_distribution(embeddings + step)[TARGET]
        down = reference.log_distribution(embeddings - step)[TARGET]
    gradient = reference.gradient(embeddings, TARGET)
    slope = (gradient * direction).sum()
    scale = float(gradient.abs().sum())
    assert_close(f"{name} slope", (up - down) / 2e-6, slope, rtol=0.0, atol=1e-6 * scale)

    change = reference.gradient(embeddings + step, TARGET)
    change = change - reference.gradient(embeddings - step, TARGET)
    product = reference.hessian_operator(embeddings, TARGET)(direction)
    assert_close(f"{name} H v", change / 2e-6, product, rtol=1e-6)


def test_hessian_is_symmetric_and_agrees_with_autograd() -> None:
    _, _, reference, embeddings = setup("qwen2", length=3)
    hessian = reference.hessian(embeddings, TARGET)
    size = embeddings.numel()
    expected = torch.autograd.functional.hessian(
        lambda point: reference.log_distribution(point)[TARGET], embeddings
    )
    assert_close("Hessian", expected.reshape(size, size), hessian, rtol=EXACT)
    assert_close("symmetry", hessian.T, hessian, rtol=EXACT)


@pytest.mark.parametrize("name", ["llama", "gptj", "gemma2"])
def test_block_and_row_curvature_from_the_explicit_hessian(name: str) -> None:
    _, _, reference, embeddings = setup(name, length=4)
    length, width = embeddings.shape
    hessian = reference.hessian(embeddings, TARGET)
    blocks = hessian.view(length, width, length, width)
    probes = signs(5, length, width)
    for kind_count in (length, 2):
        diagonal = torch.stack([blocks[i, :, i] for i in range(kind_count)])
        expected = torch.einsum("ide,kie->kid", diagonal, probes[:, :kind_count])
        actual = reference.curvature(embeddings, TARGET, kind_count, probes)
        assert_close(f"{name} block", expected.abs().sum(-1).mean(0), actual, rtol=EXACT)
    dense = (probes.flatten(1) @ hessian).view(5, length, width).abs().sum(-1).mean(0)
    actual = reference.curvature(embeddings, TARGET, length, probes, estimator="row")
    assert_close(f"{name} row", dense, actual, rtol=EXACT)
    mass = torch.stack([blocks[i].abs().sum() for i in range(length)])
    assert_close(f"{name} row mass", mass, reference.row_mass(embeddings, TARGET), rtol=EXACT)


@pytest.mark.parametrize("name", ["llama_bias", "gpt_neo"])
def test_gauss_newton_is_minus_the_hessian_of_the_divergence(name: str) -> None:
    """KL(P(X) || P(Y)) has Hessian J'(diag p - p p')J in Y at Y = X."""
    _, _, reference, embeddings = setup(name, length=3)
    length, width = embeddings.shape
    with torch.no_grad():
        log_p = reference.log_distribution(embeddings)

    def divergence(point: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - reference.log_distribution(point))).sum()

    size = embeddings.numel()
    expected = -torch.autograd.functional.hessian(divergence, embeddings).reshape(size, size)
    multiply = reference.gauss_newton_operator(embeddings)
    basis = torch.eye(size, dtype=torch.float64)
    columns = [multiply(unit.view(length, width)).flatten() for unit in basis]
    assert_close(f"{name} matrix", expected, torch.stack(columns, dim=1), rtol=EXACT)
    probes = signs(2, length, width)
    blocks = expected.view(length, width, length, width)
    diagonal = torch.stack([blocks[i, :, i] for i in range(length)])
    reading = torch.einsum("ide,kie->kid", diagonal, probes).abs().sum(-1).mean(0)
    actual = reference.curvature(embeddings, TARGET, length, probes, kind="gauss_newton")
    assert_close(f"{name} S", reading, actual, rtol=EXACT)


@pytest.mark.parametrize(
    ("name", "masking"),
    [(name, "zero") for name in families.FAMILIES]
    + [("gpt2", "mean"), ("gemma3_text", "mean"), ("llama", "sentinel"), ("opt", "sentinel")],
)
def test_information_against_masked_forwards_of_the_model(name: str, masking: str) -> None:
    """One embedding replaced, one full native forward, the sum of p log(p / q) term by term."""
    model, ids, _, _ = setup(name)
    table = model.get_input_embeddings()
    vocabulary = table.weight.shape[0]
    with torch.no_grad():
        embeddings = table(torch.tensor([ids]))
        stand_in = {
            "zero": torch.zeros(embeddings.shape[-1]),
            "mean": table(torch.arange(vocabulary)).mean(0),
            "sentinel": table(torch.tensor(5)),
        }[masking]
        p = model(inputs_embeds=embeddings).logits[0, -1].double().softmax(-1).tolist()
        divergences, drops = [], []
        for token in range(LENGTH):
            masked = embeddings.clone()
            masked[0, token] = stand_in
            q = model(inputs_embeds=masked).logits[0, -1].double().softmax(-1).tolist()
            divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            drops.append(math.log(p[TARGET] / q[TARGET]))
    sentinel = 5 if masking == "sentinel" else None
    result = attribute(
        model, ids, [TARGET], curvature="none", masking=masking, sentinel_token=sentinel
    )
    assert float(result.information.min()) >= 0
    assert_close(f"{name} KL", [divergences], result.information, rtol=FLOAT32)
    assert_close(f"{name} drop", [drops], result.log_prob_drop, rtol=FLOAT32)
    assert_close(f"{name} log p", [math.log(p[TARGET])], result.target_log_probs, rtol=FLOAT32)


def test_scores_combine_the_components_as_in_the_paper() -> None:
    model, ids, reference, embeddings = setup("gpt_neox")
    probes = signs(2, *embeddings.shape)
    options: dict[str, Any] = {"alpha": 0.2, "beta": 0.3, "gamma": 0.7}
    result = attribute(model, ids, [TARGET], probes, **options)
    gradient = reference.gradient(embeddings, TARGET)
    assert_close("gradient norm", gradient.abs().sum(-1), result.gradient_norm[0], rtol=EXACT)
    bracket = 0.2 * result.gradient_norm + 0.3 * result.curvature + 0.7 * result.information
    assert_close("score", result.gate * bracket, result.target_scores, rtol=EXACT)
    bracket = 0.3 * result.curvature + 0.7 * result.log_prob_drop.clamp_min(0)
    assert_close("envelope", result.gate * bracket, result.envelope, rtol=EXACT)
    assert bool((result.log_prob_drop < 0).any()), "the positive part must matter in this case"

    scaled = attribute(model, ids, [TARGET], probes, normalize="sum", **options)
    terms = [result.gradient_norm, result.curvature, result.information]
    weights = [0.2, 0.3, 0.7]
    bracket = sum(w * t / t.sum() for w, t in zip(weights, terms, strict=True))
    assert_close("normalised score", result.gate * bracket, scaled.target_scores, rtol=EXACT)
    assert_close("mass", sum(weights), (scaled.target_scores / scaled.gate).sum(), rtol=EXACT)
    assert_close("raw curvature is kept", result.curvature, scaled.curvature, rtol=EXACT)

    squared = attribute(model, ids, [TARGET], curvature="grad_squared")
    assert_close("squared gradient", gradient.pow(2).sum(-1), squared.curvature[0], rtol=EXACT)


def test_each_target_row_is_a_single_run_on_its_own_context() -> None:
    model, ids, reference, embeddings = setup("phi3")
    targets = [TARGET, 20, 5]
    probes = signs(2, *embeddings.shape)
    result = attribute(model, ids, targets, probes, aggregate="max")
    assert result.target_scores.shape == (3, LENGTH)
    for row, target in enumerate(targets):
        context = [*ids, *targets[:row]]
        wide = torch.cat([probes, signs(2, row, embeddings.shape[1], seed=9)], dim=1)
        alone = attribute(model, context, [target], wide)
        whole_gate = reference.gate(reference.embed(context))
        assert_close("gate", whole_gate[:LENGTH], result.gate[row], rtol=EXACT)
        for component in ("gate", "curvature", "information", "log_prob_drop", "target_scores"):
            expected = getattr(alone, component)[0, :LENGTH]
            assert_close(component, expected, getattr(result, component)[row], rtol=EXACT)
    assert float(result.gate[1:].sum(-1).max()) < 1.0
    assert_close("max", result.target_scores.max(0).values, result.scores, rtol=EXACT)
    for how in ("mean", "sum"):
        other = attribute(model, ids, targets, curvature="none", aggregate=how)
        expected = getattr(other.target_scores, how)(0)
        assert_close(how, expected, other.scores, rtol=EXACT)


@pytest.mark.parametrize("name", ["phi3_longrope_long", "gpt2_scaled", "gemma3_text"])
def test_the_users_model_is_left_as_it_was(name: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation = "sdpa" if name.startswith(("phi3", "gpt2")) else "eager"
    model = families.build(name, torch.bfloat16, attn=implementation).train()
    before = copy.deepcopy(model)
    registered = dict(ALL_ATTENTION_FUNCTIONS)
    ids = families.prompt_ids(name, 5)
    width = model.get_input_embeddings().weight.shape[1]
    attribute(model, ids, [TARGET], signs(1, 5, width))

    assert model.training
    assert dict(ALL_ATTENTION_FUNCTIONS) == registered
    assert model.config.to_dict() == before.config.to_dict()
    assert model.config._attn_implementation == implementation
    tensors = [*model.named_parameters(), *model.named_buffers()]
    others = [*before.named_parameters(), *before.named_buffers()]
    for (label, tensor), (other_label, other) in zip(tensors, others, strict=True):
        assert label == other_label
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), label
        assert tensor.requires_grad == other.requires_grad and tensor.grad is None, label
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "gptj", "phi3_longrope_long"])
def test_casting_a_model_to_float64_changes_nothing(name: str) -> None:
    """The attribution is that of the float32 weights in exact arithmetic, whoever casts them."""
    ids = families.prompt_ids(name, 5)
    single = families.build(name)
    probes = signs(1, 5, single.get_input_embeddings().weight.shape[1])
    expected = attribute(single, ids, [TARGET], probes)
    actual = attribute(families.build(name, torch.float64), ids, [TARGET], probes)
    for component in ("gate", "curvature", "information"):
        assert_close(
            component, getattr(expected, component), getattr(actual, component), rtol=EXACT
        )


@pytest.mark.parametrize("name", ["llama", "phi3_longrope_long", "gemma2"])
def test_rotary_tables_are_the_models_own_constants(name: str) -> None:
    model, ids, reference, embeddings = setup(name)
    tables: dict[str, list[tuple[Tensor, ...]]] = {"native": [], "reference": []}
    for key, owner in (("native", model), ("reference", reference.model)):
        owner.model.rotary_emb.register_forward_hook(
            lambda _module, _arguments, output, key=key: tables[key].append(output)
        )
    with torch.no_grad():
        model(torch.tensor([ids]))
        reference.log_distribution(embeddings)
    for ours, own in zip(tables["reference"][0], tables["native"][0], strict=True):
        assert ours.dtype == torch.float64 and own.dtype == torch.float32
        assert torch.equal(ours, own.double())


def test_gpt2_with_reordered_attention() -> None:
    """`reorder_and_upcast_attn` is another order of the same product, in float32 only."""
    model = families.build("gpt2")
    ids = families.prompt_ids("gpt2", LENGTH)
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = True
    reference = Reference(model)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        actual = reference.log_distribution(reference.embed(ids))
    assert_close("log P", expected, actual, rtol=FLOAT32)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt_ids": []}, InputError),
        ({"target_ids": []}, InputError),
        ({"probes": None}, InputError),
        ({"probes": torch.ones(2, LENGTH - 1, 40)}, InputError),
        ({"rollout": "values"}, ConfigError),
        ({"curvature": "fisher"}, ConfigError),
        ({"estimator": "coded"}, ConfigError),
        ({"masking": "noise"}, ConfigError),
        ({"masking": "sentinel"}, ConfigError),
        ({"normalize": "max"}, ConfigError),
        ({"aggregate": "median"}, ConfigError),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], error: type[HeatError]) -> None:
    arguments: dict[str, Any] = {
        "model": families.build("gpt2"),
        "prompt_ids": families.prompt_ids("gpt2", LENGTH),
        "target_ids": [TARGET],
        "probes": torch.ones(1, LENGTH, 40),
    }
    with pytest.raises(error, match=r"expected|needs"):
        attribute(**(arguments | changes))


def test_docstring_examples_run() -> None:
    outcome = doctest.testmod(reference_module)
    assert outcome.attempted > 0 and outcome.failed == 0


def test_assert_close_fails_where_it_should() -> None:
    expected = torch.tensor([1.0, 100.0])
    assert_close("max-norm", expected, torch.tensor([1.05, 100.0]), rtol=1e-3)
    with pytest.raises(AssertionError, match=r"entry.*at \(0,\)"):
        assert_close("x", expected, torch.tensor([1.05, 100.0]), rtol=1e-3, elementwise=True)
    with pytest.raises(AssertionError, match=r"relative 1\.0\d*e-02"):
        assert_close("x", expected, torch.tensor([1.0, 101.0]), rtol=1e-3)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_close("x", expected, torch.tensor([1.0, math.nan]), rtol=1.0)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close("x", expected, torch.tensor([1.0]), rtol=1.0)


@pytest.mark.parametrize("layers", [3, 9])
def test_all_layers_are_what_none_named_are(layers: int) -> None:
    """With a factor on the embeddings too: X is what comes before it."""
    model, ids = families.build("granite", torch.float64), families.prompt_ids("granite", 5)
    named, plain = Reference(model, layers), Reference(model)
    embeddings = plain.embed(ids)
    for found, expected in zip(named.point(embeddings), plain.point(embeddings), strict=True):
        assert torch.equal(found, expected)

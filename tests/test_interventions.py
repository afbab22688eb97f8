"""Activation patching against oracles, and the metrics made of it against cases by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import families
import heat_fast
from assertions import assert_close
from heat_fast import InputError, metrics
from heat_fast.metrics import Case

IDS = [5, 9, 3, 17, 11, 4, 8]
TARGET = 6
CASE = Case(IDS, TARGET, list(range(len(IDS))))


def log_prob(model: Any, embeddings: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1)[TARGET]


def embeddings_of(model: Any) -> Tensor:
    found: Tensor = model.get_input_embeddings()(torch.tensor(IDS)).detach()
    return found


def drop(model: Any, token: int) -> Tensor:
    """What replacing one embedding by zero takes from the target."""
    embeddings = embeddings_of(model)
    masked = embeddings.clone()
    masked[token] = 0
    return log_prob(model, embeddings) - log_prob(model, masked)


def random_llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double().eval()


def test_with_one_layer_patching_is_replacing_the_embedding() -> None:
    model = random_llama(1)
    [effects] = metrics.patch_effects(model, [CASE])
    assert_close(
        "effects",
        effects,
        torch.stack([drop(model, token) for token in range(len(IDS))]),
        rtol=1e-9,
    )


def test_the_token_before_the_last_by_hooks() -> None:
    """Its keys and values are read by the last row and by its own, whose states go nowhere else."""
    model, token = random_llama(3), len(IDS) - 2
    embeddings = embeddings_of(model)
    masked = embeddings.clone()
    masked[token] = 0
    projections = [
        projection
        for layer in model.model.layers
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    kept: list[Tensor] = []
    hooks = [
        each.register_forward_hook(lambda *call: kept.append(call[2][0, token].clone()))
        for each in projections
    ]
    log_prob(model, masked)
    for hook in hooks:
        hook.remove()

    def patch(index: int) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            patched = output.clone()
            patched[0, token] = kept[index]
            return patched

        return hook

    hooks = [each.register_forward_hook(patch(at)) for at, each in enumerate(projections)]
    patched = log_prob(model, embeddings)
    for hook in hooks:
        hook.remove()
    [effects] = metrics.patch_effects(model, [CASE])
    assert_close("effect", effects[token], log_prob(model, embeddings) - patched, rtol=1e-9)
    assert abs(float(effects[0] - drop(model, 0))) > 1e-3  # elsewhere the two are not the same


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_patched_and_left_as_it_was(family: str) -> None:
    model = families.build(family, dtype=torch.float64)
    hooks = [len(each._forward_hooks) for each in model.modules()]
    state = torch.get_rng_state()
    [effects] = metrics.patch_effects(model, [CASE])
    [alone] = metrics.patch_effects(model, [CASE], rows=1)
    assert_close("effects", effects, alone, rtol=1e-6, atol=1e-9)
    assert_close("effect", effects[-1], drop(model, len(IDS) - 1), rtol=1e-6, atol=1e-9)
    assert float(effects.abs().max()) > 0
    assert hooks == [len(each._forward_hooks) for each in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_the_mean_is_another_reference() -> None:
    model = random_llama(1)
    [effects] = metrics.patch_effects(model, [CASE], reference="mean")
    embeddings = embeddings_of(model)
    replaced = embeddings.clone()
    replaced[2] = embeddings.mean(0)
    assert_close(
        "effect", effects[2], log_prob(model, embeddings) - log_prob(model, replaced), rtol=1e-9
    )


def test_bad_input_to_patching() -> None:
    model = random_llama(1)
    with pytest.raises(InputError, match="expected one of zero, mean"):
        metrics.patch_effects(model, [CASE], reference="noise")
    with pytest.raises(InputError, match="has one token"):
        metrics.patch_effects(model, [Case([5], 6, [1])])
    with pytest.raises(InputError, match="not in the vocabulary"):
        metrics.patch_effects(model, [Case([5, 99], 6, [1, 2])])


def test_agreement_by_hand() -> None:
    scores, effects = [[3.0, 1.0, 2.0, 0.0]], [[0.5, 0.0, -0.25, 0.1]]
    # Ranks 3 1 2 0 and 3 1 0 2: 1 - 6 (0 + 0 + 4 + 4) / 60.
    assert metrics.patch_corr(scores, effects).value == pytest.approx(0.2)
    assert metrics.intervention_at_k(scores, effects, k=2).value == pytest.approx(0.125)
    assert metrics.misattribution(scores, effects, k=4).value == 0.5
    assert metrics.misattribution(scores, effects, k=4, threshold=0.2).value == 0.75
    assert metrics.intervention_at_k(scores, effects).value == pytest.approx(0.0875)
    assert metrics.causal_pass_at_k(scores, [[2, 3]], k=1).value == 0
    assert metrics.causal_pass_at_k(scores, [[2, 3]], k=2).value == 1


def test_bad_input_to_agreement() -> None:
    with pytest.raises(InputError, match="all equal"):
        metrics.patch_corr([[1, 1]], [[0, 1]])
    with pytest.raises(InputError, match="effects of example 0"):
        metrics.patch_corr([[1, 2]], [[0, 1, 2]])
    with pytest.raises(InputError, match="k"):
        metrics.intervention_at_k([[1, 2]], [[0, 1]], k=0)
    with pytest.raises(InputError, match="threshold"):
        metrics.misattribution([[1, 2]], [[0, 1]], threshold=float("nan"))


# --- prompts cut down -----------------------------------------------------------------------------


def test_a_snippet_is_the_fewest_tokens() -> None:
    assert metrics.snippet([0.4, 0.3, 0.2, 0.1], 0.4) == [0]
    assert metrics.snippet([0.4, 0.3, 0.2, 0.1], 0.41) == [0, 1]
    assert metrics.snippet([1, 1, 1], 1) == [0, 1, 2]
    assert metrics.snippet([0, 2, 0], 1) == [1]
    assert metrics.snippet([1, 2, 3], 1e-9) == [2]
    with pytest.raises(InputError, match="all scores are 0"):
        metrics.snippet([0, 0])
    with pytest.raises(InputError, match="none below 0"):
        metrics.snippet([-1, 2])
    with pytest.raises(InputError, match="mass"):
        metrics.snippet([1, 2], 1.5)


def test_filters_by_the_demo_model() -> None:
    """Scores on the evidence keep the answer that scores elsewhere lose; by plain forwards."""
    demo = heat_fast.load_demo_model(4)
    for example in demo.examples:
        ids = demo.tokenizer(example.prompt).input_ids
        embeddings = demo.model.get_input_embeddings()(torch.tensor(ids)).detach()
        with torch.no_grad():
            target = int(demo.model(inputs_embeds=embeddings[None]).logits[0, -1].argmax())
        scores = torch.arange(len(ids), 0, -1).double()
        kept = len(ids) - int(0.6 * len(ids))
        masked = embeddings.clone()
        masked[kept:] = 0
        with torch.no_grad():
            found = int(demo.model(inputs_embeds=masked[None]).logits[0, -1].argmax())
        case = Case(ids, target, scores)
        assert metrics.filter_delta(demo.model, [case]).value == float(found == target) - 1
        some = metrics.snippet(scores, 0.4)
        with torch.no_grad():
            logits = demo.model(inputs_embeds=embeddings[None, some]).logits[0, -1]
        wanted = float(int(logits.argmax()) == target) - 1
        assert metrics.snippet_delta(demo.model, [case]).value == wanted
        assert metrics.snippet_delta(demo.model, [case], mass=1).value == 0

"""The views of the families: logits, attentions and value norms against Hugging Face's own.

Against `Reference` (Hugging Face's forward with its inner float32 casts undone) a float64 view
agrees to rounding, 1e-10 of the largest entry. Against a model run as it is, the casts count:
norms and softmax in float32 (unit roundoff 6e-8), some ten sums of about 60 terms in each of three
blocks, 1e-5 of the largest logit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import families
import heat_fast
from assertions import assert_close
from heat_fast.decoder import check_supported, supported_classes, view
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.branch_attention import Masking
from heat_fast.kernels.value_norm_rollout import value_output_norms
from heat_fast.reference import Reference
from heat_fast.trunk import Trunk, run_trunk
from oracles import measure, softmax_weights

LENGTH = 11
TARGETS = (3, 5, 7)
EXACT = 1e-10
SINGLE = 1e-5

every_family = pytest.mark.parametrize("name", families.FAMILIES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def tolerance(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float64 else SINGLE


@cache
@torch.no_grad()
def reference_of(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The float64 oracle's attentions, value norms and log P of the test context."""
    reference = Reference(families.build(name))
    embeddings = reference.embed(families.prompt_ids(name, LENGTH))
    weights, _ = reference.attentions_and_values(embeddings)
    return weights, reference.value_norms(embeddings), reference.log_distribution(embeddings)


@torch.no_grad()
def trunk_of(model: Any, ids: list[int], targets: tuple[int, ...] = TARGETS) -> Trunk:
    embeddings = model.get_input_embeddings()(torch.tensor(ids))
    return run_trunk(view(model, len(ids)), embeddings, targets)


@both_dtypes
@every_family
def test_logits_are_hugging_faces_own(name: str, dtype: torch.dtype) -> None:
    model, ids = families.build(name, dtype=dtype), families.prompt_ids(name, LENGTH)
    trunk = trunk_of(model, ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -len(TARGETS) :]
        actual = trunk.decoder.head.logits(trunk.last)
        alone = trunk_of(model, ids[:1], (0,)).log_probs
        expected_alone = model(torch.tensor([ids[:1]])).logits[0].double().log_softmax(-1)
    assert actual.dtype == dtype
    assert_close(f"{name} logits", expected, actual, rtol=SINGLE)
    assert_close(f"{name} log P of one token", expected_alone, alone, rtol=SINGLE)


@both_dtypes
@every_family
def test_attentions_and_value_norms(name: str, dtype: torch.dtype) -> None:
    """Per head, recomputed from the trunk's rotated queries, keys and log-sum-exp."""
    weights, norms, _ = reference_of(name)
    model, ids = families.build(name, dtype=dtype), families.prompt_ids(name, LENGTH)
    trunk = trunk_of(model, ids)
    assert len(trunk.states) == len(weights) == 3
    for layer, (block, state) in enumerate(zip(trunk.decoder.blocks, trunk.states, strict=True)):
        kept, masking = state.attention, block.attention.masking
        queries = len(TARGETS) if layer == 2 else LENGTH
        assert kept.query.shape[2] == queries, "the last block keeps the target rows alone"
        rebuilt = weights_from_normaliser(kept.query, kept.key, kept.normaliser, masking)
        expected = weights[layer, :, -queries:]
        label = f"{name} layer {layer}"
        rtol = tolerance(dtype)
        assert_close(f"{label} attentions", expected, rebuilt.flatten(0, 1), rtol=rtol)
        settings = masking.scale, masking.window, masking.softcap
        plain = softmax_weights(kept.query, kept.key, *settings, block.attention.sinks)
        assert_close(f"{label} plain softmax", expected, plain.flatten(0, 1), rtol=rtol)

        heads, group = kept.query.shape[:2]
        values = kept.value[..., : block.attention.value_dim]
        matrix = block.attention.output.matrix(heads * group * values.shape[-1], values)
        actual = value_output_norms(values, matrix, dtype).flatten(0, 1)
        assert_close(f"{label} value norms", norms[layer], actual, rtol=rtol)


def weights_from_normaliser(
    query: Tensor, key: Tensor, normaliser: Tensor, masking: Masking
) -> Tensor:
    """`exp(s - lse)`, zero where masked; `[Hk, G, Q, T]`."""
    scores = masking.scale * (query @ key[:, None].transpose(2, 3))
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    length = key.shape[1]
    rows = torch.arange(length - query.shape[2], length)
    hidden = masking.hidden(rows, torch.arange(length))
    return (scores - normaliser[..., None]).exp().masked_fill(hidden, 0.0)


@every_family
def test_log_probs_agree_with_the_reference(name: str) -> None:
    _, _, expected = reference_of(name)
    model = families.build(name, dtype=torch.float64)
    trunk = trunk_of(model, families.prompt_ids(name, LENGTH), (4,))
    assert_close(f"{name} log P", expected, trunk.log_probs[0], rtol=EXACT)
    assert_close(f"{name} g", expected[4], trunk.target_log_probs[0], rtol=EXACT)


def test_every_family_has_a_tiny_model_here() -> None:
    classes = {type(families.build(name)).__name__ for name in families.FAMILIES}
    assert classes == set(supported_classes())


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("olmoe", "clip_qkv", 2.0),
        ("deepseek_v2", "topk_method", "group_limited_greedy"),
        ("mixtral", "model_type", "of_next_year"),
        ("stablelm", "qk_layernorm", True),
        ("cohere", "use_qk_norm", True),
    ],
)
def test_settings_that_are_not_served_are_named(name: str, setting: str, value: Any) -> None:
    model = families.build(name)
    setattr(model.config, setting, value)
    with pytest.raises(UnsupportedModelError, match=f"{setting}|{value}"):
        view(model, 9)


def test_values_wider_than_keys_are_refused() -> None:
    model = families.build("deepseek_v3")
    model.model.layers[1].self_attn.v_head_dim = 13
    with pytest.raises(UnsupportedModelError, match=r"values of 13 columns \(v_head_dim\)"):
        view(model, 9)


def test_positions_at_which_queries_grow_are_refused() -> None:
    model = families.build("ministral3")
    assert view(model, 64).length == 64
    with pytest.raises(UnsupportedModelError, match=r"65 tokens, beyond 64 \(llama_4"):
        view(model, 65)
    model.config.rope_parameters["llama_4_scaling_beta"] = 0
    assert view(model, 65).length == 65


def test_the_text_part_of_a_model_with_eyes_has_to_be_known() -> None:
    model = families.build("mistral3")
    model.config.text_config.model_type = "mistral4"
    with pytest.raises(UnsupportedModelError, match="text part of this Mistral3"):
        view(model, 9)


# --- published sizes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FULL_SIZE)
def test_published_sizes(name: str) -> None:
    """Real widths and heads: the view builds, its logits are right, an attribution runs."""
    model = families.build_full_size(name)
    ids = [5, 9, 17]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    trunk = trunk_of(model, ids[:1], TARGETS[:1])
    # bfloat16 keeps 8 bits: each of some ten roundings of the residual stream adds 2^-9 of it.
    rtol = 10 * 2**-9 if model.dtype == torch.bfloat16 else SINGLE
    actual = trunk.decoder.head.logits(trunk.last)
    assert_close(f"{name} logits", expected[:1], actual, rtol=rtol)
    result = heat_fast.attribute(model, None, ids, probes=1)
    log_probs = expected[-1].double().log_softmax(-1)
    assert_close(f"{name} log P", log_probs.max(), result.target_log_probs[0], rtol=rtol)
    assert float(result.curvature.min()) > 0
    assert float(result.information.min()) > 0


# --- models without a view ----------------------------------------------------------------------


class NovelForCausalLM(transformers.PreTrainedModel):
    """A causal language model of a family nobody wrote a view for."""

    config_class = transformers.LlamaConfig

    def __init__(self) -> None:
        super().__init__(families.CONFIGS["llama"]())
        self.embed = nn.Embedding(7, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def tiny_t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=31, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, pad_token_id=0
        )
    )


def opt_with_late_norms() -> Any:
    config = families.CONFIGS["opt"]()
    config.do_layer_norm_before = False
    return transformers.OPTForCausalLM(config)


def opt_with_projected_embeddings() -> Any:
    config = families.CONFIGS["opt"]()
    config.word_embed_proj_dim = 20
    return transformers.OPTForCausalLM(config)


def gpt2_with_cross_attention() -> Any:
    config = families.CONFIGS["gpt2"]()
    config.add_cross_attention = True
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (tiny_t5, ("T5ForConditionalGeneration", "encoder-decoder", "AutoModelForCausalLM")),
        (NovelForCausalLM, ("NovelForCausalLM", "LlamaForCausalLM", "heat_fast/decoder/families")),
        (opt_with_late_norms, ("OPT", "do_layer_norm_before")),
        (opt_with_projected_embeddings, ("OPT", "word_embed_proj_dim")),
        (gpt2_with_cross_attention, ("GPT-2", "cross-attention")),
    ],
)
def test_unsupported_models_are_named(build: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        heat_fast.attribute(build(), None, [3, 4, 5], 3)
    for word in words:
        assert word in str(caught.value)


def test_a_subclass_is_served_by_its_parents_view() -> None:
    model = families.build("llama", dtype=torch.float64)
    expected = measure(model, [4, 9, 6], 3, probes=1)
    model.__class__ = type("MyLlama", (type(model),), {})
    actual = measure(model, [4, 9, 6], 3, probes=1)
    assert torch.equal(expected["curvature"], actual["curvature"])


# --- linear layers that are not plain matrices --------------------------------------------------


class Adapted(nn.Module):
    """`y = base(x) + dropout(x) A' B'`: a frozen layer and a low-rank addition."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(0.3)
        self.down = nn.Parameter(torch.randn(2, inputs).double() / inputs**0.5)
        self.up = nn.Parameter(torch.randn(outputs, 2).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.down.T @ self.up.T

    def change(self, weight: Tensor) -> Tensor:
        """The `[out, in]` matrix this layer stands for, given its base's."""
        return weight + self.up @ self.down


class Dequantised(nn.Module):
    """Weights stored as int8 with a scale per row; widened to the input's dtype when called."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = matrix_of(base)
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if base.bias is None else base.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.change(self.codes).to(x.dtype), self.bias)

    def change(self, _: Tensor) -> Tensor:
        return self.codes * self.scale


class ForwardOnly(Dequantised):
    """A kernel without a backward, as some quantised layers have."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def matrix_of(layer: Any) -> Tensor:
    """`[out, in]`."""
    weight = layer.weight.detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


REPLACED = {
    "llama_bias": ("q_proj", "down_proj", "o_proj", "lm_head"),
    "phi3": ("qkv_proj", "gate_up_proj", "o_proj", "lm_head"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gemma2": ("k_proj", "v_proj", "up_proj", "o_proj"),
}


@pytest.mark.parametrize("wrapper", [Adapted, Dequantised, ForwardOnly])
@pytest.mark.parametrize("name", REPLACED)
def test_wrapped_linears_equal_their_plain_matrices(name: str, wrapper: Any) -> None:
    wrapped = families.build(name, dtype=torch.float64)
    merged = copy.deepcopy(wrapped)
    others = dict(merged.named_modules())
    replaced = 0
    for path, layer in list(wrapped.named_modules()):
        parent, _, own = path.rpartition(".")
        if own not in REPLACED[name]:
            continue
        outputs, inputs = matrix_of(layer).shape
        substitute = wrapper(layer, inputs, outputs)
        plain: Any = others[path]
        with torch.no_grad():
            matrix = substitute.change(matrix_of(layer))
            transposed = type(plain).__name__ == "Conv1D"
            plain.weight = nn.Parameter(matrix.T.clone() if transposed else matrix)
        setattr(wrapped.get_submodule(parent), own, substitute.eval())
        replaced += 1
    assert replaced >= 9
    ids = families.prompt_ids(name, 7)
    expected = measure(merged, ids, [4, 6], probes=2)
    actual = measure(wrapped, ids, [4, 6], probes=2)
    for part, values in expected.parts.items():
        assert_close(f"{name} {wrapper.__name__} {part}", values, actual[part], rtol=EXACT)


# --- norms that an adapter stands before ---------------------------------------------------------


class Tuned(nn.Module):
    """A norm and two tuned copies of it, of which one is called; as PEFT's LN tuning does it."""

    def __init__(self, base: nn.Module, tuned: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.ln_tuning_layers = nn.ModuleDict({"other": copy.deepcopy(base), "mine": tuned})
        self.active_adapters, self.merged, self.disable_adapters = ["mine"], False, False

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        tuned = self.active_adapters and not self.merged and not self.disable_adapters
        called = self.ln_tuning_layers[self.active_adapters[0]] if tuned else self.base_layer
        return called(x)

    def change(self, state: str) -> None:
        if state == "merged":
            layers = self.ln_tuning_layers
            self.base_layer, layers["mine"] = layers["mine"], self.base_layer
        if state == "inactive":
            self.active_adapters = []
        self.merged, self.disable_adapters = state == "merged", state == "disabled"


def tuned_norms(name: str, state: str) -> tuple[Any, Any]:
    """A model with an adapter in every norm's place, and the plain one that it computes."""
    wrapped = families.build(name, dtype=torch.float64)
    plain = copy.deepcopy(wrapped)
    norms = [path for path, each in plain.named_modules() if type(each).__name__.endswith("Norm")]
    assert len(norms) >= 4
    for path in norms:
        parent, _, own = path.rpartition(".")
        base = wrapped.get_submodule(path)
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        if state in {"active", "merged"}:
            setattr(plain.get_submodule(parent), own, copy.deepcopy(tuned))
        substitute = Tuned(base, tuned)
        substitute.change(state)
        setattr(wrapped.get_submodule(parent), own, substitute)
    return wrapped, plain


@pytest.mark.parametrize("state", ["active", "merged", "disabled", "inactive"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2", "gpt2", "gpt_neox", "gptj"])
def test_tuned_norms_are_those_that_the_adapter_calls(name: str, state: str) -> None:
    wrapped, plain = tuned_norms(name, state)
    ids = families.prompt_ids(name, 7)
    expected = measure(plain, ids, [4, 6], probes=2)
    actual = measure(wrapped, ids, [4, 6], probes=2)
    for part, values in expected.parts.items():
        assert_close(f"{state} {part}", values, actual[part], rtol=EXACT)


@pytest.mark.parametrize("state", ["active", "merged", "disabled"])
def test_pefts_own_tuned_norms(state: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    targets = ["input_layernorm", "post_attention_layernorm", "norm"]
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)
    model = peft.get_peft_model(families.build("llama", dtype=torch.float64), config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "ln_tuning" in path:
                parameter.add_(0.3 * torch.randn_like(parameter))
    if state == "merged":
        model.base_model.merge_adapter()
    if state == "disabled":
        model.base_model.disable_adapter_layers()
        plain = families.build("llama", dtype=torch.float64)
    else:
        plain = copy.deepcopy(model).merge_and_unload()
    ids = families.prompt_ids("llama", 7)
    expected = measure(plain, ids, [4, 6], probes=2)
    actual = measure(model, ids, [4, 6], probes=2)
    for part, values in expected.parts.items():
        assert_close(f"{state} {part}", values, actual[part], rtol=EXACT)


@pytest.mark.parametrize("kind", ["LoRA", "rank-stabilised LoRA", "DoRA", "IA3", "LoHa"])
def test_pefts_own_adapters(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    asked = {"task_type": "CAUSAL_LM", "target_modules": linears}
    dropped = {**asked, "r": 4, "lora_dropout": 0.1}
    config = {
        "LoRA": lambda: peft.LoraConfig(**dropped, bias="all"),
        "rank-stabilised LoRA": lambda: peft.LoraConfig(**dropped, use_rslora=True),
        "DoRA": lambda: peft.LoraConfig(**dropped, use_dora=True),
        "IA3": lambda: peft.IA3Config(**asked, feedforward_modules=["down_proj"]),
        "LoHa": lambda: peft.LoHaConfig(**asked, r=4),
    }[kind]()
    model = peft.get_peft_model(families.build("llama", dtype=torch.float64), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the adapter's own
                parameter.add_(0.2 * torch.randn_like(parameter))
    merged = copy.deepcopy(model).eval().merge_and_unload()
    ids = families.prompt_ids("llama", 7)
    expected = measure(merged, ids, [4, 6], probes=2)
    actual = measure(model.train(), ids, [4, 6], probes=2)
    for part, values in expected.parts.items():
        assert_close(f"{kind} {part}", values, actual[part], rtol=EXACT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gptj"])
@pytest.mark.parametrize("active", [["mine", "other"], ["absent"]])
def test_tuned_norms_without_one_active_adapter(name: str, active: list[str]) -> None:
    wrapped, _ = tuned_norms(name, "active")
    for each in wrapped.modules():
        if isinstance(each, Tuned):
            each.active_adapters = active
    with pytest.raises(UnsupportedModelError, match=r"active adapters .*merge_and_unload\(\)"):
        view(wrapped, 7)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "gptj", "opt"])
def test_what_is_no_norm_is_named(name: str) -> None:
    model = families.build(name)
    for path, each in list(model.named_modules()):
        if type(each).__name__.endswith("Norm"):
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Sequential(each))
    with pytest.raises(UnsupportedModelError, match=r"a Sequential in place of a norm .*merge it"):
        view(model, 7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (torch.nn.DataParallel, "model.module"),
        (torch.compile, "_orig_mod"),
        (lambda model: model.model, "LlamaForCausalLM"),
    ],
    ids=["data_parallel", "compiled", "headless"],
)
def test_a_wrapped_or_headless_model_is_told_what_to_pass(wrap: Any, advice: str) -> None:
    with pytest.raises(UnsupportedModelError, match=advice):
        check_supported(wrap(families.build("llama")))

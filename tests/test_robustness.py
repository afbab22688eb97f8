"""What changes a model behind the view's back is noticed; half precision keeps small numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import families
import heat_fast
from heat_fast import Attributor, HeatConfig, estimate, faithful
from heat_fast.decoder import view
from heat_fast.errors import ConfigError, InputError, UnsupportedModelError
from heat_fast.forward import log_probs, unchanged
from heat_fast.kernels.branch_attention import Masking, branch_attention
from heat_fast.kernels.second_order_attention import Primal
from heat_fast.trunk import Trunk, run_trunk

IDS = families.prompt_ids("llama", 9)


def attribute(model: Any, **settings: Any) -> Any:
    return Attributor(model, None, HeatConfig(**{"probes": 2, **settings})).attribute(IDS, 5)


def shift(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook that changes what a module returns."""
    if isinstance(output, Tensor):
        return output + 0.1
    return (output[0] + 0.1, *output[1:])


HOOKED: dict[str, Callable[[Any], nn.Module]] = {
    "layer": lambda model: model.model.layers[1],
    "attention": lambda model: model.model.layers[1].self_attn,
    "mlp": lambda model: model.model.layers[1].mlp,
    "norm": lambda model: model.model.layers[1].input_layernorm,
    "body": lambda model: model.model.norm,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", HOOKED)
def test_a_hook_above_the_submodules_is_refused(place: str, dtype: torch.dtype) -> None:
    """In half precision too, where rounding would hide what it changes."""
    model = families.build("llama", dtype)
    module = HOOKED[place](model)
    hook = module.register_forward_hook(shift)
    with pytest.raises(UnsupportedModelError, match=r"hooks change .*some on model\."):
        attribute(model)
    assert list(module._forward_hooks.values()) == [shift]
    hook.remove()
    attribute(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_patched_forward_is_refused(dtype: torch.dtype) -> None:
    model = families.build("llama", dtype)
    mlp, told = model.model.layers[1].mlp, "does not compute what the model computes"
    own = mlp.forward
    mlp.forward = lambda x: 3 * own(x) + 1
    with pytest.raises(UnsupportedModelError, match=told):
        attribute(model)


def test_hooks_that_look_on_are_welcome() -> None:
    model = families.build("llama")
    expected, seen = attribute(model), []
    for module in (model, *(place(model) for place in HOOKED.values())):
        module.register_forward_hook(lambda *call: seen.append(call))
        module.register_forward_pre_hook(lambda *call: seen.append(call))
    assert torch.equal(attribute(model).scores, expected.scores)
    # The model's own forward: once for the hooks, once to be compared with the trunk.
    assert len(seen) == 2 * 2 * (len(HOOKED) + 1)


@pytest.mark.parametrize("changes", [False, True])
def test_hooks_below_a_forward_that_was_put_in_place(changes: bool) -> None:
    """As accelerate does: a partial call of the module, and its own forward beside it."""
    model = families.build("llama", torch.bfloat16)
    for module in (model, model.model):
        module._old_forward = module.forward
        module.forward = partial(lambda self, *a, **k: self._old_forward(*a, **k), module)
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda m, i, y: 1.02 * y if changes else None)
    with pytest.raises(UnsupportedModelError, match="hooks change") if changes else nullcontext():
        attribute(model)


def test_a_kernel_that_is_not_deterministic_is_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = families.build("llama"), iter(range(99))
    model.register_forward_hook(lambda *call: None)

    def shaken(*arguments: Any) -> Tensor:
        return log_probs(*arguments) + 1e-6 * next(calls)

    monkeypatch.setattr("heat_fast.faithful.log_probs", shaken)
    attribute(model)
    assert next(calls) > 2, "the forward with the hook and that without it were not compared"


def test_a_parametrised_norm_beside_a_hook() -> None:
    model = families.build("llama")
    expected = attribute(model)
    norm = model.model.layers[1].input_layernorm
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    model.register_forward_hook(lambda *call: None)
    assert torch.equal(attribute(model).scores, expected.scores)


def test_rotary_tables_without_values() -> None:
    model = families.build("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        heat_fast.generate_and_attribute(model, None, IDS, max_new_tokens=1)
    with unchanged(model):
        pass


class Bottleneck(nn.Module):
    """An adapter with a nonlinearity."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.narrow, self.wide = nn.Linear(base.in_features, 8), nn.Linear(8, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + cast(Tensor, self.wide(torch.relu(self.narrow(x))))


def last_row(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A hook that adds to the last position alone."""
    output = output.clone()
    output[..., -1, :] += 1
    return output


BENT: dict[str, Callable[[Any], Any]] = {
    "tanh": lambda model: model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, inputs, output: output + 0.5 * torch.tanh(output)
    ),
    "clamp": lambda model: model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: output.clamp(-0.5, 0.5)
    ),
    "head": lambda model: model.lm_head.register_forward_hook(
        lambda module, inputs, output: 5 * torch.tanh(output / 5)
    ),
    "adapter": lambda model: setattr(
        model.model.layers[1].mlp, "down_proj", Bottleneck(model.model.layers[1].mlp.down_proj)
    ),
    "row": lambda model: model.model.layers[1].mlp.down_proj.register_forward_hook(last_row),
}


@pytest.mark.parametrize("how", BENT)
def test_a_linear_layer_that_is_not_affine_is_refused(how: str) -> None:
    """The logits agree, since the layer is called: only derivatives would be wrong."""
    model = families.build("llama")
    BENT[how](model)
    with pytest.raises(
        UnsupportedModelError, match=r"in place of a linear layer is not affine \(off by \d+%"
    ):
        attribute(model)


class Quantising(nn.Linear):
    """Activations are rounded to int8 by their largest entry."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127 + 1e-9
        return super().forward((x / step).round() * step)


def test_quantised_activations_are_affine_enough() -> None:
    model = families.build("llama")
    exact = attribute(model, curvature="none")
    model.model.layers[1].mlp.down_proj.__class__ = Quantising
    found = attribute(model, curvature="none")
    assert not torch.equal(found.scores, exact.scores)
    torch.testing.assert_close(found.scores, exact.scores, rtol=0.2, atol=0.01)


def test_an_adapter_that_learns_a_prompt_is_refused() -> None:
    model = families.build("llama")
    model.peft_config, model.active_adapter = {}, "gone"
    attribute(model)
    model.peft_config["gone"] = SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(UnsupportedModelError, match=r"learns a prompt .*get_base_model"):
        attribute(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_of_inference_mode(name: str) -> None:
    ids = families.prompt_ids(name, 9)

    def scores(model: Any) -> Tensor:
        return Attributor(model, None, HeatConfig(probes=2)).attribute(ids, 5).scores

    with torch.inference_mode():
        model = families.build(name)
        inside = scores(model)
    assert torch.equal(scores(model), inside)
    assert torch.equal(scores(families.build(name)), inside)


@pytest.mark.parametrize("settings", [{"variant": "gs"}, {"estimator": "coded"}, {"coverage": 0.5}])
def test_torchs_default_device_does_not_matter(settings: dict[str, Any]) -> None:
    """Where a user works on a GPU, say; on the meta device every tensor would lose its values."""
    model = families.build("llama")
    expected = attribute(model, **settings)
    with torch.device("meta"):
        found = attribute(model, **settings)
        assert torch.empty(0).device.type == "meta"
    assert torch.equal(found.scores, expected.scores)


def test_torchs_default_device_does_not_matter_to_others() -> None:
    model = families.build("llama")
    expected, again = attribute(model), attribute(model, estimator="low_rank")
    with torch.device("meta"):
        read = heat_fast.from_dict(expected.to_dict())
        cost = estimate(model, 9)
        drawn = heat_fast.baselines.get("random")(model, None, IDS, 5)
        bounds = heat_fast.bounds(model, again, expected, sample=2)
    assert torch.equal(read.scores, expected.scores)
    assert cost.seconds is not None
    assert torch.equal(drawn.scores, heat_fast.baselines.get("random")(model, None, IDS, 5).scores)
    assert bounds.error.device.type == "cpu"


@pytest.mark.parametrize("name", ["random", "context_cite", "causal_tracing"])
def test_torchs_default_dtype_does_not_matter_to_what_is_drawn(name: str) -> None:
    model, method = families.build("llama"), heat_fast.baselines.get(name)
    expected = method(model, None, IDS, 5)
    torch.set_default_dtype(torch.float64)
    try:
        found = method(model, None, IDS, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.scores, expected.scores)


def test_torchs_counter_of_flops_is_borne() -> None:
    model = families.build("llama")
    expected = attribute(model)
    with FlopCounterMode(display=False) as counter:
        found = attribute(model)
    torch.testing.assert_close(found.scores, expected.scores)
    assert counter.get_total_flops() > 0


TAMPERED: dict[str, Callable[[Any], Callable[[], object]]] = {
    "logits": lambda model: tempered(model, lambda output: output.logits.mul_(0.7)),
    "layer": lambda model: tempered(model.model.layers[1], lambda output: output.add_(0.1)),
    "everywhere": lambda model: (
        register_module_forward_hook(
            lambda module, _, output: 1.05 * output if isinstance(module, nn.Linear) else None
        ).remove
    ),
}


def tempered(module: Any, change: Callable[[Any], object]) -> Callable[[], object]:
    """A forward put in a module's place that changes what it returns; returns what undoes it."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        change(output)
        return output

    module.forward = forward
    return lambda: delattr(module, "forward")


@pytest.mark.parametrize("target", [None, " Grimwick"])
@pytest.mark.parametrize("how", TAMPERED)
def test_what_changes_a_confident_model_is_refused(how: str, target: str | None, demo: Any) -> None:
    """One token has all the probability, with and without the change."""
    prompt = demo.examples[0].prompt
    undo = TAMPERED[how](demo.model)
    try:
        with pytest.raises(UnsupportedModelError, match="does not compute what the model"):
            heat_fast.attribute(demo.model, demo.tokenizer, prompt, target, variant="gs")
    finally:
        undo()
    heat_fast.attribute(demo.model, demo.tokenizer, prompt, target, variant="gs")


#: How torch is told that it may round the factors of float32 products: of both generations of its
#: settings, of which the older cannot be read once the newer was used.
PRECISIONS = [
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
]


@pytest.mark.parametrize("setting", PRECISIONS)
def test_products_that_torch_may_round_are_allowed_to(setting: str) -> None:
    """In a process of its own: torch has no way back from some of these."""
    run(
        f"{setting}; import heat_fast; demo = heat_fast.load_demo_model(); "
        "heat_fast.attribute(demo.model, demo.tokenizer, 'The mountain of', variant='gs')"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the embedded model is on the CPU")
def test_what_a_gpu_may_round_is_nothing_to_a_cpu() -> None:
    run(
        "torch.backends.cuda.matmul.allow_tf32 = True; import heat_fast; "
        "from heat_fast import faithful; from heat_fast.trunk import run_trunk; "
        "demo = heat_fast.load_demo_model(); view = heat_fast.decoder.view(demo.model, 3); "
        "rows = demo.model.get_input_embeddings().weight[:3].detach(); "
        "assert faithful._eps(run_trunk(view, rows, (1,))) == torch.finfo(torch.float32).eps"
    )


def run(code: str) -> None:
    """Run some lines after `import torch` in another process."""
    command = [sys.executable, "-c", f"import torch; {code}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("half", [True, False])
def test_layers_that_compute_in_half_precision_are_allowed_to(half: bool) -> None:
    """Between float32 norms, as quantised layers do; those in float32 are held to it."""
    model: Any = families.build("llama")

    class Rounded(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.packed = nn.Parameter(layer.weight.data.to(torch.bfloat16 if half else None))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.packed.to(torch.bfloat16)
            return nn.functional.linear(x.to(torch.bfloat16), weight).to(x.dtype)

    for layer in model.model.layers:
        layer.mlp.down_proj = Rounded(layer.mlp.down_proj)
    trunk = trunk_of(model)
    assert (faithful._eps(trunk) > 1e-3) is half


def test_a_hook_on_a_linear_layer_keeps_the_comparison_exact() -> None:
    model: Any = families.build("llama")
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, i, y: 2 * y)
    trunk = trunk_of(model)
    assert not trunk.decoder.plain
    assert faithful._eps(trunk) == torch.finfo(torch.float32).eps


def trunk_of(model: Any) -> Trunk:
    rows = model.get_input_embeddings().weight[torch.tensor(IDS)].detach()
    with torch.no_grad():
        return run_trunk(view(model, len(IDS)), rows, (5,))


def test_a_head_may_rule_tokens_out() -> None:
    model = families.build("gptj")
    model.lm_head.bias.data[[3, 7]] = -1e30
    result = heat_fast.attribute(model, None, [5, 6, 8], 9, variant="gs")
    assert result.scores.isfinite().all()


def test_a_model_that_is_partly_elsewhere_is_refused() -> None:
    model = families.build("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        attribute(model)


def test_a_submodule_of_another_kind_is_refused() -> None:
    model = families.build("llama")
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"'gate_proj'.*submodule that was replaced"):
        attribute(model)


def test_a_kernel_that_depends_on_its_handle_alone() -> None:
    """Autograd knows of no way back to the input, only to a parameter (packed int8 weights)."""
    model, plain = families.build("llama"), families.build("llama")

    class Packed(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.packed, self.handle = [layer], nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.packed[0](x).detach() + self.handle

    layer: Any = model.model.layers[1].mlp
    layer.down_proj = Packed(layer.down_proj)
    torch.testing.assert_close(attribute(model).scores, attribute(plain).scores)


@pytest.mark.filterwarnings("ignore")
def test_torchs_dynamic_int8_leads_to_the_same_tokens(demo: Any) -> None:
    """It rounds a row by its neighbours, so that the numbers are not those of any matrix."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if torch.backends.quantized.engine in ("none", None):
        pytest.skip("this torch has no engine for quantised layers")
    prompt = demo.examples[0].prompt
    rounded = quantization.quantize_dynamic(demo.model, {nn.Linear}, dtype=torch.qint8)
    found, expected = (
        heat_fast.attribute(model, demo.tokenizer, prompt, probes=2)
        for model in (rounded, demo.model)
    )
    assert [row.token for row in found.top(2)] == [row.token for row in expected.top(2)]


def test_a_hook_on_a_linear_layer_is_honoured() -> None:
    model = families.build("llama", dtype=torch.float64)
    plain = attribute(model)
    double = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, i, y: 2 * y)
    hooked = attribute(model)
    double.remove()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    merged = attribute(model)
    for name in ("curvature", "information", "gradient_norm", "gate"):
        torch.testing.assert_close(getattr(hooked, name), getattr(merged, name))
    assert not torch.allclose(plain.curvature, merged.curvature)


def test_a_subclass_that_changes_the_logits_is_refused() -> None:
    model = families.build("llama")

    class Tempered(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model.__class__ = Tempered
    with pytest.raises(UnsupportedModelError, match="Tempered"):
        attribute(model)


def test_autocast_around_the_call_changes_nothing() -> None:
    model = families.build("llama")
    expected = attribute(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attribute(model)
    assert torch.equal(expected.scores, actual.scores)


def test_weights_without_values_are_refused() -> None:
    model = families.build("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        attribute(model)


@pytest.mark.parametrize("config", [{"probes": 2}, "gs"])
def test_a_config_of_another_type_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="expected a HeatConfig"):
        Attributor(families.build("llama"), None, config)


def test_a_tokenizer_of_another_type_is_refused() -> None:
    with pytest.raises(InputError, match="tokenizer is str"):
        Attributor(families.build("llama"), "gpt2")
    model = families.build("llama")
    with pytest.raises(InputError, match=r"tokenizer is LlamaForCausalLM: expected a loaded"):
        heat_fast.attribute(model, model, "Maria slept.")


@pytest.mark.parametrize("margin", [21.0, 27.0])
def test_float16_keeps_the_curvature_of_a_confident_prediction(margin: float) -> None:
    """`1 - p` of 1e-6 and 1e-9: far below float16's smallest number."""
    model = families.build("gptj")
    ids, target = families.prompt_ids("gptj", 9), 5
    model.lm_head.bias.data[target] += margin
    results = []
    for dtype in (torch.float32, torch.float16):
        attributor = Attributor(model.to(dtype), None, HeatConfig(probes=4))
        results.append(attributor.attribute(ids, target))
    expected, actual = results
    assert float(actual.target_log_probs) > -1e-5
    for name in ("curvature", "gradient_norm"):
        want, got = getattr(expected, name), getattr(actual, name)
        assert (got > 0).all()
        assert float((want - got).abs().max() / want.max()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_rows_sum_to_one_in_half_precision(dtype: torch.dtype) -> None:
    """Large scores and large values: what is recomputed agrees with the log-sum-exp kept."""
    heads, groups, length, size = 2, 3, 33, 16
    query = (6 * torch.randn(heads, 1, groups, length, size)).to(dtype)
    key = (6 * torch.randn(heads, 1, length, size)).to(dtype)
    value = (20 + torch.randn(heads, 1, length, size)).to(dtype)
    masking = Masking(size**-0.5)
    empty = key[:, 0, :0]
    output, normaliser = branch_attention(query, key, value, empty, empty, masking)
    assert torch.isfinite(output).all()
    primal = Primal(query[:, 0], key[:, 0], value[:, 0], normaliser[:, 0], output[:, 0], 0, masking)
    for part in primal.tiles(1):
        rows = primal.rows(*part)
        total = torch.stack([part.weights.sum(-1) for part in rows.parts]).sum(0)
        # exp of a difference of two numbers of about 100, each good to 2^-24 of itself
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=0)


# --- calls that overlap ---------------------------------------------------------------------------


def test_overlapping_calls_leave_a_training_model_as_it_was() -> None:
    """The second enters while the first has switched dropout off, and outlives it."""
    model = families.build("gpt2").train()
    before = [module.training for module in model.modules()]
    first, second = unchanged(model), unchanged(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == before


def test_an_estimate_takes_any_whole_number() -> None:
    model = families.build("llama")
    assert estimate(model, np.int64(5), calibrate=False) == estimate(model, 5, calibrate=False)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("a name", 5), InputError),
        ((None, "5"), InputError),
        ((None, 1.5), InputError),
        ((None, 0), InputError),
        ((None, 5, 1, "gs"), ConfigError),
        ((None, 100_000), InputError),
    ],
    ids=str,
)
def test_an_estimate_checks_its_arguments(
    arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    model, *rest = arguments
    with pytest.raises(error, match=r"expected .*\. "):
        estimate(model or families.build("llama"), *rest, calibrate=False)

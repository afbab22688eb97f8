"""What a result says of the model that it was made with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import families
from heat_fast.provenance import fingerprint, identity


def test_a_fingerprint_follows_the_weights_alone() -> None:
    model = families.build("llama")
    before = fingerprint(model)
    assert len(before) == 16 and int(before, 16) >= 0
    assert fingerprint(copy.deepcopy(model)) == before
    assert fingerprint(model.train()) == before
    assert fingerprint(copy.deepcopy(model).double()) != before
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    assert fingerprint(other) != before


def test_values_that_cannot_be_read_are_left_out() -> None:
    model = nn.ModuleDict({"here": nn.Linear(3, 2), "elsewhere": nn.Linear(3, 2, device="meta")})
    before = fingerprint(model)
    model["elsewhere"].weight = nn.Parameter(torch.empty(2, 4, device="meta"))
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.ones(3, 2).t(),
        torch.ones(5, dtype=torch.bool),
        torch.ones(5, dtype=torch.complex64),
        torch.ones(5, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        torch.ones(5).to(torch.float8_e4m3fn),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8),
    ],
    ids=lambda values: f"{values.dtype} {tuple(values.shape)}",
)
def test_parameters_of_every_kind_have_a_fingerprint(values: torch.Tensor) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(values, requires_grad=False)
    assert fingerprint(model) == fingerprint(model) != fingerprint(nn.Module())


def test_transposed_weights_are_read() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(30, 20).t())
    before = fingerprint(model)
    with torch.no_grad():
        model.weight.mul_(1.01)
    assert fingerprint(model) != before


def test_active_adapters_are_named() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(families.build("llama"), config, adapter_name="one")
    model.add_adapter("two", config)
    one = identity(model)
    assert one["adapters"] == ["one"]
    model.set_adapter("two")
    assert identity(model) == {**one, "adapters": ["two"]}
    with model.disable_adapter():
        assert identity(model) == {**one, "adapters": []}
    model.merge_adapter()
    merged = identity(model)
    assert merged["adapters"] == [] and merged["weights"] != one["weights"]

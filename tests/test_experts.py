"""Mixtures of experts: how rows are brought to their experts and back, and what is refused.

That values and derivatives are right is in test_decoder.py and test_parity.py, as for any family.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import families
import heat_fast
from heat_fast import faithful
from heat_fast.decoder import view
from heat_fast.decoder.experts import Slots
from heat_fast.errors import UnsupportedModelError
from heat_fast.trunk import run_trunk

IDS = families.prompt_ids("mixtral", 9)


@st.composite
def chosen(draw: Any) -> tuple[Tensor, int]:
    """The experts of some rows, no two of a row alike, and how many there are."""
    rows, experts = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    top = draw(st.integers(1, experts))
    order = st.permutations(range(experts))
    return torch.tensor([draw(order)[:top] for _ in range(rows)]), experts


@given(chosen(), st.data())
def test_slots_lead_to_the_experts_and_back(drawn: tuple[Tensor, int], data: Any) -> None:
    experts, count = drawn
    rows, top = experts.shape
    start = data.draw(st.integers(0, rows - 1))
    cut = slice(start, data.draw(st.integers(start + 1, rows)))
    whole = Slots.of(experts, count)
    part, taken = whole.cut(cut)
    x = torch.randn(2, rows, 3, dtype=torch.float64)
    for slots, these, inside in ((whole, experts, slice(None)), (part, experts[cut], cut)):
        assert slots.expert.tolist() == sorted(these.flatten().tolist())
        assert slots.counts == tuple(torch.bincount(these.flatten(), minlength=count).tolist())
        gathered = slots.gather(x[:, inside])
        assert torch.equal(slots.sum(gathered), x[:, inside].repeat(top, 1, 1, 1).sum(0))
        weights = torch.randn(len(slots.row), dtype=torch.float64)
        dense = slots.scatter(weights)
        assert torch.equal(dense[slots.row, slots.expert], weights)
        assert int((dense != 0).sum()) == weights.numel()
    assert torch.equal(whole.expert[taken], part.expert)
    assert torch.equal(whole.row[taken] - start, part.row)


def test_transformers_fused_experts_give_the_same() -> None:
    expected = heat_fast.attribute(families.build("mixtral"), None, IDS, 4, probes=1)
    model = families.build("mixtral")
    model.set_experts_implementation("grouped_mm")
    found = heat_fast.attribute(model, None, IDS, 4, probes=1)
    assert torch.equal(expected.scores, found.scores)
    assert model.config._experts_implementation == "grouped_mm"


def test_hooks_on_experts_are_noticed() -> None:
    model = families.build("qwen3_moe")
    ids = families.prompt_ids("qwen3_moe", 9)
    layer: Any = model.model.layers[0].mlp
    harmless = layer.gate.register_forward_hook(lambda *_: None)
    heat_fast.attribute(model, None, ids, 4, probes=1)
    harmless.remove()
    layer.experts.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts"):
        heat_fast.attribute(model, None, ids, 4, probes=1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_that_do_not_lie_in_plain_tensors_are_refused(
    name: str, dtype: torch.dtype
) -> None:
    model = families.build("olmoe")
    experts: Any = model.model.layers[1].mlp.experts
    delattr(experts, name)
    experts.register_buffer(name, torch.zeros(4, 8, 8).to(dtype))
    with pytest.raises(UnsupportedModelError, match=f"no plain {name} of 3 dimensions"):
        heat_fast.attribute(model, None, families.prompt_ids("olmoe", 9), 4, probes=1)


class Adapter(nn.Module):
    """In another module's place, as adapters are."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


@pytest.mark.parametrize("part", ["gate", "experts"])
def test_adapters_of_routers_and_experts_are_refused(part: str) -> None:
    model = families.build("qwen3_moe")
    layer: Any = model.model.layers[0].mlp
    setattr(layer, part, Adapter(getattr(layer, part)))
    with pytest.raises(UnsupportedModelError, match=r"merge_and_unload"):
        view(model, 9)


def test_no_rows_go_to_no_experts() -> None:
    experts = view(families.build("mixtral"), 9).blocks[0].mlp
    assert experts.forward(torch.zeros(1, 0, 40))[0].shape == (1, 0, 40)


@pytest.mark.parametrize(
    ("name", "seed"), [("olmoe", 17), ("olmoe", 36), ("mixtral", 2), ("mixtral", 6)]
)
def test_ties_of_a_router_pass_for_rounding(name: str, seed: int) -> None:
    """In half precision the view and the model may choose otherwise, and do in these (an EPYC)."""
    model = families.build(name, dtype=torch.float16, seed=seed)
    model.set_experts_implementation("grouped_mm")
    ids = families.prompt_ids(name, 40, seed)
    heat_fast.attribute(model, None, ids[:-8], ids[-8:], curvature="none")


@pytest.mark.parametrize(
    ("name", "dtype", "times"),
    [
        ("mixtral", torch.float16, 16),
        ("mixtral", torch.float32, 1),
        ("mistral", torch.float16, 1),
    ],
)
def test_only_routers_in_half_precision_are_allowed_more(
    name: str, dtype: torch.dtype, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.build(name, dtype=dtype)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor(families.prompt_ids(name, 9)))
        trunk = run_trunk(view(model, 9), embeddings, (4,))
    eps = faithful._eps(trunk)
    allowed = faithful._rounding(trunk, trunk.log_probs, eps)
    monkeypatch.setattr(faithful, "ROUTED", 1)
    assert allowed == times * faithful._rounding(trunk, trunk.log_probs, eps)


def test_layers_without_attention_are_refused() -> None:
    model = families.build("granite4")
    model.model.layers[1].self_attn = None
    with pytest.raises(UnsupportedModelError, match="state-space layers"):
        view(model, 9)

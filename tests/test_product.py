"""Products with weights in half precision, held to float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heat_fast.decoder import product as module
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.product import affine, multiplier, product, widened
from heat_fast.kernels import dispatch

half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without half-precision arithmetic, and pieces that small matrices have several of."""
    monkeypatch.setattr(module, "has_instructions", lambda _: False)
    monkeypatch.setattr(module, "_PIECE", 64)
    monkeypatch.setattr(module, "_LOT", 0)
    monkeypatch.setattr(module, "_LEAST_ROWS", 12)


def check(actual: Tensor, x: Tensor, matrix: Tensor, offset: Tensor | float) -> None:
    """Half an ulp for the one rounding, and float32's own errors of the sum."""
    offset = offset.double() if isinstance(offset, Tensor) else offset
    exact = x.double() @ matrix.double() + offset
    size = x.double().abs() @ matrix.double().abs() + abs(offset)
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs()
    sums = matrix.shape[0] * torch.finfo(torch.float32).eps * size
    assert actual.shape == exact.shape
    assert bool(((actual.double() - exact).abs() <= rounding + sums).all())


@half
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(1,), (12,), (31,), (2, 3, 5), (0,)], ids=str)
def test_widened_products_are_rounded_once(
    dtype: torch.dtype, transposed: bool, shape: tuple[int, ...], no_instructions: None
) -> None:
    x = torch.randn(*shape, 37).to(dtype)
    weight = torch.randn(23, 37) if transposed else torch.randn(37, 23)
    matrix = weight.to(dtype).t() if transposed else weight.to(dtype)
    offset = torch.randn(23).to(dtype)
    assert widened(x, matrix).dtype == dtype
    check(widened(x, matrix), x, matrix, 0.0)
    check(widened(x, matrix, offset), x, matrix, offset)
    check(product(x, matrix), x, matrix, 0.0)


@half
def test_where_torch_is_kept(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = torch.randn(5, 7).to(dtype), torch.randn(8, 7).to(dtype)
    monkeypatch.setattr(module, "has_instructions", lambda _: False)
    assert multiplier(rows, weight) == "widened"
    assert multiplier(rows[:1, :5], weight.t()) == "widened"
    assert multiplier(rows[:7], weight) == "reference"  # dot products of few rows
    assert multiplier(rows.double(), weight.double()) == "reference"
    assert multiplier(rows.to("meta"), weight.to("meta")) == "reference"
    with pytest.raises(RuntimeError, match="dtype"):
        product(rows.float(), weight.t())
    monkeypatch.setattr(module, "has_instructions", lambda _: True)
    assert multiplier(rows, weight) == "onednn"
    torch.testing.assert_close(product(rows, weight.t()), rows @ weight.t(), rtol=0, atol=0)
    torch.testing.assert_close(
        affine(rows, weight, None), nn.functional.linear(rows, weight), rtol=0, atol=0
    )


@half
@pytest.mark.parametrize(
    "shape", [(1,), (5,), (16,), (31,), (45,), (3, 64), (3, 7, 5), (0,)], ids=str
)
def test_torch_meets_few_numbers_of_rows(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added is taken away again, and nothing else changes."""
    met: list[int] = []

    def linear(rows: Tensor, *others: Any) -> Tensor:
        met.append(rows[..., 0].numel())
        return plain(rows, *others)

    plain = nn.functional.linear
    monkeypatch.setattr(module, "has_instructions", lambda _: True)
    monkeypatch.setattr(module.functional, "linear", linear)
    x, weight = torch.randn(*shape, 37).to(dtype), torch.randn(23, 37).to(dtype)
    offset = torch.randn(23).to(dtype)
    layer = nn.Linear(37, 23, dtype=dtype)
    layer.load_state_dict({"weight": weight, "bias": offset})
    for y in (affine(x, weight, offset), Linear(layer).forward(x)):
        torch.testing.assert_close(y, plain(x, weight, offset))
    assert set(met) <= {0, 1, 2, 4, 8, 16, 32, 64, 128, 192} and len(met) == 2
    torch.testing.assert_close(product(x, weight.t()), x @ weight.t())
    affine(x.double(), weight.double(), None)
    assert met[-1] == x[..., 0].numel()


needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (31,), (32,), (45,), (3, 7, 5), (0,)], ids=str)
def test_onednn_where_mkl_passes_over_the_cpu(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "passed_over_by_mkl", lambda: True)
    x, weight, offset = torch.randn(*shape, 37), torch.randn(23, 37), torch.randn(23)
    y = torch.randn(*shape, 23)
    with dispatch.using("auto", torch.device("cpu")) as ran:
        check(affine(x, weight, offset), x, weight.t(), offset)
        check(product(x, weight.t()), x, weight.t(), 0.0)
        check(product(y, weight), y, weight, 0.0)  # the adjoint reads the weight along its rows
        check(product(y, weight[:, 3:20]), y, weight[:, 3:20], 0.0)
    assert ran == {"product": {"onednn"}}
    with dispatch.using("reference", torch.device("cpu")) as ran:
        product(x, weight.t())
    assert ran == {"product": {"reference"}}
    assert multiplier(x.requires_grad_(), weight) == "reference"
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert multiplier(x.detach(), weight) == "reference"


def test_mkl_passes_over_others_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(capability: str, maker: str, *, mkl: bool = True) -> bool:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        monkeypatch.setattr(module, "_CPUINFO", str(tmp_path / "cpuinfo"))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        return module.passed_over_by_mkl.__wrapped__()

    assert not told("AVX512", "AuthenticAMD", mkl=False)
    assert not told("AVX2", "AuthenticAMD")
    assert not told("AVX512", "GenuineIntel")
    assert told("AVX512", "AuthenticAMD")
    monkeypatch.setattr(module, "_CPUINFO", str(tmp_path / "none"))
    for name in ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "Intel64 Family 6"):
        monkeypatch.setattr(module.platform, "processor", lambda name=name: name)
        assert module.passed_over_by_mkl.__wrapped__() == ("AMD" in name)


@half
def test_instructions_are_those_that_torch_uses(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switched off by the user, torch's library of products has none."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: True)
    assert module.has_instructions(dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not module.has_instructions(dtype)


@half
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_read_both_ways(dtype: torch.dtype, bias: bool, no_instructions: None) -> None:
    layer = nn.Linear(37, 23, bias=bias, dtype=dtype)
    linear = Linear(layer)
    x, y_bar = torch.randn(9, 37).to(dtype), torch.randn(9, 23).to(dtype)
    y = linear.forward(x)
    check(y, x, layer.weight.t().detach(), layer.bias.detach() if bias else 0.0)
    assert not y.requires_grad
    check(linear.tangent(x), x, layer.weight.t().detach(), 0.0)
    check(linear.adjoint(y_bar, 37), y_bar, layer.weight.detach(), 0.0)

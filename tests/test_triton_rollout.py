"""The gate's GPU kernels against the reference in float64.

They run on the GPU where there is one, else in Triton's interpreter. An error is held against that
of the reference in the kernel's own input precision with float32 sums, and may be four times as
large, for sums in another order, plus a few units of float32's last place.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast import gpu
from heat_fast.errors import ConfigError
from heat_fast.kernels.branch_attention import Masking, branch_attention
from heat_fast.kernels.value_norm_rollout import attention_flow, value_output_norms

MASKINGS = {
    "full": Masking(0.3),
    "window": Masking(0.3, window=17),
    "window_softcap": Masking(0.3, window=40, softcap=1.2),
}
# The interpreter's bfloat16 is wrong in products and sums (its own limitation).
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)

ROUNDING = 2.0**-23


def poisoned(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations are likely to get."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 20):
        torch.full((size,), float("nan"), device=device)


def inputs(
    heads: int, group: int, length: int, queries: int, width: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, group, queries, width, generator=generator)
    key = torch.randn(heads, length, width, generator=generator)
    return query.to(dtype), key.to(dtype)


def log_sum_exp(query: Tensor, key: Tensor, masking: Masking) -> Tensor:
    queries = query.shape[2]
    below = key[:, : key.shape[1] - queries].double()
    own = key[:, key.shape[1] - queries :].double()
    _, normaliser = branch_attention(
        query[:, None].double(), own[:, None], own[:, None], below, below, masking, impl="reference"
    )
    return normaliser[:, 0]


def check(name: str, exact: Tensor, low: Tensor, found: Tensor) -> None:
    """`found` is about as near to `exact` as `low`, which took the same inputs in float32."""
    assert found.dtype == torch.float32
    floor = float((low.double().cpu() - exact).abs().max())
    scale = float(exact.abs().max())
    assert_close(name, exact, found.cpu(), rtol=0, atol=4 * floor + 16 * ROUNDING * scale)


@pytest.mark.parametrize(
    ("masking", "dtype"),
    [
        *((name, torch.float32) for name in MASKINGS),
        *(("window_softcap", dtype) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("length", "queries", "targets", "per_head"),
    [(1, 1, 1, False), (63, 63, 1, False), (130, 70, 3, True), (130, 5, 17, False)],
)
def test_attention_flow(
    masking: str,
    length: int,
    queries: int,
    targets: int,
    per_head: bool,
    dtype: torch.dtype,
    triton_device: torch.device,
) -> None:
    chosen = MASKINGS[masking]
    query, key = inputs(2, 2, length, queries, 40, dtype, seed=length + targets)
    normaliser = log_sum_exp(query, key, chosen)
    shape = (2, 2, targets, queries) if per_head else (targets, queries)
    rho = torch.rand(shape, dtype=torch.float64)
    exact = attention_flow(query.double(), key.double(), normaliser, rho, chosen)
    single = query, key, normaliser.float(), rho.float()
    low = attention_flow(*single, chosen, impl="reference")
    poisoned(triton_device)
    moved = [part.to(triton_device) for part in single]
    found = attention_flow(*moved, chosen, impl="triton")
    check("flow", exact, low, found)
    again = attention_flow(*moved, chosen, impl="triton")
    assert torch.equal(found, again), "the same call gave another result"


@pytest.mark.parametrize(("seed", "width"), [(0, 64), (1, 80), (2, 96), (3, 128), (4, 256)])
def test_attention_flow_of_every_head_width(
    seed: int, width: int, triton_device: torch.device
) -> None:
    masking = Masking(width**-0.5)
    query, key = inputs(1, 2, 70, 70, width, torch.float32, seed)
    normaliser = log_sum_exp(query, key, masking)
    rho = torch.rand(1, 70, dtype=torch.float64)
    exact = attention_flow(query.double(), key.double(), normaliser, rho, masking)
    single = query, key, normaliser.float(), rho.float()
    low = attention_flow(*single, masking, impl="reference")
    moved = [part.to(triton_device) for part in single]
    check("flow", exact, low, attention_flow(*moved, masking, impl="triton"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("window", [None, 150, 40])
@pytest.mark.parametrize(("queries", "targets"), [(300, 1), (300, 17), (277, 1), (130, 2)])
def test_attention_flow_whose_queries_are_shared_out(
    queries: int,
    targets: int,
    window: int | None,
    capability: int,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One head makes few programs; tiles lie on the diagonal, under it, and on a window's edge."""
    pick = gpu.for_architecture
    monkeypatch.setattr(gpu, "for_architecture", lambda table, device: pick(table, capability))
    masking = Masking(0.3, window=window)
    query, key = inputs(1, 1, 300, queries, 16, torch.float32, queries + targets)
    normaliser = log_sum_exp(query, key, masking)
    rho = torch.rand(targets, queries, dtype=torch.float64)
    exact = attention_flow(query.double(), key.double(), normaliser, rho, masking)
    single = query, key, normaliser.float(), rho.float()
    low = attention_flow(*single, masking, impl="reference")
    poisoned(triton_device)
    moved = [part.to(triton_device) for part in single]
    check("flow", exact, low, attention_flow(*moved, masking, impl="triton"))


def test_attention_flow_of_strided_views(triton_device: torch.device) -> None:
    masking = Masking(0.3)
    query, key = inputs(2, 3, 40, 40, 32, torch.float32, 0)
    normaliser = log_sum_exp(query, key, masking).float()
    rho = torch.rand(45, 50)[3:5, 10:]
    expected = attention_flow(query, key, normaliser, rho, masking, impl="reference")
    wide = torch.full((3, 40, 3, 40), float("nan"), device=triton_device)
    wide[:2, :, :, :32] = query.to(triton_device).transpose(1, 2)
    views = wide[:2, :, :, :32].transpose(1, 2), key.to(triton_device).mT.contiguous().mT
    found = attention_flow(
        *views, normaliser.to(triton_device), rho.to(triton_device), masking, impl="triton"
    )
    assert_close("flow", expected, found, rtol=16 * ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "outputs", "width", "group", "transposed"),
    [(1, 1, 64, 1, False), (63, 130, 80, 2, False), (130, 63, 256, 1, True), (7, 1030, 5, 1, True)],
)
def test_value_output_norms(
    length: int,
    outputs: int,
    width: int,
    group: int,
    transposed: bool,
    dtype: torch.dtype,
    triton_device: torch.device,
) -> None:
    value = torch.randn(2, length, width).to(dtype)
    weight = torch.randn(outputs, 2 * group * width).to(dtype)
    exact = value_output_norms(value.double(), weight.double(), torch.float64)
    low = value_output_norms(value.float(), weight.float(), torch.float32, impl="reference")
    moved = weight.to(triton_device)
    if transposed:  # as GPT-2 stores it
        moved = moved.t().contiguous().t()
    poisoned(triton_device)
    found = value_output_norms(value.to(triton_device), moved, torch.float32, impl="triton")
    check("norms", exact, low, found)


def test_what_the_kernels_do_not_take(triton_device: torch.device) -> None:
    value = torch.ones(1, 2, 300, device=triton_device)
    weight = torch.ones(3, 300, device=triton_device)
    with pytest.raises(ConfigError, match="impl='triton'"):
        value_output_norms(value, weight, torch.float32, impl="triton")
    with pytest.raises(ConfigError, match="impl='triton'"):
        value_output_norms(value.double(), weight.double(), torch.float64, impl="triton")

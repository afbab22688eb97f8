"""The GPU kernel of a low-rank operator's block norms against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from assertions import assert_close
from heat_fast.kernels.low_rank import block_norms


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    ("lead", "tokens", "width", "rank", "probes", "shared"),
    [((), 1, 1, 1, 1, True), ((2,), 3, 63, 5, 10, False), ((1,), 2, 130, 64, 17, True)],
)
def test_block_norms(
    lead: tuple[int, ...],
    tokens: int,
    width: int,
    rank: int,
    probes: int,
    shared: bool,
    seed: int,
    triton_device: torch.device,
) -> None:
    vectors = torch.randn(*lead, tokens, width, rank)
    values = torch.randn(*lead, 1 if shared else tokens, rank, dtype=torch.float64)
    samples = torch.arange(3, 3 + probes)
    exact = block_norms(vectors.double(), values, seed, samples)
    low = block_norms(vectors, values, seed, samples, impl="reference")
    torch.full((1 << 12,), float("nan"), device=triton_device)
    on_device = vectors.to(triton_device), values.to(triton_device)
    found = block_norms(*on_device, seed, samples, impl="triton")
    assert found.dtype == torch.float32
    floor = float((low.double() - exact).abs().max())
    # Sums of `width` and of `rank` terms, in another order than the reference's.
    assert_close("norms", exact, found, rtol=16 * 2.0**-23, atol=4 * floor)

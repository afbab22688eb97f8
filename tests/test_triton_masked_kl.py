"""The divergence's GPU kernel against the plain formula in float64.

It runs on the GPU where there is one, else in Triton's interpreter. Errors are held against those
of the reference on the same float32 inputs: at most four times as large, plus a floor in the
rounding of the logits, which is that of every term.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast.kernels.masked_kl import masked_kl_streamed

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)


def capped(raw: Tensor, softcap: float | None) -> Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def chunks(raw: Tensor, size: int) -> list[tuple[slice, Tensor]]:
    parts = [slice(low, min(low + size, raw.shape[-1])) for low in range(0, raw.shape[-1], size)]
    return [(part, raw[..., part]) for part in parts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("branches", "targets", "vocabulary", "chunk", "spread"),
    [(1, 1, 1, 1, 1.0), (5, 2, 130, 63, 1e-3), (6, 2, 5000, 4500, 0.3), (3, 1, 1000, 1000, 6.0)],
)
def test_masked_kl(
    branches: int,
    targets: int,
    vocabulary: int,
    chunk: int,
    spread: float,
    softcap: float | None,
    dtype: torch.dtype,
    triton_device: torch.device,
) -> None:
    base = (3 * torch.randn(targets, vocabulary)).to(dtype)
    raw = (base + spread * torch.randn(branches, targets, vocabulary)).to(dtype)
    target = torch.randint(vocabulary, (targets,))
    trunk = capped(base.double(), softcap)
    p, q = trunk.log_softmax(-1), capped(raw.double(), softcap).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    index = target.expand(branches, -1)[..., None]
    exact_drop = (p - q).gather(-1, index)[..., 0]

    trunk = capped(base.float(), softcap)
    inputs = trunk.log_softmax(-1), trunk.logsumexp(-1)
    low = masked_kl_streamed(*inputs, chunks(raw, chunk), target, softcap, impl="reference")
    moved = [part.to(triton_device) for part in inputs]
    torch.full((1 << 16,), float("nan"), device=triton_device)
    parts = chunks(raw.to(triton_device), chunk)
    found = masked_kl_streamed(*moved, parts, target.to(triton_device), softcap, impl="triton")
    rounding = 2.0**-24 * 16  # of a logit of up to 16
    for name, wanted, plain, got in zip(
        ("KL", "drop"), (exact, exact_drop), low, found, strict=True
    ):
        assert got.dtype == torch.float32
        floor = float((plain.double() - wanted).abs().max())
        # A term's error is that of its log-ratio, times the log-ratio itself for the divergence.
        ratio = float((base.double() - raw.double()).abs().max()) if name == "KL" else 1.0
        allowed = 4 * floor + 2 * rounding * ratio
        assert_close(name, wanted, got.cpu(), rtol=0, atol=allowed)


@pytest.mark.parametrize("spread", [0.1, 4.0])
@pytest.mark.parametrize("moved", [-60.0, -15.0, -8.0, -1.0, 1.0, 8.0, 15.0, 60.0])
def test_normalisers_far_from_the_trunks(
    moved: float, spread: float, triton_device: torch.device
) -> None:
    """Masking may move all logits, by nats: neither sum may cancel."""
    base = 3 * torch.randn(1, 3000)
    raw = base + moved + spread * torch.randn(4, 1, 3000)
    target = torch.tensor([7])
    p, q = base.double().log_softmax(-1), raw.double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    drop = (p - q)[:, :, 7]
    inputs = base.log_softmax(-1), base.logsumexp(-1), chunks(raw, 1024), target
    plain = masked_kl_streamed(*inputs, impl="reference")
    on_device = [part.to(triton_device) for part in inputs[:2]]
    parts = chunks(raw.to(triton_device), 1024)
    found = masked_kl_streamed(*on_device, parts, target.to(triton_device), impl="triton")
    rounding = 2.0**-24 * max(16.0, 2 * abs(moved))  # of a logit, which every term has
    for got in (plain, found):
        assert_close("KL", exact, got[0].cpu(), rtol=1e-5, atol=4 * rounding)
        assert_close("drop", drop, got[1].cpu(), rtol=1e-5, atol=4 * rounding)


def test_small_divergences_keep_their_digits(triton_device: torch.device) -> None:
    base = torch.randn(1, 3000).double()
    moved = base + 1e-4 * torch.randn(4, 1, 3000).double() + 1e-3
    base, moved = base.float(), moved.float()
    p = base.double().log_softmax(-1)
    q = moved.double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    kl, _ = masked_kl_streamed(
        base.log_softmax(-1).to(triton_device),
        base.logsumexp(-1).to(triton_device),
        chunks(moved.to(triton_device), 1024),
        torch.tensor([7], device=triton_device),
        impl="triton",
    )
    # Log-ratios of 1e-4 are rounded at 1e-6, and 3,000 such roundings average out.
    assert_close("KL", exact, kl.cpu(), rtol=0.01)


def test_what_overflows_is_infinite(triton_device: torch.device) -> None:
    base = torch.zeros(1, 100)
    moved = base.expand(3, 1, 100).clone()
    moved[1, 0, 3] = 200.0
    moved[2] = -200.0
    kl, _ = masked_kl_streamed(
        base.log_softmax(-1).to(triton_device),
        base.logsumexp(-1).to(triton_device),
        chunks(moved.to(triton_device), 64),
        torch.tensor([7], device=triton_device),
        impl="triton",
    )
    assert kl[0].item() == 0 and not kl[1:].isfinite().any()

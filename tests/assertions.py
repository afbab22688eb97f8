"""The one comparison the tests use: it always prints the error it saw."""

from __future__ import annotations

from typing import Any

import torch


def assert_close(
    name: str,
    expected: Any,
    actual: Any,
    *,
    rtol: float,
    atol: float = 0.0,
    elementwise: bool = False,
) -> None:
    """Fail unless `actual` is within `atol + rtol * scale` of `expected` everywhere.

    `scale` is max|expected| (an error is held against the size of the whole quantity, so entries
    that happen to be near zero do not decide), or |expected| entry by entry with `elementwise`.
    Both are compared in float64 on the CPU. The largest absolute and relative error and the index
    where it stands are printed on success too (pytest shows them with -s or on failure).
    """
    left = torch.as_tensor(expected, dtype=torch.float64, device="cpu").detach()
    right = torch.as_tensor(actual, dtype=torch.float64, device="cpu").detach()
    assert left.shape == right.shape, (
        f"{name}: shapes differ: expected {tuple(left.shape)}, got {tuple(right.shape)}"
    )
    assert left.numel() > 0, f"{name}: nothing to compare, both are empty"
    for label, values in (("expected", left), ("actual", right)):
        bad = int((~values.isfinite()).sum())
        assert bad == 0, f"{name}: {bad} non-finite of {values.numel()} entries in {label}"

    error = (left - right).abs()
    largest = float(left.abs().max())
    scale = left.abs() if elementwise else torch.full_like(left, largest)
    excess = error - (atol + rtol * scale)
    worst = int((excess if elementwise else error).argmax())
    where = tuple(int(index) for index in torch.unravel_index(torch.tensor(worst), left.shape))
    relative = float(error.flatten()[worst]) / max(float(scale.flatten()[worst]), 1e-300)
    report = (
        f"{name}: max abs error {float(error.max()):.3e}, relative {relative:.3e} "
        f"({'entry' if elementwise else 'max-norm'}; max|expected| {largest:.3e}), at {where}: "
        f"expected {float(left.flatten()[worst]):.12g}, got {float(right.flatten()[worst]):.12g} "
        f"(allowed rtol {rtol:.1e}, atol {atol:.1e})"
    )
    print(report)
    assert bool((excess <= 0).all()), report

"""The search for races and stray addresses finds those planted here, and nothing in sound kernels.

Each of these kernels gives the right result in the interpreter, whose programs run in order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heat_fast import gpu

if not gpu.interpreted():
    pytest.skip("Triton's interpreter is not in use", allow_module_level=True)

import triton
import triton.language as tl

from sanitizer import Unsafe, sanitized


@triton.jit
def doubled_kernel(x, y, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < length), mask=at < length)


@triton.jit
def unmasked_kernel(x, y, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), mask=at < length)


@triton.jit
def overwritten_kernel(x, y, length, BLOCK: tl.constexpr):
    """Every program writes the last number."""
    tl.store(y + length - 1, tl.load(x + length - 1))


@triton.jit
def summed_kernel(x, y, length, BLOCK: tl.constexpr):
    """A program adds to what another leaves behind."""
    before = tl.program_id(0)
    tl.store(y + before + 1, tl.load(y + before) + tl.load(x + before))


@triton.jit
def read_again_kernel(x, y, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < length), mask=at < length)
    back = (tl.program_id(0) + 1) * BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(y + length + at, tl.load(y + back, mask=back < length), mask=at < length)


@triton.jit
def reversed_in_place_kernel(x, y, length, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(y + at, mask=at < length)
    tl.store(y + BLOCK - 1 - at, values, mask=at < length)


@triton.jit
def crowded_kernel(x, y, length, BLOCK: tl.constexpr):
    """Lanes of one store write the same number's place."""
    at = tl.arange(0, BLOCK)
    tl.store(y + at * 0, tl.load(x + at, mask=at < length), mask=at < length)


@triton.jit
def atomic_kernel(x, y, length, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.load(x + tl.program_id(0)))


def launch(kernel: Any, programs: int = 3) -> None:
    x, y = torch.arange(10.0), torch.zeros(20)
    kernel[(programs,)](x, y, len(x), BLOCK=4)


@pytest.mark.parametrize(
    ("kernel", "programs", "found"),
    [
        (unmasked_kernel, 3, r"unmasked_kernel: a load outside: address .*, in none of x, y"),
        (overwritten_kernel, 3, "two programs write byte 36 of y"),
        (summed_kernel, 3, "a program reads what another writes: byte 4 of y"),
        (read_again_kernel, 3, "a program reads what it wrote"),
        (reversed_in_place_kernel, 1, "a program writes over what it read"),
        (crowded_kernel, 1, "lanes of one store disagree"),
        (atomic_kernel, 3, "an atomic"),
    ],
)
def test_planted_faults_are_found(kernel: Any, programs: int, found: str) -> None:
    with sanitized(), pytest.raises((Unsafe, triton.runtime.errors.InterpreterError), match=found):
        launch(kernel, programs)
    if kernel is not unmasked_kernel:
        launch(kernel, programs)  # no longer watched


def test_what_lies_behind_a_view_is_not_the_kernels() -> None:
    memory = torch.zeros(20)
    with sanitized():
        doubled_kernel[(2,)](torch.arange(10.0), memory, 5, BLOCK=4)
        with pytest.raises(triton.runtime.errors.InterpreterError, match="a store outside"):
            doubled_kernel[(2,)](torch.arange(10.0), memory[:5], 6, BLOCK=4)
        doubled_kernel[(2,)](torch.arange(10.0)[::2], memory, 5, BLOCK=4)


@triton.jit
def of_a_pair_kernel(pair, y, length, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(pair[0] + at) + tl.load(pair[1] + at), mask=at < length)


def test_tensors_in_tuples_are_given_too() -> None:
    x, y = torch.arange(4.0), torch.zeros(4)
    with sanitized():
        of_a_pair_kernel[(1,)]((x, x), y, 4, BLOCK=4)
    assert y.tolist() == [0.0, 2.0, 4.0, 6.0]


@triton.jit
def described_kernel(x, y, length, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [length], [1], [BLOCK])
    target = tl.make_tensor_descriptor(y, [length], [1], [BLOCK])
    at = tl.program_id(0) * BLOCK
    target.store([at], source.load([at]))


def test_descriptors_are_watched() -> None:
    x, y = torch.arange(10.0), torch.zeros(10)
    with sanitized():
        described_kernel[(3,)](x, y, 10, BLOCK=4)
        with pytest.raises(triton.runtime.errors.InterpreterError, match="a load outside"):
            described_kernel[(3,)](x[:9], y, 10, BLOCK=4)
    assert torch.equal(x, y)


def test_a_sound_kernel_passes() -> None:
    with sanitized() as launched:
        launch(doubled_kernel)
    assert launched == ["doubled_kernel"]


def test_views_of_one_memory_are_told_apart_by_address() -> None:
    memory = torch.arange(20.0)
    with sanitized():
        doubled_kernel[(3,)](memory[:10], memory[10:], 10, BLOCK=4)
        with pytest.raises(Unsafe, match="a program reads what another writes"):
            doubled_kernel[(3,)](memory[:10], memory[4:14], 10, BLOCK=4)

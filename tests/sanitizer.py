"""Looks for races and stray addresses in Triton's kernels, in the interpreter: no GPU is needed.

The interpreter runs one program after another, so a kernel in which two programs share memory
comes out right there and wrong on a GPU, where their order is anybody's. What is kept here of every
launch are the addresses: which program wrote and which read them.

- A load or a store must fall between the first and the last number of a tensor that the kernel was
  given (into gaps between its rows, too).
- What a program writes, no other program may write or read in the same launch.
- What a program wrote, it may not read again, nor write over what it read: its threads wait for
  each other only at barriers, and a load and a store need not share out a tile in the same way.
- The lanes of one store that meet at an address must store the same number.

Addresses are those of the numbers: two that overlap without beginning alike are not noticed.
Atomics are none of these; no kernel here has any, and one that came would be refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from triton.runtime import interpreter

Addresses = numpy.ndarray[Any, Any]


class Unsafe(AssertionError):
    """A kernel that would not be safe on a GPU, and what it did."""


@dataclass
class _Accesses:
    """Distinct addresses that programs met in one launch, those of the running program apart."""

    current: list[Addresses] = field(default_factory=list)
    finished: list[tuple[int, Addresses]] = field(default_factory=list)

    def add(self, addresses: Addresses) -> None:
        self.current.append(addresses)

    def meets(self, addresses: Addresses) -> bool:
        """Whether the running program has met any of these."""
        return any(numpy.isin(addresses, met).any() for met in self.current)

    def finish(self, program: int) -> None:
        if self.current:
            self.finished.append((program, numpy.unique(numpy.concatenate(self.current))))
        self.current = []

    def pairs(self) -> tuple[Addresses, Addresses]:
        """Addresses in ascending order, and the program that met each; a pair comes once."""
        if not self.finished:
            return numpy.empty(0, numpy.uint64), numpy.empty(0, numpy.int64)
        addresses = numpy.concatenate([each for _, each in self.finished])
        programs = numpy.repeat(
            [program for program, _ in self.finished], [len(each) for _, each in self.finished]
        )
        order = numpy.argsort(addresses, kind="stable")
        return addresses[order], programs[order]


class _Launch:
    """One launch of one kernel over tensors."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name = name
        self.tensors = {
            argument: (tensor.data_ptr(), _extent(tensor))
            for argument, tensor in _tensors(arguments)
            if tensor.numel()
        }
        self.written, self.read = _Accesses(), _Accesses()
        self.program = -1

    def place(self, address: int) -> str:
        """An address in words: the tensor and the byte in it."""
        for argument, (first, size) in self.tensors.items():
            if first <= address < first + size:
                return f"byte {address - first} of {argument}"
        return f"address {address:#x}, in none of {', '.join(self.tensors)}"

    def inside(self, addresses: Addresses, bytes_each: int, what: str) -> None:
        outside = numpy.ones(addresses.shape, bool)
        for first, size in self.tensors.values():
            outside &= (addresses < first) | (addresses + numpy.uint64(bytes_each) > first + size)
        if outside.any():
            raise Unsafe(f"{self.name}: {what} outside: {self.place(int(addresses[outside][0]))}")

    def load(self, addresses: Addresses, bytes_each: int) -> None:
        self.inside(addresses, bytes_each, "a load")
        if self.written.meets(addresses):
            raise Unsafe(f"{self.name}: a program reads what it wrote")
        self.read.add(addresses)

    def store(self, addresses: Addresses, values: Addresses, bytes_each: int) -> None:
        self.inside(addresses, bytes_each, "a store")
        if self.read.meets(addresses):
            raise Unsafe(f"{self.name}: a program writes over what it read")
        distinct, first = numpy.unique(addresses, return_index=True)
        if len(distinct) < len(addresses):
            kept = values[first][numpy.searchsorted(distinct, addresses)]
            if kept.tobytes() != values.tobytes():
                raise Unsafe(f"{self.name}: lanes of one store disagree")
        self.written.add(distinct)

    def next_program(self, program: int) -> None:
        self.written.finish(self.program)
        self.read.finish(self.program)
        self.program = program

    def finish(self) -> None:
        self.next_program(-1)
        written, writers = self.written.pairs()
        twice = written[1:] == written[:-1]
        if twice.any():
            raise Unsafe(
                f"{self.name}: two programs write {self.place(int(written[1:][twice][0]))}"
            )
        read, readers = self.read.pairs()
        if len(written) and len(read):
            at = numpy.searchsorted(written, read).clip(max=len(written) - 1)
            raced = (written[at] == read) & (writers[at] != readers)
            if raced.any():
                raise Unsafe(
                    f"{self.name}: a program reads what another writes: "
                    f"{self.place(int(read[raced][0]))}"
                )


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among arguments, and within tuples of them, by name."""
    for name, argument in arguments.items():
        if isinstance(argument, torch.Tensor):
            yield name, argument
        elif isinstance(argument, tuple):
            yield from _tensors({f"{name}[{at}]": each for at, each in enumerate(argument)})


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the beginning of a tensor's first number to the end of its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()


@contextmanager
def sanitized() -> Iterator[list[str]]:
    """Check every launch within; yields the names of the kernels launched so far.

    Raises:
        Unsafe: from the launch, when it is over or where it would have left its tensors (there
            within Triton's ``InterpreterError``).
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    saved = {
        (owner, name): getattr(owner, name)
        for owner, name in (
            (builder, "create_masked_load"),
            (builder, "create_masked_store"),
            (builder, "create_atomic_cas"),
            (builder, "create_atomic_rmw"),
            (builder, "set_grid_idx"),
            (executor, "__call__"),
        )
    }
    launches: list[_Launch] = []
    names: list[str] = []

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        met, size = _met(pointers, mask)
        launches[-1].load(met, size)
        return saved[builder, "create_masked_load"](self, pointers, mask, *rest, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        met, size = _met(pointers, mask)
        values = numpy.broadcast_to(value.data, pointers.data.shape)[_where(pointers, mask)]
        launches[-1].store(met, values, size)
        return saved[builder, "create_masked_store"](self, pointers, value, mask, *rest, **options)

    def atomic(self: Any, *_: Any, **__: Any) -> Any:
        raise Unsafe(f"{launches[-1].name}: an atomic, whose order is anybody's")

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        saved[builder, "set_grid_idx"](self, x, y, z)
        columns, rows, _ = self.grid_dim
        launches[-1].next_program((z * rows + y) * columns + x)

    def call(self: Any, *arguments: Any, **options: Any) -> None:
        given = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
        launches.append(_Launch(self.fn.__name__, given))
        names.append(self.fn.__name__)
        try:
            saved[executor, "__call__"](self, *arguments, **options)
            launches[-1].finish()
        finally:
            launches.pop()

    replacements = (load, store, atomic, atomic, set_grid_idx, call)
    for (owner, name), replacement in zip(saved, replacements, strict=True):
        setattr(owner, name, replacement)
    try:
        yield names
    finally:
        for (owner, name), original in saved.items():
            setattr(owner, name, original)


def _where(pointers: Any, mask: Any) -> Addresses:
    return numpy.broadcast_to(mask.data, pointers.data.shape).astype(bool)


def _met(pointers: Any, mask: Any) -> tuple[Addresses, int]:
    """The addresses of the lanes that are not masked, and bytes behind each."""
    size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    return pointers.data[_where(pointers, mask)].astype(numpy.uint64), size

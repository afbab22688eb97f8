"""Compile every GPU kernel ahead of time, on any machine, and tell what each takes.

    python -m heat_fast.kernels.compile                   every kernel, dtype, tile, architecture
    python -m heat_fast.kernels.compile --arch 90 --op masked_kl --only bf16
    python -m heat_fast.kernels.compile --write kernels/COMPILED.md

Triton makes machine code without a GPU. The table holds, for each of an operation's `variants`, the
registers of a thread, its stack frame (spilled registers live there), the shared memory of a block,
the instructions that run on the matrix units, and the lengths of its loops: what a warp issues for
a tile is a cost that can be read without a GPU. A stack frame, or more shared memory than the
architecture has, is a failure; so is machine code that writes nothing: what Triton cannot place in
an architecture's memory it may turn into a trap.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

#: The architectures kernels are compiled for (A100, H100 and H200, B200): bytes of shared memory
#: that a block may ask for.
ARCHITECTURES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

#: Shorter ones wait.
SHORTEST_LOOP = 16

_WRITE = re.compile(r"\b(?:STG|UTMASTG|RED|ATOMG)\b")
# A loop ends on a condition; the retries of a wait lie behind the end and jump back without one.
_BRANCH = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d\s+BRA\b|BRA\.U\s+!?UP\d)[^;]*\b0x([0-9a-f]+)\b"
)
_MATRIX = re.compile(r"\b(?:[HIDQ]MMA|[HIQ]GMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Variant:
    """One kernel as it is shipped: what `variants(capability)` of an operation's module yields.

    `types` maps every argument that is not a `tl.constexpr` to its Triton type, in the order of the
    signature: `"*fp16"` (a pointer, taken to be aligned to 16 bytes), `"i32"`, `"fp32"`; `"i32:16"`
    for an integer that is a multiple of 16. `constants` are the `tl.constexpr` arguments. `label`
    tells variants of a kernel apart in the table: the dtype first, then what else differs.
    """

    kernel: Any
    label: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What a compiled variant takes; `failure` says why it cannot be shipped, or is empty."""

    operation: str
    kernel: str
    label: str
    capability: int
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    matrix: int
    loops: tuple[int, ...]
    failure: str = ""

    def row(self) -> str:
        """A line of the table."""
        cells = (
            f"sm_{self.capability}",
            self.kernel,
            self.label,
            self.warps,
            self.stages,
            self.registers,
            self.stack,
            self.shared,
            self.matrix,
            ", ".join(map(str, self.loops)),
        )
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


_HEADER = (
    "| arch | kernel | variant | warps | stages | registers | stack | shared bytes | matrix "
    "instructions | loops |\n|---|---|---|---|---|---|---|---|---|---|"
)


def operations() -> list[str]:
    """The operations that have a `triton.py`."""
    here = Path(__file__).resolve().parent
    return sorted(path.parent.name for path in here.glob("*/triton.py"))


def variants(operation: str, capability: int) -> Iterator[Variant]:
    """What an operation ships for an architecture, and each of its kernels for sizes of 1."""
    module = importlib.import_module(f"heat_fast.kernels.{operation}.triton")
    seen = set()
    for variant in module.variants(capability):
        yield variant
        if variant.kernel.__name__ not in seen:
            seen.add(variant.kernel.__name__)
            yield _of_ones(variant)


def _of_ones(variant: Variant) -> Variant:
    """A variant as a launch compiles it where every size and stride is 1.

    Triton makes a constant of an integer argument of 1, and a constant has no `.to()`; nothing but
    a compilation shows it, for the interpreter does not.
    """
    fixed = {param.name for param in variant.kernel.params if param.do_not_specialize}
    ones = {name: 1 for name, kind in variant.types.items() if kind[0] == "i" and name not in fixed}
    return replace(
        variant,
        label=f"{variant.label}, sizes 1",
        types={name: kind for name, kind in variant.types.items() if name not in ones},
        constants={**variant.constants, **ones},
    )


def compiled(operation: str, variant: Variant, capability: int) -> Usage:
    """Compile one variant and read what it takes from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    known = {*variant.types, *variant.constants}
    if known != set(names):
        raise TypeError(
            f"{variant.kernel.__name__} ({variant.label}): arguments {sorted(known ^ set(names))} "
            "are named twice, or missing: expected every one in `types` or in `constants`."
        )
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        kind = variant.types.get(name, "constexpr")
        signature[name] = kind.removesuffix(":16")
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, dict(variant.constants), attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, **variant.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _dump("-res-usage", file.name)
        instructions = _dump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {resources!r}.")
    registers, stack = int(found[1]), int(found[2])
    shared = int(kernel.metadata.shared)
    failures = []
    if stack:
        failures.append(f"{stack} bytes of stack")
    if shared > ARCHITECTURES[capability]:
        failures.append(f"{shared} bytes of shared memory of {ARCHITECTURES[capability]}")
    if not _WRITE.search(instructions):
        failures.append("it writes nothing to memory")
    return Usage(
        operation,
        variant.kernel.__name__,
        variant.label,
        capability,
        variant.warps,
        variant.stages,
        registers,
        stack,
        shared,
        len(_MATRIX.findall(instructions)),
        loop_lengths(instructions),
        ", ".join(failures),
    )


def loop_lengths(instructions: str) -> tuple[int, ...]:
    """The instructions, of 16 bytes, that each branch backwards jumps over, in their order.

    Loops of a few, in which a thread waits for others, are left out.
    """
    branches = ((int(at, 16), int(to, 16)) for at, to in _BRANCH.findall(instructions))
    lengths = ((at - to) // 16 + 1 for at, to in branches)
    return tuple(length for length in lengths if length >= SHORTEST_LOOP)


def _dump(option: str, path: str) -> str:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def _compile_one(job: tuple[str, int, int]) -> Usage:
    operation, capability, index = job
    variant = list(variants(operation, capability))[index]
    try:
        return compiled(operation, variant, capability)
    except Exception as error:  # the others are still wanted
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        name, label = variant.kernel.__name__, variant.label
        sizes = (variant.warps, variant.stages, 0, 0, 0, 0, ())
        return Usage(operation, name, label, capability, *sizes, reason)


def main(arguments: list[str] | None = None) -> int:
    """Compile what was asked for, print the table; 1 if anything cannot be shipped."""
    parser = argparse.ArgumentParser(prog="python -m heat_fast.kernels.compile")
    parser.add_argument("--op", action="append", choices=operations(), help="an operation")
    parser.add_argument("--arch", action="append", type=int, choices=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="variants whose label has this text")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels: unset it to compile them")
    jobs = [
        (operation, capability, index)
        for operation in chosen.op or operations()
        for capability in chosen.arch or ARCHITECTURES
        for index, variant in enumerate(variants(operation, capability))
        if chosen.only in variant.label
    ]
    done: list[Usage] = []
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for usage in pool.map(_compile_one, jobs):
            done.append(usage)
            print(usage.row() + (f" FAILED: {usage.failure}" if usage.failure else ""), flush=True)
    failed = [usage for usage in done if usage.failure]
    print(f"{len(done)} compiled, {len(failed)} cannot be shipped")
    if chosen.write is not None:
        chosen.write.write_text(_table(done))
    return 1 if failed else 0


def _table(done: list[Usage]) -> str:
    import triton

    parts = [
        "# Compiled kernels\n",
        f"By `make kernels`, triton {triton.__version__}, no GPU: registers a thread, bytes of "
        "stack a thread (0: nothing is spilled), bytes of shared memory a block, matrix-unit "
        "instructions in the machine code, the instructions in each of its loops.",
    ]
    for operation in dict.fromkeys(usage.operation for usage in done):
        rows = [usage.row() for usage in done if usage.operation == operation]
        parts.append("\n".join([f"\n## {operation}\n", _HEADER, *rows]))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())

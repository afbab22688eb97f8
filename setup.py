"""Build steps that pyproject.toml cannot express: the compiled extensions of ``csrc/``.

Without a C++ compiler the package still installs and runs on torch alone; the build then says so,
and ``heat_fast.build_info()`` tells at run time. ``HEAT_FAST_NATIVE=0`` leaves the CPU extension
out, ``HEAT_FAST_NATIVE=1`` makes a failure to build it an error. ``HEAT_FAST_CUDA`` does the same
for the CUDA extension, which by default is built where nvcc is found;
``HEAT_FAST_CUDA_ARCHS="90"`` (or ``"80 90"``) compiles it for some architectures only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

SOURCES = ("bindings", "parallel", "kernels_base", "kernels_avx2", "kernels_avx512")
CUDA_SOURCES = ("contract", "block_norms", "windows")
#: Ampere, Ada, Hopper and Blackwell, for data centres and desks; what is newer compiles the PTX.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
_NO_NVCC = "nvcc is in none of CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda"


def wanted(name: str, environment: Mapping[str, str]) -> bool | None:
    """``0`` and ``1`` of an environment variable; None where it is not set."""
    value = environment.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r}: expected 0 (leave out) or 1 (demand). Correct it.")
    return None if value == "" else value == "1"


def find_nvcc(environment: Mapping[str, str], default: Path = Path("/usr/local/cuda")) -> str:
    """The compiler's path, empty without one."""
    homes = [environment.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in homes if home]
    folders += [environment.get("PATH", ""), str(default / "bin")]
    return shutil.which("nvcc", path=os.pathsep.join(filter(None, folders))) or ""


def cuda_compiler(
    environment: Mapping[str, str], default: Path = Path("/usr/local/cuda")
) -> str | None:
    """The nvcc to build the CUDA extension with; None to leave it out."""
    choice = wanted("HEAT_FAST_CUDA", environment)
    if choice is False:
        return None
    nvcc = find_nvcc(environment, default)
    if not nvcc and choice:
        raise SystemExit(
            f"HEAT_FAST_CUDA=1, but {_NO_NVCC}. Install the CUDA toolkit, or unset it."
        )
    return nvcc or None


def cuda_archs(environment: Mapping[str, str], known: set[int]) -> list[int]:
    """The architectures to compile for: those asked for, else those of ours that nvcc knows."""
    text = environment.get("HEAT_FAST_CUDA_ARCHS", "").replace(",", " ").split()
    if not text:
        return [arch for arch in CUDA_ARCHS if arch in known]
    asked = sorted({int(arch) if arch.isdigit() else 0 for arch in text})
    if asked[0] < 80 or not known.issuperset(asked):
        raise SystemExit(
            f"HEAT_FAST_CUDA_ARCHS={' '.join(text)!r}: expected numbers of at least 80 that this "
            f"nvcc knows ({' '.join(map(str, sorted(known)))}), such as '80 90'. Correct it."
        )
    return asked


def native_extension(choice: bool | None) -> Extension:
    """The CPU kernels."""
    return Pybind11Extension(
        "heat_fast._native",
        [f"csrc/{name}.cpp" for name in SOURCES],
        depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
        include_dirs=["csrc"],
        cxx_std=17,
        # Fused multiply-adds whatever the language standard; no errno from exp and sqrt.
        extra_compile_args=["-O3", "-ffp-contract=fast", "-fno-math-errno"],
        libraries=["dl"] if sys.platform == "linux" else [],
        optional=choice is not True,
    )


class CudaExtension(Pybind11Extension):
    """The CUDA kernels: nvcc compiles the ``.cu`` files, and links, for it knows its runtime."""

    def __init__(self, nvcc: str, archs: list[int], optional: bool) -> None:
        super().__init__(
            "heat_fast._cuda",
            ["csrc/cuda/bindings.cpp"],
            depends=[str(path) for path in sorted(Path("csrc/cuda").iterdir())],
            define_macros=[("HEAT_FAST_CUDA_ARCHS", '"{}"'.format(" ".join(map(str, archs))))],
            cxx_std=17,
            optional=optional,
        )
        self.nvcc = nvcc
        self.code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        self.code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")


class BuildExtensions(build_ext):
    """Builds the CUDA extension as well."""

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CudaExtension):
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(path).stat().st_mtime for path in (*ext.sources, *ext.depends))
        built_for = Path(self.build_temp, "cuda-code.txt")
        same = built_for.is_file() and built_for.read_text().split() == ext.code
        if same and not self.force and target.is_file() and target.stat().st_mtime > newest:
            return
        objects: list[str] = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *ext.code]
        for name in CUDA_SOURCES:
            out = str(Path(self.build_temp, f"{name}.o"))
            self.spawn(
                [ext.nvcc, *flags, f"--threads={jobs}", "-c", f"csrc/cuda/{name}.cu", "-o", out]
            )
            objects.append(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        hide = "-Xlinker=--exclude-libs=ALL"  # the runtime's own names
        link = ["-shared", "-cudart=static", "-Xlinker=-s", hide, *ext.code]
        self.spawn([ext.nvcc, *link, *objects, "-o", str(target)])
        built_for.write_text("\n".join(ext.code))


def extensions(environment: Mapping[str, str]) -> list[Extension]:
    """What is built here."""
    native = wanted("HEAT_FAST_NATIVE", environment)
    found = [] if native is False else [native_extension(native)]
    nvcc = cuda_compiler(environment)
    if nvcc is not None:
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False
        ).stdout.split()
        known = {int(name.removeprefix("compute_")) for name in listed if name[-1].isdigit()}
        archs = cuda_archs(environment, known)
        optional = wanted("HEAT_FAST_CUDA", environment) is None
        if archs:
            found.append(CudaExtension(nvcc, archs, optional))
        elif not optional:
            raise SystemExit(f"{nvcc} knows none of the architectures {CUDA_ARCHS}. Update it.")
    return found


def main(**options: Any) -> None:
    """Build the package."""
    ParallelCompile("MAX_JOBS", default=2).install()
    setup(ext_modules=extensions(os.environ), cmdclass={"build_ext": BuildExtensions}, **options)


if __name__ == "__main__":
    main()

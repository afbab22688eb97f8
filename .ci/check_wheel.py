"""Does a wheel work where nothing but the wheel is: `python .ci/check_wheel.py dist/*.whl`.

1. Its compiled modules need no library beyond the platform's, and `auditwheel` finds a manylinux
   tag that they are consistent with.
2. In a new virtual environment, in a folder that has no source tree, pip installs it with what it
   declares, at the versions of constraints.txt; the package is imported from there and its low-rank
   tests pass. The environment is removed at the end.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = re.compile(
    r"(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|ld-linux-[a-z0-9-]+)\.so\.\d+"
)
TESTS = ("test_low_rank.py", "conftest.py", "assertions.py")
#: What those tests need beside the package.
TOOLS = ("pytest", "hypothesis")

INSTALLED = """
import json, sys, heat_fast
info = heat_fast.build_info()
assert heat_fast.__file__.startswith(sys.prefix), heat_fast.__file__
print("imported from", heat_fast.__file__)
print("native:", info["native"], info.get("reason", info.get("instruction_sets")))
print("cuda:", info["cuda"])
missing = [name for name, there in (("_native", info["native"]), ("_cuda", info["cuda"]["built"]))
           if name in {modules!r} and not there]
sys.exit(f"in the wheel, but not importable: {{missing}}" if missing else 0)
"""


def needed(module: Path) -> set[str]:
    """The libraries that a compiled module asks the loader for."""
    with module.open("rb") as file:
        return {
            tag.needed
            for section in ELFFile(file).iter_sections()
            if isinstance(section, DynamicSection)
            for tag in section.iter_tags("DT_NEEDED")
        }


def check_libraries(wheel: Path, folder: Path) -> list[str]:
    """Print the libraries of every module; the modules' names."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    modules = sorted(folder.rglob("*.so"))
    if not modules:
        sys.exit(f"{wheel.name} holds no compiled module: expected one. Is there a compiler?")
    for module in modules:
        libraries = needed(module)
        print(f"{module.name}: {module.stat().st_size / 2**20:.1f} MiB, needs", *sorted(libraries))
        beyond = {name for name in libraries if not PLATFORM.fullmatch(name)}
        if beyond:
            sys.exit(f"{module.name} needs {sorted(beyond)}: expected the platform's own alone.")
    return [module.name.split(".")[0] for module in modules]


def check_tag(wheel: Path) -> None:
    """Print what auditwheel finds; no tag but the machine's own is a failure."""
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True
    )
    text = shown.stdout + shown.stderr
    found = re.search(r'following platform\s+tag:\s+"([^"]+)"', text)
    if shown.returncode or found is None or not found[1].startswith("manylinux"):
        sys.exit(f"auditwheel show {wheel.name}:\n{text}\nexpected a manylinux tag.")
    print(f"auditwheel: consistent with {found[1]}")


def check_installed(wheel: Path, modules: list[str], folder: Path) -> None:
    """Install, import and test it in an environment of its own."""
    python = folder / "environment" / "bin" / "python"
    # Nothing of this process' environment may lead back to the source tree.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: object) -> None:
        subprocess.run([str(part) for part in command], cwd=folder, env=kept, check=True)

    run(sys.executable, "-m", "venv", folder / "environment")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--no-compile")
    pinned = ("--constraint", ROOT / "constraints.txt")
    # torch first, as in the Makefile: nothing that depends on it may choose another build.
    run(*pip, *pinned, "torch")
    run(*pip, *pinned, wheel.resolve(), *TOOLS)
    run(python, "-c", INSTALLED.format(modules=modules))
    for name in TESTS:
        shutil.copy(ROOT / "tests" / name, folder)
    options = ("--import-mode=importlib", "--strict-markers", "-o", "pythonpath=.")
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, TESTS[0])


def main() -> None:
    """Check one wheel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args().wheel
    with tempfile.TemporaryDirectory(prefix="heat-fast-wheel-") as name:
        folder = Path(name)
        modules = check_libraries(wheel, folder / "contents")
        check_tag(wheel)
        shutil.rmtree(folder / "contents")
        check_installed(wheel, modules, folder)
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, works by itself")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed with {error.returncode}: {' '.join(error.cmd)}")

"""What setup.py decides about the CUDA extension, without compiling it, and what was built."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import heat_fast
from heat_fast import cuda

KNOWN = {75, 80, 86, 89, 90, 100, 120}


@pytest.fixture(scope="module")
def setup(repository: Path) -> ModuleType:
    """setup.py as a module: it builds only when it is run."""
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("heat_fast_setup", repository / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc(home: Path, knows: str = "") -> str:
    """A compiler that knows some architectures and compiles nothing."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho {knows}\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc_is_looked_for_in_order(setup: ModuleType, tmp_path: Path) -> None:
    homes = {name: tmp_path / name for name in ("CUDA_HOME", "CUDA_PATH", "path", "default")}
    paths = {name: nvcc(home) for name, home in homes.items()}
    environment = {name: str(homes[name]) for name in ("CUDA_HOME", "CUDA_PATH")}
    environment["PATH"] = str(homes["path"] / "bin")
    for name, variable in (
        ("CUDA_HOME", "CUDA_HOME"),
        ("CUDA_PATH", "CUDA_PATH"),
        ("path", "PATH"),
        ("default", ""),
    ):
        assert setup.find_nvcc(environment, homes["default"]) == paths[name]
        environment.pop(variable, None)
    assert setup.find_nvcc(environment, tmp_path / "nowhere") == ""


def test_the_environment_chooses(setup: ModuleType, tmp_path: Path) -> None:
    there = {"CUDA_HOME": str(tmp_path)}
    path, nowhere = nvcc(tmp_path), tmp_path / "nowhere"
    assert setup.cuda_compiler({**there}, nowhere) == path
    assert setup.cuda_compiler({**there, "HEAT_FAST_CUDA": "1"}, nowhere) == path
    assert setup.cuda_compiler({**there, "HEAT_FAST_CUDA": "0"}, nowhere) is None
    assert setup.cuda_compiler({}, nowhere) is None
    with pytest.raises(SystemExit, match="HEAT_FAST_CUDA=1, but nvcc is in none of"):
        setup.cuda_compiler({"HEAT_FAST_CUDA": "1"}, nowhere)
    with pytest.raises(SystemExit, match="HEAT_FAST_CUDA='yes': expected 0"):
        setup.cuda_compiler({**there, "HEAT_FAST_CUDA": "yes"}, nowhere)


def test_architectures(setup: ModuleType) -> None:
    assert setup.cuda_archs({}, KNOWN) == [80, 86, 89, 90, 100, 120]
    assert setup.cuda_archs({}, {75, 80, 90}) == [80, 90]
    assert setup.cuda_archs({"HEAT_FAST_CUDA_ARCHS": "90, 80"}, KNOWN) == [80, 90]
    for wrong in ("75", "sm_90", "90a", "130"):
        with pytest.raises(SystemExit, match="expected numbers of at least 80"):
            setup.cuda_archs({"HEAT_FAST_CUDA_ARCHS": wrong}, KNOWN)


def test_extensions(
    setup: ModuleType, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    path = nvcc(tmp_path, "compute_75 compute_80 compute_90 compute_90a")

    def built(**environment: str) -> dict[str, bool]:
        found = setup.extensions({"CUDA_HOME": str(tmp_path), **environment})
        return {extension.name: extension.optional for extension in found}

    assert built() == {"heat_fast._native": True, "heat_fast._cuda": True}
    assert built(HEAT_FAST_CUDA="0") == {"heat_fast._native": True}
    # What is demanded may not fail in silence.
    assert built(HEAT_FAST_CUDA="1", HEAT_FAST_NATIVE="0") == {"heat_fast._cuda": False}
    extension = setup.extensions({"CUDA_HOME": str(tmp_path), "HEAT_FAST_NATIVE": "0"})[0]
    assert extension.nvcc == path
    assert extension.code == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_a_compiler_that_is_too_old(setup: ModuleType, tmp_path: Path) -> None:
    nvcc(tmp_path, "compute_70 compute_75")
    environment = {"CUDA_HOME": str(tmp_path), "HEAT_FAST_NATIVE": "0"}
    assert setup.extensions(environment) == []
    with pytest.raises(SystemExit, match="knows none of the architectures"):
        setup.extensions({**environment, "HEAT_FAST_CUDA": "1"})


def test_build_info_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    info = heat_fast.build_info()["cuda"]
    if info["built"]:
        assert info["compiler"].startswith("nvcc ") and info["architectures"]
        major, minor = info["runtime"].split(".")
        assert int(major) >= 11 and minor.isdigit()
    monkeypatch.setattr(cuda, "_extension", None)
    monkeypatch.setattr(cuda, "_missing", "no module named heat_fast._cuda")
    expected = {"built": False, "reason": "no module named heat_fast._cuda"}
    assert heat_fast.build_info()["cuda"] == expected
    assert cuda.missing() == expected["reason"]


@pytest.mark.skipif(cuda.module() is None, reason=f"not built: {cuda.missing()}")
def test_the_module_links_neither_cuda_nor_torch() -> None:
    """It is imported where there is neither, and serves every torch."""
    listed = subprocess.run(
        ["ldd", cuda.module().__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "libstdc++" in listed
    for name in ("cuda", "torch", "c10", "not found"):
        assert name not in listed.replace(cuda.module().__file__, "")

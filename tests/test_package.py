"""The package as it is imported and installed."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import heat_fast

SIZE_LIMIT = 6 * 2**20

# Wall-clock seconds of one import in a fresh interpreter, without the interpreter's own start.
TIMER = """
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def python(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter, in a folder from which only installed modules are seen."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_submodules_of_the_readme_come_with_the_package(tmp_path: Path) -> None:
    names = ("baselines", "datasets", "demo", "metrics")
    code = f"import heat_fast; print([getattr(heat_fast, name).__name__ for name in {names}])"
    assert python(code, tmp_path).strip() == str([f"heat_fast.{name}" for name in names])


def test_every_public_name_resolves() -> None:
    assert len(set(heat_fast.__all__)) == len(heat_fast.__all__)
    for name in heat_fast.__all__:
        assert getattr(heat_fast, name) is not None
        assert name in dir(heat_fast)


def test_lazy_names_are_the_public_names() -> None:
    assert {*heat_fast._HOME, "__version__"} == set(heat_fast.__all__)
    for name, home in heat_fast._HOME.items():
        assert getattr(heat_fast, name) is getattr(importlib.import_module(home), name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"heat_fast.*no attribute 'attribut'"):
        heat_fast.attribut  # noqa: B018


def test_a_submodule_does_not_replace_a_public_name() -> None:
    # Importing heat_fast.x binds the attribute x of heat_fast to the module.
    submodules = {path.stem for path in Path(heat_fast.__path__[0]).iterdir()}
    assert submodules.isdisjoint(heat_fast.__all__)


def test_submodules_are_reachable_without_an_import(tmp_path: Path) -> None:
    assert python("import heat_fast; print(heat_fast.demo.__name__)", tmp_path).split() == [
        "heat_fast.demo"
    ]


def test_the_table_of_modules_is_true(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    layout = text.split("## Layout")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in layout.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(?:heat_fast/)?([^`]+?)/?`", " ".join(rows)))
    package = repository / "heat_fast"
    found = {path.name for path in package.iterdir() if path.is_dir() or path.suffix == ".py"}
    private = {name for name in found if name.startswith(("_", "."))}
    assert found - private - named == set(), "not in the table"
    gone = {
        name for name in named if not ((package / name).exists() or (repository / name).exists())
    }
    assert gone == set(), "in the table alone"


@pytest.mark.parametrize(
    "name",
    ["comparison", "generation", "journal", "metadata", "rows", "spans", "storage", "tables"],
)
def test_the_examples_of_docstrings_run(name: str) -> None:
    if name == "tables":
        pytest.importorskip("pandas")
    if name == "spans":
        pytest.importorskip("sentencex")
    outcome = doctest.testmod(importlib.import_module(f"heat_fast.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_version_is_the_installed_version() -> None:
    assert heat_fast.__version__ == metadata.version("heat-fast")


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = json.loads(
        python("import heat_fast, json, sys; print(json.dumps(sorted(sys.modules)))", tmp_path)
    )
    assert "heat_fast" in loaded
    assert {"torch", "numpy", "transformers", "rich", "typer"}.isdisjoint(loaded)


def test_import_time(tmp_path: Path) -> None:
    # The minimum of several alternating runs: a busy machine only ever adds time.
    def seconds(module: str) -> float:
        return float(python(TIMER.format(module=module), tmp_path))

    pairs = [(seconds("torch"), seconds("heat_fast")) for _ in range(3)]
    torch_time, own_time = (min(times) for times in zip(*pairs, strict=True))
    assert own_time < 1.5 * torch_time, f"heat_fast {own_time:.3f} s, torch {torch_time:.3f} s"


def test_only_one_top_level_package_is_importable(tmp_path: Path, repository: Path) -> None:
    # An editable install must not put the whole working tree on the path.
    code = (
        "import json, heat_fast.kernels\n"
        "from importlib.util import find_spec\n"
        "specs = [find_spec(name) for name in ('kernels', 'tests', 'bench', 'csrc')]\n"
        "print(json.dumps([list(spec.submodule_search_locations) for spec in specs if spec]))"
    )
    for locations in json.loads(python(code, tmp_path)):
        for location in locations:
            assert not Path(location).resolve().is_relative_to(repository)


def test_transformers_is_not_misled_by_the_kernels_folder(repository: Path) -> None:
    # From the root of the working tree, `kernels` is importable, and transformers takes a module
    # of that name with a fitting __version__ for the distribution it knows.
    assert not hasattr(importlib.import_module("heat_fast.kernels"), "__version__")
    code = (
        "from transformers.utils import is_kernels_available\n"
        "from transformers import LlamaForCausalLM\n"
        "print(is_kernels_available())"
    )
    assert python(code, repository).split() == ["False"]


@pytest.fixture(scope="module")
def wheels(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, set[str]]:
    """The files of the wheel built from the tree, and of the one built from the sdist."""
    root = tmp_path_factory.mktemp("build")
    tree = root / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(repository / name, tree)
    # bench and tests too: they must stay out by the configuration, not by their absence.
    for name in ("heat_fast", "kernels", "csrc", "bench", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(repository / name, tree / name, symlinks=True, ignore=ignored)

    # What is packed does not depend on the compiled extensions, and compiling takes a minute.
    monkeypatch = pytest.MonkeyPatch()
    request.addfinalizer(monkeypatch.undo)
    monkeypatch.setenv("HEAT_FAST_NATIVE", "0")
    monkeypatch.setenv("HEAT_FAST_CUDA", "0")

    def build(kind: str, source: Path, name: str) -> Path:
        out = root / name
        out.mkdir()
        python(f"from setuptools import build_meta as b; b.build_{kind}({str(out)!r})", source)
        (built,) = out.iterdir()
        return built

    def files(wheel: Path) -> set[str]:
        with zipfile.ZipFile(wheel) as archive:
            return set(archive.namelist())

    contents = {"tree": files(build("wheel", tree, "from_tree"))}
    sdist = build("sdist", tree, "sdist")
    shutil.unpack_archive(sdist, root / "unpacked")
    (unpacked,) = (root / "unpacked").iterdir()
    sources = {path.name for path in (repository / "csrc").iterdir()}
    assert sources - {"README.md"} <= {path.name for path in (unpacked / "csrc").iterdir()}
    contents["sdist"] = files(build("wheel", unpacked, "from_sdist"))
    return contents


def test_wheel_holds_the_package_and_nothing_else(
    wheels: dict[str, set[str]], repository: Path
) -> None:
    top_level = {name.split("/")[0] for name in wheels["tree"]}
    assert top_level == {"heat_fast", f"heat_fast-{heat_fast.__version__}.dist-info"}

    shipped = {".py", ".safetensors", ".json", ".md", ".typed"}
    package = repository / "heat_fast"
    expected = set()
    for folder, _, names in os.walk(package, followlinks=True):
        expected |= {Path(folder, name).relative_to(repository).as_posix() for name in names}
    modules = {name for name in expected if name.endswith(".py")}
    folders = ("heat_fast/demo/", "heat_fast/schema/")
    data = {name for name in expected if name.startswith(folders)}
    data = {name for name in data if Path(name).suffix in shipped}
    assert "heat_fast/kernels/__init__.py" in modules
    assert any(name.endswith(".safetensors") for name in data)
    assert "heat_fast/schema/attribution-2.json" in data
    templates = {name for name in expected if name.startswith("heat_fast/report/templates/")}
    assert "heat_fast/report/templates/page.html" in templates
    assert modules | data | templates | {"heat_fast/py.typed"} <= wheels["tree"]


def test_sdist_builds_the_same_wheel(wheels: dict[str, set[str]]) -> None:
    assert wheels["sdist"] == wheels["tree"]


def test_no_file_is_too_large_for_the_repository(repository: Path) -> None:
    if not (repository / ".git").exists():
        pytest.skip("not a git working tree")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [repository / name for name in listed.split("\0") if name]
    assert paths
    large = {str(path): path.stat().st_size for path in paths if path.is_file()}
    large = {path: size for path, size in large.items() if size > SIZE_LIMIT}
    assert not large


def test_type_checkers_see_the_submodules_that_need_no_import() -> None:
    tree = ast.parse(Path(heat_fast.__file__).read_text())
    told = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "heat_fast"
        for alias in node.names
    }
    assert told == heat_fast._SUBMODULES

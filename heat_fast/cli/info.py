"""``heat-fast info``: versions, devices and what was compiled."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from heat_fast._version import __version__
from heat_fast.cli import options
from heat_fast.cli.common import check_places, standard_output, write_json

_NEEDED = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "rich", "typer", "jinja2")
_OPTIONAL = (
    "triton",
    "pandas",
    "pyarrow",
    "sentencex",
    "matplotlib",
    "scipy",
    "scikit-learn",
)


def info(json_path: options.Json = None) -> None:
    """Show versions, devices, compiled kernels and supported models; send it with a report.

    Example: heat-fast info
    """
    check_places({"--json": json_path}, streams=("--json",))
    values = _gather()
    if json_path is not None:
        write_json(values, json_path)
    if json_path != "-":
        with standard_output() as stream:
            stream.write(_words(values))


def _gather() -> dict[str, Any]:
    import torch

    from heat_fast import gpu, native
    from heat_fast.decoder.product import passed_over_by_mkl
    from heat_fast.decoder.view import supported_classes

    return {
        "heat_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _NEEDED},
        "optional": {name: _version(name) for name in _OPTIONAL},
        "devices": [
            {"name": "cpu", "what": platform.processor() or platform.machine()},
            *(
                {
                    "name": f"cuda:{index}",
                    "what": torch.cuda.get_device_name(index),
                    "bytes": torch.cuda.get_device_properties(index).total_memory,
                }
                for index in range(torch.cuda.device_count())
            ),
        ],
        "threads": torch.get_num_threads(),
        "build": native.build_info(),
        "float32_products": "onednn" if passed_over_by_mkl() else "reference",
        "triton": gpu.missing() or "kernels can run",
        "models": list(supported_classes()),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _words(values: dict[str, Any]) -> str:
    build, cuda = values["build"], values["build"]["cuda"]

    def named(versions: dict[str, str | None]) -> str:
        return ", ".join(f"{name} {version or '(missing)'}" for name, version in versions.items())

    lines = {
        "heat_fast": values["heat_fast"],
        "python": f"{values['python']}, {values['platform']}",
        "packages": named(values["packages"]),
        "optional": named(values["optional"]),
        "devices": ", ".join(f"{each['name']} ({each['what']})" for each in values["devices"]),
        "threads": str(values["threads"]),
        "CPU kernels": (
            f"{build['instruction_set']}, {build['compiler']}"
            if build["native"]
            else f"none, torch alone ({build['reason']})"
        ),
        "float32": (
            "products by oneDNN, as MKL's keep to AVX2 on this CPU"
            if values["float32_products"] == "onednn"
            else "products by torch"
        ),
        "CUDA kernels": (
            f"{' '.join(cuda['architectures'])}, {cuda['compiler']}"
            if cuda["built"]
            else f"none ({cuda['reason']})"
        ),
        "Triton": values["triton"],
        "models": ", ".join(values["models"]),
    }
    width = max(map(len, lines))
    return "".join(f"{name:{width}}  {value}\n" for name, value in lines.items())

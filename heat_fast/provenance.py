"""What a result was made by: the model, where it was, and the versions."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from heat_fast._version import __version__


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, and of Python."""
    import transformers

    return {
        "heat_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def provenance(model: Any, embeddings: Tensor) -> dict[str, Any]:
    """The part of a result's metadata that every method shares, as JSON values."""
    return {
        "model": type(model).__name__,
        "name": str(getattr(model, "name_or_path", "") or ""),
        "device": str(embeddings.device),
        "dtype": str(embeddings.dtype).removeprefix("torch."),
        "versions": versions(),
    }

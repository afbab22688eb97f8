"""One short file per family of models; importing this package fills the registry.

To add a family: write a file with a builder `(model, length) -> Decoder` under `@family(...)`, name
it here, and add a tiny config that exercises its quirks to `tests/configurations.py`.
"""

from __future__ import annotations

from heat_fast.decoder.families import (
    cohere,
    deepseek,
    exaone4,
    gemma,
    glm,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    nemotron,
    olmo,
    opt,
    phi,
    phi3,
    stablelm,
    starcoder2,
)

__all__ = [
    "cohere",
    "deepseek",
    "exaone4",
    "gemma",
    "glm",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "llama",
    "nemotron",
    "olmo",
    "opt",
    "phi",
    "phi3",
    "stablelm",
    "starcoder2",
]

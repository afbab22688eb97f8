"""One short file per family of models; importing this package fills the registry.

To add a family: write a file with a builder `(model, length) -> Decoder` under `@family(...)`, name
it here, and add a tiny config that exercises its quirks to `tests/families.py`.
"""

from __future__ import annotations

from heat_fast.decoder.families import gemma, gpt2, gpt_neo, gpt_neox, gptj, llama, opt, phi3

__all__ = ["gemma", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "opt", "phi3"]

"""The two halves of the attention-value gate on a GPU; `reference.py` has the mathematics.

Their kernels and launches are in `norms.py` and `flow.py`, the sizes that they are shipped with in
`tiles.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from heat_fast.kernels.compile import Variant
from heat_fast.kernels.value_norm_rollout import flow, norms
from heat_fast.kernels.value_norm_rollout.flow import attention_flow
from heat_fast.kernels.value_norm_rollout.norms import value_output_norms

__all__ = ["attention_flow", "value_output_norms", "variants"]


def variants(capability: int) -> Iterator[Variant]:
    """Every configuration that is shipped for an architecture."""
    yield from norms.variants(capability)
    yield from flow.variants(capability)

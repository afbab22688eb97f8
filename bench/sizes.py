"""How large the benchmarks are: `HEAT_FAST_BENCH=small` makes them run in a minute or two.

Continuous integration runs them so, that none can rot; such times tell nothing and are not judged.
`HEAT_FAST_BENCH=full` adds what takes minutes by itself: every preset at 2,048 tokens, and the
memory of a deep model.
"""

from __future__ import annotations

import os

SMALL = os.environ.get("HEAT_FAST_BENCH") == "small"
FULL = os.environ.get("HEAT_FAST_BENCH") == "full"


def size(full: int) -> int:
    """A length or a count: `full`, or a sixteenth of it, at least 8, where all is small."""
    return max(full // 16, 8) if SMALL else full

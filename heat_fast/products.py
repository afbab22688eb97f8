"""Hessian-vector products against one trunk, in batches, for several targets at once.

One tangent sweep up serves every target; each takes its own sweep down. Products run in the model's
dtype, the directions scaled by a power of two to the size of X and g by one that brings its adjoint
near 1, so that half precision neither overflows nor underflows; they are returned in at least
float32. What was a product's work and count is told to the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from heat_fast.decoder.norm import wide
from heat_fast.kernels.rademacher import block_probes, dense_probes
from heat_fast.planner import Budget, run_batches, runs_alone, trim_heap
from heat_fast.progress import Ledger, Meter
from heat_fast.sweeps import hessian_rows, tangent_sweep
from heat_fast.trunk import TargetAdjoint, Trunk, require_finite


class Products:
    """Hessian-vector products of several targets against one trunk."""

    def __init__(
        self,
        trunk: Trunk,
        adjoints: Sequence[TargetAdjoint],
        seed: int,
        budget: Budget,
        ledger: Ledger,
        step: Meter,
        expected: int,
    ) -> None:
        self.trunk = trunk
        self.adjoints = adjoints
        self.seed = seed
        self.budget = budget
        self.tokens = trunk.prompt_length
        self.length = trunk.length
        self.width = trunk.embeddings.shape[-1]
        self.device = trunk.embeddings.device
        self.dtype = wide(trunk.embeddings.dtype)
        self._ledger = ledger
        self._step = step
        self._expected = expected
        size = float(trunk.source.to(self.dtype).square().mean().sqrt())
        self._scale = 2.0 ** round(math.log2(size)) if size > 0 else 1.0

    def token_probes(self, samples: Tensor, tokens: Tensor, start: int) -> Tensor:
        """Probes of one token each, `[B, T - start, d]`, in the model's dtype."""
        pairs = samples.to(self.device), tokens.to(self.device)
        span, dtype = (start, self.length), self.trunk.embeddings.dtype
        return block_probes(self.seed, *pairs, span, self.width, dtype)

    def probes(self, samples: Tensor, tokens: int, codes: Tensor | None = None) -> Tensor:
        """Probes of the first `tokens` positions, `[B, T, d]`, times their codes' signs."""
        dtype = self.trunk.embeddings.dtype
        samples = samples.to(self.device)
        return dense_probes(self.seed, samples, tokens, self.length, self.width, dtype, codes)

    def __call__(
        self, directions: Tensor, start: int, adjoints: Sequence[TargetAdjoint] | None = None
    ) -> Iterator[Tensor]:
        """`H r` at positions `start..p` of each target, `[B, p + 1 - start, d]`, summing dtype.

        One target after the other, as they are asked for: of many, all would be as large as the
        sweep. `adjoints`: some of the targets, where they do not share their directions.
        """
        adjoints = self.adjoints if adjoints is None else adjoints
        directions = directions * self._scale
        alone = self.device.type == "cpu" and runs_alone(self.length, self.width)
        if alone:  # what the last one left lies between its results
            trim_heap()
        sweep = tangent_sweep(self.trunk, directions, start)
        for adjoint in adjoints:
            result = hessian_rows(self.trunk, sweep, adjoint, last=adjoint is adjoints[-1])
            if not bool(torch.isfinite(result).all()):
                self._locate(directions, start)
                require_finite(result, "a Hessian-vector product")
            # Below the first of the last blocks there may be another device (a device map).
            yield result.to(self.device, self.dtype) / (self._scale * adjoint.head.scale)

    def _locate(self, directions: Tensor, start: int) -> None:
        """Repeat a product that went wrong, checking block by block."""

        def inspect(where: str, values: Tensor) -> None:
            require_finite(values, where)

        sweep = tangent_sweep(self.trunk, directions, start, inspect)
        for adjoint in self.adjoints:
            hessian_rows(self.trunk, sweep, adjoint, inspect)

    def work(self, start: int, adjoints: Sequence[TargetAdjoint] | None = None) -> int:
        """FLOPs of one product from `start` on, for every target or for some."""
        targets = [each.target for each in (self.adjoints if adjoints is None else adjoints)]
        return self.trunk.work.product(targets, self._expected, start)

    def done(self, products: int, work: int, targets: int | None = None) -> None:
        """Count products that are finished, for every target or so many, and their work."""
        targets = len(self.adjoints) if targets is None else targets
        self._ledger.counts["hvp"] += products * targets
        self._step(work)

    def blocks(
        self,
        count: int,
        directions: Callable[[Tensor, Tensor, int], Tensor],
        finish: Callable[[Tensor], Tensor],
        keep: Callable[[int, int, Tensor], None],
        adjoints: Sequence[TargetAdjoint] | None = None,
    ) -> None:
        """`H_ii r` for `count` directions r of every token i, each run from its token on.

        Items are (token, direction) pairs in the order of tokens, so that suffixes batch well.
        `directions(tokens, numbers, start) [B, T - start, d]` makes those of a batch, each zero but
        at its token; `finish` turns the products there, `[B, d]`, into what `keep(low, high, found
        [T, B, ...])` is given.
        """
        chosen = self.adjoints if adjoints is None else adjoints
        each = [self.work(token, chosen) for token in range(self.tokens)]
        total = self.tokens * count

        def size(item: int) -> int:
            return self.budget.batch(self.length - item // count, total - item)

        def run(low: int, high: int) -> Tensor:
            items = torch.arange(low, high)
            token, start = items // count, low // count
            spread = directions(token, items % count, start)
            batch = torch.arange(high - low, device=spread.device)
            place = (token - start).to(spread.device)
            return torch.stack([finish(rows[batch, place]) for rows in self(spread, start, chosen)])

        def keep_and_count(low: int, high: int, found: Tensor) -> None:
            keep(low, high, found)
            work = sum(each[item // count] for item in range(low, high))
            self.done(high - low, work, len(chosen))

        run_batches(total, self.budget, size, run, keep_and_count)

    def skip(self, work: int) -> None:
        """Take back work that was expected and is not needed."""
        self._step.skip(work)

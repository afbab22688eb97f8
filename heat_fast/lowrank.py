"""Curvature from a low-rank approximation of the Hessian (the paper's HEAT-LR).

`H`, of the log-probability by the N prompt tokens' embeddings, is approximated by
`H_k = U diag(w) U'` from its products with `s = sketch * rank` vectors of signs
(`heat_fast.kernels.low_rank`); then

    S_i = mean_k | U_i diag(w) U_i' r_k |_1

for all tokens i and probes r_k, which cost no products any more. `rank_scope="sequence"`: one H_k
for all tokens, from `passes * s` products whatever N is. `"token"`: every block `H_ii` by itself,
from `N * passes * s` products. Once the rank is all there is (`N * d`, or `d`) both equal `block`
with the same probes.

A truncated H underestimates S: what it drops is spread over all tokens, while what it keeps sits in
a few. Four products more per approximation, with probes that the sketch has not seen, measure how
much is missing (`Quality`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heat_fast.config import HeatConfig
from heat_fast.kernels.low_rank import block_norms, product, quality, single_pass, two_pass
from heat_fast.kernels.rademacher import rademacher
from heat_fast.planner import run_batches
from heat_fast.products import Products
from heat_fast.trunk import TargetAdjoint

# Streams of the counter-based generator beside the probes' own.
_TEST_STREAM = 0x72616E6B
_HELD_OUT_STREAM = 0x68656C64

#: Probes that measure the quality of an approximation.
HELD_OUT = 4


def factor_sizes(config: HeatConfig, tokens: int, width: int) -> tuple[int, int]:
    """Rank and number of test vectors of one approximation: at most the order of its operator."""
    order = width if config.rank_scope == "token" else tokens * width
    return min(config.rank, order), min(math.ceil(config.sketch * config.rank), order)


def products_each(config: HeatConfig, tokens: int, width: int) -> int:
    """Products of one approximation, the held-out ones included."""
    return config.passes * factor_sizes(config, tokens, width)[1] + HELD_OUT


def matrix_bytes(config: HeatConfig, tokens: int, width: int, item: int) -> int:
    """One tall matrix of an approximation: its test vectors, say, in numbers of `item` bytes."""
    return max(4, item) * tokens * width * factor_sizes(config, tokens, width)[1]


@dataclass(frozen=True)
class Quality:
    """What the approximation holds of each target's H (or of its blocks together), `[T]`.

    `residual`: `|H - H_k|_F / |H|_F`; `captured`: `|H_k|_F^2 / |H|_F^2`; `norm`: `|H|_F`; all
    estimated from `HELD_OUT` probes. `rank` and `columns`: the rank and the test vectors of one
    approximation.
    """

    residual: Tensor
    captured: Tensor
    norm: Tensor
    rank: int
    columns: int

    @staticmethod
    def joined(parts: Sequence[Quality | None]) -> Quality | None:
        """Those of several groups of targets as one."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        residual = torch.cat([part.residual for part in found])
        captured = torch.cat([part.captured for part in found])
        norm = torch.cat([part.norm for part in found])
        return Quality(residual, captured, norm, found[0].rank, found[0].columns)

    @staticmethod
    def worst(parts: Sequence[Quality | None]) -> Quality | None:
        """Of the same targets in several windows, each target's worst figures."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        residual = torch.stack([part.residual for part in found]).amax(0)
        captured = torch.stack([part.captured for part in found]).amin(0)
        norm = torch.stack([part.norm for part in found]).amax(0)
        return Quality(residual, captured, norm, found[0].rank, found[0].columns)

    def report(self) -> dict[str, Any]:
        """For a result's metadata."""
        return {
            "rank": self.rank,
            "test_vectors": self.columns,
            "residual": self.residual.tolist(),
            "captured_energy": self.captured.tolist(),
            "norm": self.norm.tolist(),
        }


class LowRank:
    """Block norms of `H_k`, one per target, token and probe; the factors are made at once."""

    def __init__(self, products: Products, config: HeatConfig) -> None:
        self.products = products
        self.seed = config.seed
        self.by_token = config.rank_scope == "token"
        self.rank, self.columns = factor_sizes(config, products.tokens, products.width)
        self.rounds: list[Tensor] = []
        # Matrices are tall, [M, s] for the sequence or [N, d, s] for its tokens.
        tests = self._tests()
        images = self._images(tests, products.adjoints)
        if config.passes == 2:
            self.factors = two_pass(images, self._second, self.rank)
        else:
            precision = torch.finfo(products.trunk.embeddings.dtype).eps
            self.factors = single_pass(tests, images, self.rank, precision)
        del tests, images  # the largest of all
        work = products.trunk.work.factorisation(self.columns, self.rank, config.passes)
        products.done(0, work * len(products.adjoints))
        held_out = self._signs(_HELD_OUT_STREAM, HELD_OUT)
        pair = self._images(held_out, products.adjoints), product(self.factors, held_out)
        if self.by_token:  # the blocks together are one block-diagonal operator
            pair = pair[0].flatten(-3, -2), pair[1].flatten(-3, -2)
        residual, captured = (part.cpu() for part in quality(*pair))
        # E |H z|^2 = |H|_F^2 for signs z.
        norm = pair[0].double().square().sum((-2, -1)).div(HELD_OUT).sqrt().cpu()
        self.quality = Quality(residual, captured, norm, self.rank, self.columns)

    def _tests(self) -> Tensor:
        """Signs, or all unit vectors: what is exact need not depend on the signs' rank."""
        order = self.products.width * (1 if self.by_token else self.products.tokens)
        if self.columns < order:
            return self._signs(_TEST_STREAM, self.columns)
        dtype, device = self.products.trunk.embeddings.dtype, self.products.device
        identity = torch.eye(order, dtype=dtype, device=device)
        return identity.expand(self.products.tokens, -1, -1) if self.by_token else identity

    def _signs(self, stream: int, count: int) -> Tensor:
        products = self.products
        tokens = torch.arange(products.tokens, device=products.device)
        numbers = torch.arange(count, device=products.device)[:, None]
        dtype = products.trunk.embeddings.dtype
        signs = rademacher(self.seed ^ stream, numbers, tokens, products.width, dtype)
        return signs.permute(1, 2, 0) if self.by_token else signs.flatten(1).mT

    def _images(self, tall: Tensor, adjoints: Sequence[TargetAdjoint]) -> Tensor:
        """`H` times the columns of a tall matrix, `[len(adjoints), *tall.shape]`."""
        products, count = self.products, tall.shape[-1]
        tokens, width = products.tokens, products.width
        dtype = products.trunk.embeddings.dtype
        shape = [tokens * count, width] if self.by_token else [count, tokens, width]
        images = torch.zeros([len(adjoints), *shape], dtype=products.dtype, device=products.device)

        def keep(low: int, high: int, found: Tensor) -> None:
            images[:, low:high] = found

        if self.by_token:

            def directions(tokens: Tensor, numbers: Tensor, start: int) -> Tensor:
                spread = tall.new_zeros(len(tokens), products.length - start, width, dtype=dtype)
                spread[torch.arange(len(tokens)), tokens - start] = tall[tokens, :, numbers].to(
                    dtype
                )
                return spread

            products.blocks(count, directions, lambda rows: rows, keep, adjoints)
            return images.view(len(adjoints), tokens, count, width).mT

        def run(low: int, high: int) -> Tensor:
            spread = tall.new_zeros(high - low, products.length, width, dtype=dtype)
            spread[:, :tokens] = tall[:, low:high].mT.unflatten(-1, (tokens, width))
            return torch.stack([rows[:, :tokens] for rows in products(spread, 0, adjoints)])

        def keep_and_count(low: int, high: int, found: Tensor) -> None:
            keep(low, high, found)
            products.done(high - low, (high - low) * products.work(0, adjoints), len(adjoints))

        def size(item: int) -> int:
            return products.budget.batch(products.length, count - item)

        run_batches(count, products.budget, size, run, keep_and_count)
        return images.flatten(-2).mT

    def _second(self, frames: Tensor) -> Tensor:
        """`H Q` of every target's own basis, brought to the size of signs on the way."""
        size = 2.0 ** round(math.log2(frames.shape[-2]) / 2)
        pairs = zip(frames, self.products.adjoints, strict=True)
        return torch.cat([self._images(frame * size, [own]) for frame, own in pairs]) / size

    def add(self, first: int, stop: int) -> None:
        """Take probes `first..stop-1`."""
        vectors, values = self.factors.vectors, self.factors.values
        if not self.by_token:
            shape = (self.products.tokens, self.products.width)
            vectors, values = vectors.unflatten(-2, shape), values[:, None]
        norms = block_norms(vectors, values, self.seed, torch.arange(first, stop))
        self.rounds.append(norms.cpu())
        self.products.done(0, (stop - first) * self.work())

    def work(self) -> int:
        """FLOPs of one more probe, for every target."""
        return len(self.products.adjoints) * self.products.trunk.work.factor_norms(self.rank)

    def samples(self) -> Tensor:
        """Norms `[T, N, m]`."""
        return torch.cat(self.rounds, dim=-1)

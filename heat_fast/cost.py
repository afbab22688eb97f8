"""What an attribution costs, before it is run: products, rows, FLOPs, bytes, seconds.

FLOPs are the floor of the definition (`heat_fast.work`). Where `probes` or `codes` is "auto" all of
it is an upper bound: an attribution stops earlier.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heat_fast.config import HeatConfig
from heat_fast.curvature import FIRST_CODES, FIRST_PROBES, product_count
from heat_fast.decoder import Decoder, view
from heat_fast.errors import InputError
from heat_fast.lowrank import HELD_OUT, factor_sizes
from heat_fast.planner import CPU_ROWS, slices, targets_at_once
from heat_fast.work import Work


@dataclass(frozen=True)
class Estimate:
    """The cost of one attribution; the most it can be where `probes` or `codes` is "auto".

    `hvp`, `branches`, `branch_tokens`: counts as in a result's metadata (branch tokens without the
    rows that batching adds); `flops`: per component; `trunk_bytes`, `peak_bytes`: what the trunk
    keeps, and the most that is alive at once beyond the model; `seconds`: None without calibration.
    """

    hvp: int
    branches: int
    branch_tokens: int
    flops: Mapping[str, int]
    trunk_bytes: int
    peak_bytes: int
    seconds: float | None

    @property
    def total_flops(self) -> int:
        """FLOPs of all components."""
        return sum(self.flops.values())


def flops(decoder: Decoder, tokens: int, targets: int, config: HeatConfig) -> dict[str, int]:
    """Floor FLOPs per component for `tokens` prompt and `targets` target tokens."""
    work = Work(decoder, tokens, targets)
    branches = sum(work.branch(start) for start in range(tokens))
    trunk_bytes = _row_bytes(work, decoder.embeddings_weight.element_size())[0] * work.length
    groups = [len(range(targets)[part]) for part in slices(targets, targets_at_once(trunk_bytes))]
    return {
        "trunk": work.trunk(),
        "gate": sum(work.gate(config.rollout)),
        "information": branches + tokens * targets * work.logits,
        "curvature": curvature_work(work, groups, config),
    }


def curvature_work(work: Work, groups: Sequence[int], config: HeatConfig) -> int:
    """Most FLOPs of all targets' curvature, the primal adjoints included.

    `groups`: how many targets share each tangent sweep.
    """
    products = product_count(config, work.tokens, work.width)
    total = first = 0
    for size in groups:
        targets = range(first, first + size)
        total += sum(sum(work.adjoint(target)) for target in targets)
        total += size * work.head_gradient(products if config.curvature == "hessian" else 0)
        if config.curvature == "gauss_newton":
            for target in targets:
                each = sum(work.adjoint(target)) + work.head_gradient(0)
                total += products * each + work.block_norms(products)
        elif products and config.estimator == "low_rank":
            total += _low_rank_work(work, targets, products, config)
        elif products and config.estimator == "block":
            each = sum(work.product(targets, products, s) for s in range(work.tokens))
            total += products // work.tokens * each
        elif products:
            total += products * work.product(targets, products, 0)
        first += size
    return total


def _low_rank_work(work: Work, targets: range, products: int, config: HeatConfig) -> int:
    """FLOPs of the low-rank approximations of some targets' Hessians and of all their probes."""
    rank, columns = factor_sizes(config, work.tokens, work.width)
    starts = range(work.tokens if config.rank_scope == "token" else 1)
    shared = sum(work.product(targets, products, start) for start in starts)
    total = (columns + HELD_OUT) * shared
    if config.passes == 2:  # every target has a basis of its own
        own = sum(work.product([t], products, start) for t in targets for start in starts)
        total += columns * own
    probes = config.probes_max if config.probes == "auto" else config.probes
    norms = probes * work.factor_norms(rank)
    return total + len(targets) * (work.factorisation(columns, rank, config.passes) + norms)


def estimate(
    model: Any,
    n_tokens: int,
    n_targets: int = 1,
    config: HeatConfig | None = None,
    *,
    calibrate: bool = True,
) -> Estimate:
    """Tell the cost of an attribution beforehand.

    Counts and FLOPs follow from the shapes; nothing is run for them. With `calibrate`, `seconds`
    comes from timing the attribution of a short random prompt (at most 64 tokens) with the same
    settings and scaling it by the ratio of FLOPs; a busy machine shows in it. With `probes="auto"`
    or `codes="auto"` everything is an upper bound.

    With `coverage` or `branch_tolerance` counts and FLOPs are upper bounds, those of all tokens
    and all rows (save for the few branches that an audit runs again): what can be left out is
    known only afterwards.

    Raises `InputError` for lengths below 1, `UnsupportedModelError` for an unknown model.

    Example:
        >>> import heat_fast
        >>> demo = heat_fast.load_demo_model()
        >>> heat_fast.estimate(demo.model, 100, config=HeatConfig(probes=2), calibrate=False).hvp
        200
    """
    if n_tokens < 1 or n_targets < 1:
        raise InputError(
            f"n_tokens={n_tokens} and n_targets={n_targets}: expected at least one of each. Pass "
            "the lengths of the prompt and of the target in tokens."
        )
    config = config if config is not None else HeatConfig()
    length = n_tokens + n_targets - 1
    decoder = view(model, length)
    costs = flops(decoder, n_tokens, n_targets, config)
    work = Work(decoder, n_tokens, n_targets)
    rows = max(length, config.token_budget or CPU_ROWS)
    item = decoder.embeddings_weight.element_size()
    trunk, sweep = _row_bytes(work, item)
    if config.branch_tolerance is not None:  # the residual stream, twice a block
        trunk += 2 * item * decoder.hidden_size * len(decoder.blocks)
    hessian = config.curvature == "hessian"
    factors = 0
    if hessian and config.estimator == "low_rank":  # test vectors, products and a basis of them
        columns = factor_sizes(config, n_tokens, work.width)[1]
        factors = 3 * max(4, item) * n_tokens * work.width * columns
    logits = 4 * max(1 << 23, n_targets * work.logits // (2 * work.width))
    seconds = None
    if calibrate:
        seconds = _calibrate(model, n_tokens, n_targets, config, sum(costs.values()))
    return Estimate(
        hvp=product_count(config, n_tokens, work.width) * n_targets if hessian else 0,
        branches=n_tokens,
        branch_tokens=sum(length - start for start in range(n_tokens)),
        flops=costs,
        trunk_bytes=trunk * length,
        peak_bytes=2 * trunk * length + (sweep if hessian else trunk) * rows + logits + factors,
        seconds=seconds,
    )


def _row_bytes(work: Work, item: int) -> tuple[int, int]:
    """Bytes that one row keeps alive in the trunk and in a Hessian-vector product."""
    trunk = sweep = 0
    for sizes in work.shapes:
        heads = 2 * sizes.heads + 2 * sizes.key_heads
        trunk += 4 * 2 * work.width + item * (heads + 2 * sizes.hidden)
        sweep += item * (2 * work.width + heads + sizes.hidden)
    return trunk, sweep


def _calibrate(model: Any, tokens: int, targets: int, config: HeatConfig, wanted: int) -> float:
    """Seconds of a short run, scaled to `wanted` FLOPs."""
    from heat_fast.attributor import Attributor

    short = min(tokens, 64)
    few = min(targets, 2)
    rows = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (short + few,), generator=generator).tolist()
    # A known number of products: how many "auto" takes is not known.
    known = config.replace(
        probes=FIRST_PROBES if config.probes == "auto" else config.probes,
        codes=FIRST_CODES if config.codes == "auto" else config.codes,
    )
    attributor = Attributor(model, None, known)
    attributor.attribute(ids[:8], ids[8:9])  # the first run pays for caches and threads
    begin = time.perf_counter()
    attributor.attribute(ids[:short], ids[short:])
    elapsed = time.perf_counter() - begin
    return elapsed * wanted / sum(flops(view(model, short + few - 1), short, few, known).values())

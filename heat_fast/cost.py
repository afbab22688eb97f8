"""What an attribution costs, before it is run: products, rows, FLOPs, bytes, seconds.

FLOPs and bytes are the floor of the definition (`heat_fast.work`, `heat_fast.traffic`). Where
`probes` or `codes` is "auto" all of it is an upper bound: an attribution stops earlier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heat_fast import gpu
from heat_fast.checks import is_whole
from heat_fast.config import HeatConfig, check_config
from heat_fast.curvature import FIRST_CODES, FIRST_PROBES, product_count, target_group
from heat_fast.decoder import Decoder, view
from heat_fast.decoder.head import shares_curvature
from heat_fast.decoder.product import compiled_bytes
from heat_fast.errors import InputError
from heat_fast.forward import check_model, context_length, on_cpu
from heat_fast.information import GPU_LOGIT_ELEMENTS, LOGIT_ELEMENTS
from heat_fast.lowrank import HELD_OUT, factor_sizes, matrix_bytes
from heat_fast.planner import Budget, runs_alone, slices, token_budget
from heat_fast.prompt import check_length
from heat_fast.traffic import Traffic
from heat_fast.windows import plan_windows
from heat_fast.work import Shape, Work

#: Tokens of the first prompt that is timed, and seconds of a run that is long enough.
SHORT, LONG = 64, 1.0

#: The pieces of an attribution: in FLOPs, or in bytes.
Pieces = Work | Traffic


@dataclass(frozen=True)
class Estimate:
    """The cost of one attribution; the most it can be where `probes` or `codes` is "auto".

    `hvp`, `branches`, `branch_tokens`: counts as in a result's metadata (branch tokens without the
    rows that batching adds); `flops`, `bytes_moved`: per component, the floor of both;
    `trunk_bytes`, `peak_bytes`: what the trunk keeps, and the most that is alive at once beyond the
    model; `seconds`: None without calibration.
    """

    hvp: int
    branches: int
    branch_tokens: int
    flops: Mapping[str, int]
    bytes_moved: Mapping[str, int]
    trunk_bytes: int
    peak_bytes: int
    seconds: float | None

    @property
    def total_flops(self) -> int:
        """FLOPs of all components."""
        return sum(self.flops.values())


def flops(decoder: Decoder, tokens: int, targets: int, config: HeatConfig) -> dict[str, int]:
    """Floor FLOPs per component for `tokens` prompt and `targets` target tokens, all windows."""
    return _components(decoder, tokens, targets, config, lambda work: work)


def bytes_moved(
    decoder: Decoder, tokens: int, targets: int, config: HeatConfig, rows: int
) -> dict[str, int]:
    """Floor bytes per component to and from memory, in batches of `rows` token rows."""
    return _components(decoder, tokens, targets, config, lambda work: Traffic(decoder, work, rows))


def _components(
    decoder: Decoder, tokens: int, targets: int, config: HeatConfig, count: Callable[[Work], Pieces]
) -> dict[str, int]:
    """The cost of each component, its pieces counted by `count`."""
    plan = plan_windows(tokens, config)
    total = dict.fromkeys(("trunk", "gate", "information", "curvature"), 0)
    item = decoder.embeddings_weight.element_size()
    for work in _chunks(decoder, plan.length, targets, config):
        cost = count(work)
        tall = matrix_bytes(config, work.tokens, work.width, item)
        together = target_group(config, _trunk_bytes(work, work.swept, item), tall)
        groups = [len(range(work.targets)[part]) for part in slices(work.targets, together)]
        branches = sum(cost.branch(start) for start in range(work.tokens))
        total["trunk"] += cost.trunk()
        total["gate"] += sum(cost.gate(config.rollout))
        total["information"] += branches + work.tokens * work.targets * cost.logits
        total["curvature"] += curvature_work(cost, groups, config)
    return {component: len(plan) * cost for component, cost in total.items()}


def _chunks(decoder: Decoder, tokens: int, targets: int, config: HeatConfig) -> list[Work]:
    """The work of each part of the response that is explained at a time, first to last."""
    first = decoder.first_of(config.layers)
    parts = [range(targets)[part] for part in slices(targets, config.response_chunk or targets)]
    return [Work(decoder, tokens, len(part), first, part.start) for part in parts]


def curvature_work(work: Pieces, groups: Sequence[int], config: HeatConfig) -> int:
    """Most FLOPs, or bytes, of all targets' curvature, the primal adjoints included.

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


def _low_rank_work(work: Pieces, targets: range, products: int, config: HeatConfig) -> int:
    """The same for low-rank approximations of some targets' Hessians and for all their probes."""
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


@on_cpu()
def estimate(
    model: Any,
    n_tokens: int,
    n_targets: int = 1,
    config: HeatConfig | None = None,
    *,
    calibrate: bool = True,
) -> Estimate:
    """Tell the cost of an attribution beforehand.

    Counts and FLOPs follow from the shapes, of all windows together; nothing is run for them. With
    `calibrate`, `seconds` comes from timing the attribution of short random prompts with the same
    settings: of 64 tokens, and twice as many as long as one takes less than a second. A busy
    machine shows in it.
    With `probes="auto"` or `codes="auto"` everything is an upper bound.

    With `coverage`, `branch_tolerance` or `window_tolerance` counts and FLOPs are upper bounds,
    those of all tokens, rows and windows (save for the few branches that an audit runs again, and
    a forward of each window): what can be left out is known only afterwards.

    Raises `InputError` for lengths below 1 or beyond the model's context, `UnsupportedModelError`
    for an unknown model.

    Example:
        >>> import heat_fast
        >>> demo = heat_fast.load_demo_model()
        >>> heat_fast.estimate(demo.model, 100, config=HeatConfig(probes=2), calibrate=False).hvp
        200
    """
    check_model(model)
    check_config(config)
    if not all(is_whole(n) and n >= 1 for n in (n_tokens, n_targets)):
        raise InputError(
            f"n_tokens={n_tokens!r} and n_targets={n_targets!r}: expected whole numbers, at "
            "least one of each. Pass the lengths of the prompt and of the target in tokens."
        )
    config = config if config is not None else HeatConfig()
    check_length(n_tokens, n_targets, context_length(model), config.window)
    plan = plan_windows(n_tokens, config)
    tokens, windows = plan.length, len(plan)
    length = tokens + n_targets - 1
    decoder = view(model, length)
    costs = flops(decoder, n_tokens, n_targets, config)
    chunks = _chunks(decoder, tokens, n_targets, config)
    # The longest chunk; where the last is shorter, the one before may be the hungriest.
    work = max(chunks, key=lambda each: (each.targets, each.length))
    item = decoder.embeddings_weight.element_size()
    hessian = config.curvature == "hessian"
    kept = _trunk_bytes(work, work.shapes, item) + _stream_bytes(work, item, config)
    device = decoder.embeddings_weight.device
    budget = token_budget(kept, length, work.width, device, config.token_budget, decoder.concurrent)
    compiled = compiled_bytes(max(length, budget.rows), decoder.embeddings_weight)
    if any(fed.experts for fed in work.feed_forward):
        compiled *= 2  # of experts' products, whose numbers of rows are their own
    seconds = None
    if calibrate:
        # A window is what surely fits into the model's context.
        seconds = _calibrate(model, tokens, n_targets, config, sum(costs.values()))
    return Estimate(
        hvp=windows * product_count(config, tokens, work.width) * n_targets if hessian else 0,
        branches=windows * tokens * len(chunks),
        branch_tokens=windows
        * sum(each.length - start for each in chunks for start in range(tokens)),
        flops=costs,
        bytes_moved=bytes_moved(decoder, n_tokens, n_targets, config, budget.rows),
        trunk_bytes=kept,
        peak_bytes=_peak_bytes(work, item, config, budget, device) + compiled,
        seconds=seconds,
    )


def _trunk_bytes(work: Work, shapes: Sequence[Shape], item: int) -> int:
    """What the trunk keeps of some blocks: in the last the target rows alone, keys apart."""
    total = 0
    for layer, sizes in enumerate(shapes):
        queries = work.targets if layer == len(shapes) - 1 else work.length
        keys = work.length * (max(item, 4) * work.width + 2 * item * sizes.key_heads)
        normed = max(item, 4) * (sizes.normed - work.width + sizes.count)
        total += keys + queries * (normed + item * (2 * sizes.heads + sizes.hidden))
    return total


def _stream_bytes(work: Work, item: int, config: HeatConfig) -> int:
    """The residual stream, twice a block, which `branch_tolerance` compares branches with."""
    kept = config.branch_tolerance is not None
    return 2 * item * work.width * work.length * len(work.shapes) if kept else 0


def _peak_bytes(
    work: Work, item: int, config: HeatConfig, budget: Budget, device: torch.device
) -> int:
    """The most that is alive at once beyond the model: the trunk and the hungriest component.

    Counted for torch alone; the compiled kernels need less.
    Temporaries are those of one block, by count of the steps of a gated layer.
    """
    wide, tokens, targets = max(item, 4), work.tokens, work.targets
    kept = _trunk_bytes(work, work.shapes, item) + _stream_bytes(work, item, config)
    swept = _trunk_bytes(work, work.swept, item)
    adjoint = sweep = derivatives = temporary = inner = 0
    for sizes in work.swept:
        heads = 2 * sizes.heads + 2 * sizes.key_heads
        derivatives += 2 * item * sizes.inner
        adjoint += wide * sizes.normed + item * (sizes.heads + 2 * sizes.inner)
        sweep += item * (sizes.normed + heads + sizes.hidden)
        block = wide * (2 * sizes.normed + 2 * heads + sizes.hidden + 2 * sizes.inner)
        temporary, inner = max(temporary, block), max(inner, sizes.inner)
    temporary += wide * max(fed.gathered for fed in work.feed_forward)
    workers, each = budget.workers, max(work.length, budget.rows)
    # Eight copies of the logits in a divergence, four of the targets' rows in the trunk. The GPU
    # kernel takes more of them at once, in one copy as the model makes them.
    fused = device.type == "cuda" and config.kernels != "reference" and not gpu.missing()
    each_logit, most = (item, GPU_LOGIT_ELEMENTS) if fused else (8 * wide, LOGIT_ELEMENTS)
    logits = each_logit * min(
        workers * max(most, targets * work.vocabulary), tokens * targets * work.vocabulary
    )
    information = temporary * min(workers * each, tokens * work.length) + logits
    # The second derivative of an activation is taken through autograd's graph of the first.
    curvature = (adjoint + 12 * wide * inner) * work.length
    products = product_count(config, tokens, work.width)
    if config.curvature == "gauss_newton":
        curvature += wide * (products * tokens * work.width + 8 * work.vocabulary)
    elif products:
        sweeps = 1 if runs_alone(work.length, work.width) else workers
        rows = min(sweeps * each, products * work.length)
        tall = matrix_bytes(config, tokens, work.width, item)
        few = min(targets, target_group(config, swept, tall))
        head = min(64, work.width) if shares_curvature(products, work.width) else 1
        held = adjoint * few * work.length + sweep * rows
        held += derivatives * work.length if config.estimator == "block" else 0
        held += wide * (4 * rows * work.width + 3 * head * work.vocabulary)
        held += (1 + 3 * few) * tall if config.estimator == "low_rank" else 0
        curvature = max(curvature, held + temporary * rows)
    return kept + 4 * wide * targets * work.vocabulary + max(information, curvature)


def _calibrate(model: Any, tokens: int, targets: int, config: HeatConfig, wanted: int) -> float:
    """Seconds of `wanted` FLOPs, from runs of short prompts.

    What a run takes beside its FLOPs (a small model's calls) does not grow with them: where runs
    are short, the last two tell the seconds of a further FLOP.
    """
    from heat_fast.attributor import Attributor

    few = min(targets, 2)
    rows = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (tokens + few,), generator=generator).tolist()
    # A known number of products: how many "auto" takes is not known.
    known = config.replace(
        probes=FIRST_PROBES if config.probes == "auto" else config.probes,
        codes=FIRST_CODES if config.codes == "auto" else config.codes,
    )
    attributor = Attributor(model, None, known)
    attributor.attribute(ids[: min(8, tokens)], ids[-1:])  # pays for caches and threads
    before, short = None, min(tokens, SHORT)
    while True:
        begin = time.perf_counter()
        attributor.attribute(ids[:short], ids[-few:])
        elapsed = time.perf_counter() - begin
        done = sum(flops(view(model, short + few - 1), short, few, known).values())
        rate = elapsed / done
        if before is not None:
            rate = min(rate, max(0.0, (elapsed - before[0]) / (done - before[1])))
        if short == tokens or elapsed >= LONG:
            return max(0.0, elapsed + rate * (wanted - done))
        before, short = (elapsed, done), min(tokens, 2 * short)

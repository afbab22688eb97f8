"""What an attribution costs, before it is run: products, rows, FLOPs, bytes, seconds.

FLOPs are the floor of the definition: every matrix product that the formulas ask for, causal pairs
only, each once. With `P` weights per block, `H` query heads of size `D`, a sweep from position `i`
of `M` has `M - i` rows, `A_i = sum_{j >= i} (j + 1)` causal pairs with all keys and
`O_i = sum_{j >= i} (j - i + 1)` with its own:

    forward (trunk, branch)     2 P (M - i) + 4 H D A_i
    Hessian-vector product      4 P (M - i) + 2 H D (4 A_i + 8 O_i)

(up: 2 + 2 attention products, down: 2 + 6; those with a key or value tangent touch own keys only).
The last block makes queries, and with them the output and the feed-forward layer, for the target
rows alone. Windows shorter than the context are counted as if they were the whole context.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from heat_fast.config import HeatConfig
from heat_fast.curvature import product_count
from heat_fast.decoder import Decoder, view
from heat_fast.decoder.attention import FusedProjection, SeparateProjection
from heat_fast.decoder.block import Block
from heat_fast.errors import InputError
from heat_fast.planner import CPU_ROWS


@dataclass(frozen=True)
class Estimate:
    """The cost of one attribution.

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


@dataclass(frozen=True)
class _Shape:
    """Sizes of one block: weights for every row, weights for query rows, heads."""

    shared: int  # keys and values
    queried: int  # queries, output projection, feed-forward layer
    heads: int  # H * D
    key_heads: int  # Hk * D
    hidden: int  # f, both halves if gated


def _shape(block: Block, width: int) -> _Shape:
    projection = block.attention.projection
    if isinstance(projection, SeparateProjection):
        query = projection.query.out_features
        keys = projection.key.out_features
    else:
        assert isinstance(projection, FusedProjection)
        query = projection.heads * projection.head_dim
        keys = projection.key_heads * projection.head_dim
    gate = block.mlp.gate.out_features
    hidden = gate + (0 if block.mlp.up is None else block.mlp.up.out_features)
    inner = gate // 2 if block.mlp.fused else gate
    return _Shape(2 * keys * width, (2 * query + hidden + inner) * width, query, keys, hidden)


def _forward(shapes: list[_Shape], length: int, start: int, targets: int) -> int:
    """FLOPs of a forward run of positions `start..length-1`."""
    rows = length - start
    pairs = _pairs(start, length)
    total = 0
    for index, shape in enumerate(shapes):
        last = index == len(shapes) - 1
        queries = targets if last else rows
        seen = _pairs(length - targets, length) if last else pairs
        total += 2 * (shape.shared * rows + shape.queried * queries) + 4 * shape.heads * seen
    return total


def _product(shapes: list[_Shape], stop: int, start: int) -> int:
    """FLOPs of one Hessian-vector product of the target at position `stop - 1`, head apart."""
    rows = stop - start
    total = 0
    for index, shape in enumerate(shapes):
        last = index == len(shapes) - 1
        queries = 1 if last else rows
        seen = stop if last else _pairs(start, stop)
        own = rows if last else rows * (rows + 1) // 2
        total += 4 * (shape.shared * rows + shape.queried * queries)
        total += 2 * shape.heads * (4 * seen + 8 * own)
    return total


def _pairs(start: int, stop: int) -> int:
    """Causal pairs of queries `start..stop-1` with all keys up to themselves."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def flops(decoder: Decoder, tokens: int, targets: int, config: HeatConfig) -> dict[str, int]:
    """Floor FLOPs per component for `tokens` prompt and `targets` target tokens."""
    width, vocabulary = decoder.hidden_size, decoder.head.projection.out_features
    shapes = [_shape(block, width) for block in decoder.blocks]
    length = tokens + targets - 1
    row_logits = 2 * vocabulary * width
    trunk = _forward(shapes, length, 0, targets) + targets * row_logits
    information = sum(_forward(shapes, length, start, targets) for start in range(tokens))
    information += tokens * targets * row_logits
    gate = sum(
        2 * shape.heads * width * length + 4 * shape.heads * _pairs(0, length) for shape in shapes
    )
    curvature = 2 * trunk * targets  # the primal adjoints
    products = product_count(config, tokens)
    if config.curvature == "gauss_newton":
        curvature += products * targets * 2 * trunk
    elif products:
        per_start = config.estimator == "block"
        starts = range(tokens) if per_start else [0]
        each = products // tokens if per_start else products
        for target in range(targets):
            stop = tokens + target
            curvature += each * sum(_product(shapes, stop, start) for start in starts)
        head = min(2 * row_logits * products, row_logits * width * 2)
        curvature += targets * head
    return {"trunk": trunk, "gate": gate, "information": information, "curvature": curvature}


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
    settings and scaling it by the ratio of FLOPs; a busy machine shows in it.

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
    item = decoder.embeddings_weight.element_size()
    rows = max(length, config.token_budget or CPU_ROWS)
    trunk, sweep = _row_bytes(decoder, item)
    if config.branch_tolerance is not None:  # the residual stream, twice a block
        trunk += 2 * item * decoder.hidden_size * len(decoder.blocks)
    hessian = config.curvature == "hessian"
    logits = 4 * max(1 << 23, n_targets * decoder.head.projection.out_features)
    seconds = None
    if calibrate:
        seconds = _calibrate(model, n_tokens, n_targets, config, sum(costs.values()))
    return Estimate(
        hvp=product_count(config, n_tokens) * n_targets if hessian else 0,
        branches=n_tokens,
        branch_tokens=sum(length - start for start in range(n_tokens)),
        flops=costs,
        trunk_bytes=trunk * length,
        peak_bytes=2 * trunk * length + (sweep if hessian else trunk) * rows + logits,
        seconds=seconds,
    )


def _row_bytes(decoder: Decoder, item: int) -> tuple[int, int]:
    """Bytes that one row keeps alive in the trunk and in a Hessian-vector product."""
    width = decoder.hidden_size
    trunk = sweep = 0
    for block in decoder.blocks:
        shape = _shape(block, width)
        heads = 2 * shape.heads + 2 * shape.key_heads
        trunk += 4 * 2 * width + item * (heads + 2 * shape.hidden)
        sweep += item * (2 * width + heads + shape.hidden)
    return trunk, sweep


def _calibrate(model: Any, tokens: int, targets: int, config: HeatConfig, wanted: int) -> float:
    """Seconds of a short run, scaled to `wanted` FLOPs."""
    from heat_fast.attributor import Attributor

    short = min(tokens, 64)
    few = min(targets, 2)
    rows = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (short + few,), generator=generator).tolist()
    attributor = Attributor(model, None, config)
    attributor.attribute(ids[:8], ids[8:9])  # the first run pays for caches and threads
    begin = time.perf_counter()
    attributor.attribute(ids[:short], ids[short:])
    elapsed = time.perf_counter() - begin
    return elapsed * wanted / sum(flops(view(model, short), short, few, config).values())

"""Floating-point operations of every piece of an attribution: what progress and cost count.

They are the floor of the definition: every matrix product that the formulas ask for, causal pairs
only, each once. With `P` weights per block, `H` query heads of size `D`, a run from position `i` of
`M` has `M - i` rows, `A_i = sum_{j >= i} (j + 1)` causal pairs with all keys and
`O_i = sum_{j >= i} (j - i + 1)` with its own:

    forward (trunk, branch)     2 P (M - i) + 4 H D A_i
    tangent, going up           2 P (M - i) + 2 H D (2 A_i + 2 O_i)
    its adjoint, going down     2 P (M - i) + 2 H D (2 A_i + 6 O_i)
    primal adjoint              2 P M + 10 H D A_0
    flow of the gate            2 H A_0 (D + rows)

(a product with a key or value tangent touches own keys only; the primal adjoint and the gate make
the scores anew). In a branch's first block only the replaced row is projected to queries, keys and
values, for the others' are the trunk's. The last block makes queries, and with them the output and
the feed-forward layer, for the target rows alone, unless one matrix makes queries, keys and values
at once. Windows shorter than the context are counted as if they were the whole context. Gate,
adjoints and products go through the blocks from `first` on alone (`layers`); trunk and branches
through all. Left out: element-wise work, which grows with the same rows and pairs; the one plain
run of the model that checks its view; and what a sweep makes anew to need no memory of order `M^2`,
the scores and their adjoint once per batch of products and the tangent scores once per product.

`heat_fast.traffic` counts the same pieces in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from heat_fast.decoder import Decoder
from heat_fast.decoder.block import Block
from heat_fast.decoder.head import shares_curvature
from heat_fast.decoder.mlp import FeedForwardSizes
from heat_fast.decoder.norm import Norm


@dataclass(frozen=True)
class Shape:
    """Sizes of one block, or the sums of several; all that is counted is linear in them."""

    projected: int  # weights of queries, keys and values
    shared: int  # weights met by every row: keys and values, and queries where all are one matrix
    queried: int  # weights met by query rows: the other queries, output, feed-forward layer
    count: int  # H
    heads: int  # H * D
    key_heads: int  # Hk * D
    hidden: int  # pre-activations: f, both halves if gated
    inner: int  # f
    normed: int  # what the norms make of a row, all norms together


def shape(block: Block, row: Tensor, fed: FeedForwardSizes) -> Shape:
    """The sizes of a block that takes rows like `row [1, d]`, and of its feed-forward layer."""
    width = row.shape[-1]
    attention = block.attention
    projection = attention.projection.sizes(row)
    count = projection.query // attention.projection.head_dim
    output = count * (attention.value_dim or attention.projection.head_dim)
    norms = (block.norm, block.mlp_norm, block.post_attention, block.post_mlp)
    normed = sum(width for norm in norms if isinstance(norm, Norm))
    normed += projection.query if isinstance(attention.query_norm, Norm) else 0
    normed += projection.keys if isinstance(attention.key_norm, Norm) else 0
    own = projection.weights - projection.shared_weights
    return Shape(
        projected=projection.weights,
        shared=projection.shared_weights,
        queried=own + output * width + fed.weights,
        count=count,
        heads=projection.query,
        key_heads=projection.keys,
        hidden=fed.hidden,
        inner=fed.inner,
        normed=normed + projection.normed,
    )


def _sum(shapes: Sequence[Shape]) -> Shape | None:
    """The sizes of several blocks together, None of none."""
    sizes = [astuple(each) for each in shapes]
    return Shape(*(sum(column) for column in zip(*sizes, strict=True))) if sizes else None


def pairs(start: int, stop: int) -> int:
    """Causal pairs of queries `start..stop-1` with all keys up to themselves."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


class Work:
    """FLOPs of the pieces of one attribution of `tokens` prompt and `targets` target tokens.

    `lead`: response tokens before the targets, run and not scored.
    """

    def __init__(
        self, decoder: Decoder, tokens: int, targets: int, first: int = 0, lead: int = 0
    ) -> None:
        row = torch.zeros_like(decoder.embeddings_weight[:1])
        self.width = row.shape[-1]
        self.tokens = tokens
        self.targets = targets
        self.lead = lead
        self.length = tokens + lead + targets - 1
        #: A row of zeros where each block is.
        self.rows = [row.to(block.device or row.device) for block in decoder.blocks]
        blocks = list(zip(decoder.blocks, self.rows, strict=True))
        self.feed_forward = [block.mlp.sizes(own) for block, own in blocks]
        self.shapes = [
            shape(block, own, fed)
            for (block, own), fed in zip(blocks, self.feed_forward, strict=True)
        ]
        head = decoder.head
        #: Rows of the head's weights.
        self.vocabulary = head.projection.out_features(row.to(head.device or row.device))
        #: One row of logits, or its adjoint.
        self.logits = 2 * self.width * self.vocabulary
        #: The blocks that gate and curvature go through.
        self.swept = self.shapes[first:]
        self._body = _sum(self.shapes[:-1])
        self._swept_body = _sum(self.swept[:-1])

    def stop(self, target: int) -> int:
        """Where the context of one target ends: its adjoint has so many rows."""
        return self.tokens + self.lead + target

    def block(self, layer: int, start: int = 0) -> int:
        """A forward run of positions `start..M-1` through one block."""
        last = layer == len(self.shapes) - 1
        return self._forward(self.shapes[layer], start, self.targets if last else None)

    def branch(self, start: int) -> int:
        """A forward run of positions `start..M-1` through all blocks, with one token replaced.

        In the first of several blocks all other rows' projections are the trunk's.
        """
        total = self._run(start)
        if self._body is None:
            return total
        return total - 2 * self.shapes[0].projected * (self.length - start - 1)

    def _run(self, start: int) -> int:
        total = self._forward(self.shapes[-1], start, self.targets)
        return total if self._body is None else total + self._forward(self._body, start, None)

    def _forward(self, sizes: Shape, start: int, queries: int | None) -> int:
        rows = self.length - start
        queries = rows if queries is None else queries
        seen = pairs(self.length - queries, self.length)
        return 2 * (sizes.shared * rows + sizes.queried * queries) + 4 * sizes.heads * seen

    def trunk(self) -> int:
        """The unmodified context with its logits."""
        return self._run(0) + self.targets * self.logits

    def gate(self, rollout: str) -> list[int]:
        """The gate, block by block from the top."""
        each = []
        for visited, sizes in enumerate(reversed(self.swept)):
            queries = self.targets if visited == 0 else self.length
            # `input_path` carries rows for every block that it has met.
            rows = self.targets * (1 if rollout == "value_path" else visited + 1)
            seen = pairs(self.length - queries, self.length)
            norms = 2 * sizes.heads * self.width * self.length
            each.append(norms + 2 * seen * (sizes.heads + sizes.count * rows))
        return each

    def up(self, start: int) -> int:
        """One tangent from `start` on, for all targets together."""
        total = self._sweep(self.shapes[-1], start, self.length, self.targets, 2)
        if self._swept_body is not None:
            total += self._sweep(self._swept_body, start, self.length, None, 2)
        return total

    def down(self, start: int, target: int) -> int:
        """One tangent of the adjoint of one target, down to `start`; without the head."""
        stop = self.stop(target)
        total = self._sweep(self.shapes[-1], start, stop, 1, 6)
        if self._swept_body is not None:
            total += self._sweep(self._swept_body, start, stop, None, 6)
        return total

    @staticmethod
    def _sweep(sizes: Shape, start: int, stop: int, queries: int | None, own: int) -> int:
        rows = stop - start
        # Rows that make no query have their keys and values moved all the same.
        queries = rows if queries is None else min(queries, rows)
        seen = pairs(stop - queries, stop)
        seen_own = pairs(rows - queries, rows)
        weights = 2 * (sizes.shared * rows + sizes.queried * queries)
        return weights + 2 * sizes.heads * (2 * seen + own * seen_own)

    def adjoint(self, target: int) -> list[int]:
        """The primal adjoint of one target, block by block from the top; without the head."""
        stop = self.stop(target)
        each = []
        for visited, sizes in enumerate(reversed(self.swept)):
            queries = 1 if visited == 0 else stop
            seen = pairs(stop - queries, stop)
            weights = 2 * (sizes.shared * stop + sizes.queried * queries)
            each.append(weights + 10 * sizes.heads * seen)
        return each

    def head_gradient(self, probes: int) -> int:
        """The head's part of a target's adjoint, with what `probes` products share."""
        shared = 2 * self.width * self.logits if shares_curvature(probes, self.width) else 0
        return 2 * self.logits + shared

    def head_product(self, probes: int) -> int:
        """The head's part of one of `probes` products of one target."""
        return 2 * self.width**2 if shares_curvature(probes, self.width) else 2 * self.logits

    def product(self, targets: Sequence[int], probes: int, start: int) -> int:
        """One Hessian-vector product from `start` on, of `probes` in all, of some targets."""
        down = sum(self.down(start, target) for target in targets)
        return self.up(start) + down + len(targets) * self.head_product(probes)

    def block_norms(self, probes: int) -> int:
        """The Gauss-Newton block norms from `probes` factors and as many probes, one target."""
        return 4 * self.tokens * probes**2 * self.width

    def factorisation(self, columns: int, rank: int, passes: int) -> int:
        """A rank-k approximation from `columns` products, one target (`kernels.low_rank`).

        Counted: two Gram matrices of what the products gave, an orthonormalisation in one pass and
        the products with small matrices.
        """
        entries = 2 * self.tokens * self.width
        if passes == 2:
            return entries * (3 * columns**2 + columns * rank)
        return entries * (2 * columns**2 + columns * rank + 3 * rank**2)

    def factor_norms(self, rank: int) -> int:
        """Block norms of one probe from factors of rank k, one target."""
        return 4 * self.tokens * self.width * rank

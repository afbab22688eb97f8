"""Floating-point operations and bytes of every piece of an attribution: progress and cost.

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

`Traffic` counts the same pieces in bytes: what the products with weights take in and give out,
every row once, and the weights once per batch of rows. Attention, whose tiles stay in the cache at
best, and element-wise work are left out, so this too is a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from heat_fast.decoder import Decoder
from heat_fast.decoder.attention import FusedProjection, SeparateProjection
from heat_fast.decoder.block import Block
from heat_fast.decoder.head import shares_curvature
from heat_fast.decoder.norm import Norm
from heat_fast.planner import Budget


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


def shape(block: Block, row: Tensor) -> Shape:
    """The sizes of a block that takes rows like `row [1, d]`."""
    width, row = row.shape[-1], row.to(block.device or row.device)
    projection = block.attention.projection
    if isinstance(projection, SeparateProjection):
        query = projection.query.out_features(row)
        keys = projection.key.out_features(row)
    else:
        assert isinstance(projection, FusedProjection)
        query = projection.heads * projection.head_dim
        keys = projection.key_heads * projection.head_dim
    gate = block.mlp.gate.out_features(row)
    hidden = gate + (0 if block.mlp.up is None else block.mlp.up.out_features(row))
    inner = gate // 2 if block.mlp.fused else gate
    attention = block.attention
    norms = (block.norm, block.mlp_norm, block.post_attention, block.post_mlp)
    normed = sum(width for norm in norms if isinstance(norm, Norm))
    normed += query if isinstance(attention.query_norm, Norm) else 0
    normed += keys if isinstance(attention.key_norm, Norm) else 0
    projected = (query + 2 * keys) * width
    shared = 2 * keys * width if isinstance(projection, SeparateProjection) else projected
    return Shape(
        projected=projected,
        shared=shared,
        queried=projected - shared + (query + hidden + inner) * width,
        count=query // projection.head_dim,
        heads=query,
        key_heads=keys,
        hidden=hidden,
        inner=inner,
        normed=normed,
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
        self.shapes = [shape(block, row) for block in decoder.blocks]
        head = decoder.head
        vocabulary = head.projection.out_features(row.to(head.device or row.device))
        #: One row of logits, or its adjoint.
        self.logits = 2 * self.width * vocabulary
        #: The blocks that gate and curvature go through.
        self.swept = self.shapes[first:]
        self._body = _sum(self.shapes[:-1])
        self._swept_body = _sum(self.swept[:-1])

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
        stop = self.tokens + self.lead + target
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
        stop = self.tokens + self.lead + target
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


class Traffic(Work):
    """Bytes instead of FLOPs: what products with weights move to and from memory, at the least.

    A product takes in and gives out a row's numbers once, in the model's dtype, and reads its
    weights once per batch; `rows` is the token budget that says how many sequences share one.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokens: int,
        targets: int,
        first: int = 0,
        lead: int = 0,
        *,
        rows: int,
    ) -> None:
        super().__init__(decoder, tokens, targets, first, lead)
        self._budget = Budget(rows)
        self._item = decoder.embeddings_weight.element_size()
        self._sizes = self.swept
        vocabulary = self.logits // (2 * self.width)
        self.logits = self._item * (self.width + vocabulary)
        self._head_weights = self._item * self.width * vocabulary
        #: Bytes of each block's weights.
        self._weights = [self._item * (each.shared + each.queried) for each in self.shapes]
        self._swept_weights = sum(self._weights[first:])
        self.shapes = [
            self._moved(block, sizes)
            for block, sizes in zip(decoder.blocks, self.shapes, strict=True)
        ]
        self.swept = self.shapes[first:]
        self._body, self._swept_body = _sum(self.shapes[:-1]), _sum(self.swept[:-1])

    def _moved(self, block: Block, sizes: Shape) -> Shape:
        """Half the bytes of a row's numbers in place of weights, each of which is two FLOPs."""
        width, half = self.width, self._item // 2
        separate = isinstance(block.attention.projection, SeparateProjection)
        made = sizes.heads + 2 * sizes.key_heads
        projected = made + (3 if separate else 1) * width
        shared = 2 * (sizes.key_heads + width) if separate else projected
        up = sizes.hidden + (1 if block.mlp.up is None else 2) * width
        rest = sizes.heads + width + up + sizes.inner + width
        return replace(
            sizes,
            projected=half * projected,
            shared=half * shared,
            queried=half * (projected - shared + rest),
            heads=0,
        )

    def _share(self, weights: int, start: int) -> int:
        """A sequence's share of reading some weights, in a batch of sequences from `start` on."""
        return -(-weights // self._budget.batch(self.length - start, self.length))

    def branch(self, start: int) -> int:
        """A branch with its share of all weights and of the head's."""
        weights = sum(self._weights) + self._head_weights
        return super().branch(start) + self._share(weights, start)

    def trunk(self) -> int:
        """The unmodified context, every weight once."""
        return super().trunk() + sum(self._weights) + self._head_weights

    def gate(self, rollout: str) -> list[int]:
        """Queries, keys and values of each block and its output weights, once."""
        return [
            self._item * (self.length * (each.heads + 2 * each.key_heads) + each.heads * self.width)
            for each in reversed(self._sizes)
        ]

    def up(self, start: int) -> int:
        """One tangent up, with its share of the weights."""
        return super().up(start) + self._share(self._swept_weights, start)

    def down(self, start: int, target: int) -> int:
        """One tangent of the adjoint down, with its share of the weights."""
        return super().down(start, target) + self._share(self._swept_weights, start)

    def adjoint(self, target: int) -> list[int]:
        """The primal adjoint of one target, every weight once."""
        weights = self._weights[len(self._weights) - len(self.swept) :]
        pairs = zip(super().adjoint(target), reversed(weights), strict=True)
        return [moved + weight for moved, weight in pairs]

    def head_gradient(self, probes: int) -> int:
        """The vocabulary's weights down, and again with as many rows as the width if shared."""
        shared = 2 * self._head_weights if shares_curvature(probes, self.width) else 0
        return 2 * self.logits + self._head_weights + shared

    def head_product(self, probes: int) -> int:
        """A row in and out of the shared matrix, or to the vocabulary and back."""
        row = 2 * self._item * self.width
        return row if shares_curvature(probes, self.width) else 2 * self.logits

    def product(self, targets: Sequence[int], probes: int, start: int) -> int:
        """One product, with its share of the vocabulary's weights, read on the way up and down."""
        weights = 0 if shares_curvature(probes, self.width) else 2 * self._head_weights
        shares = len(targets) * self._share(weights, start)
        return super().product(targets, probes, start) + shares

    def block_norms(self, probes: int) -> int:
        """The factors and the probes, once."""
        return self._item * self.tokens * self.width * 2 * probes

    def factorisation(self, columns: int, rank: int, passes: int) -> int:
        """Test vectors and products read, a basis read and written."""
        return self._item * self.tokens * self.width * (2 * columns + 2 * rank)

    def factor_norms(self, rank: int) -> int:
        """The factors, once for a probe."""
        return self._item * self.tokens * self.width * rank

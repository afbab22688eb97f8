"""Bytes of every piece of an attribution: what products with weights move, at the least.

The pieces are those of `heat_fast.work`. A product takes in and gives out a row's numbers once, in
the model's dtype, and reads its weights once per batch of rows. Attention, whose tiles stay in the
cache at best, and element-wise work are left out, so this too is a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from heat_fast.decoder import Decoder
from heat_fast.decoder.block import Block
from heat_fast.decoder.head import shares_curvature
from heat_fast.planner import Budget
from heat_fast.work import Shape, Work


@dataclass(frozen=True)
class _Row:
    """What a block's products take in and give out for one row, bytes."""

    projected: int  # at queries, keys and values
    shared: int  # at what every row meets: see `Shape`
    queried: int  # at what query rows meet besides

    @property
    def all(self) -> int:
        """What a query row's are."""
        return self.shared + self.queried


def _row(block: Block, sizes: Shape, row: Tensor, passed: int, item: int) -> _Row:
    attention = block.attention
    projection = attention.projection.sizes(row)
    output = sizes.count * (attention.value_dim or attention.projection.head_dim) + row.shape[-1]
    own = projection.passed - projection.shared_passed
    return _Row(
        item * projection.passed, item * projection.shared_passed, item * (own + output + passed)
    )


class Traffic:
    """Bytes of the pieces whose FLOPs `work` counts, by the same names.

    `rows` is the token budget that says how many sequences share one reading of the weights.
    """

    def __init__(self, decoder: Decoder, work: Work, rows: int) -> None:
        item = decoder.embeddings_weight.element_size()
        self.width = work.width
        self.tokens = work.tokens
        #: One row of logits, or its adjoint.
        self.logits = item * (work.width + work.vocabulary)
        self._work, self._budget, self._item = work, Budget(rows), item
        shapes, unswept = work.shapes, len(work.shapes) - len(work.swept)
        self._rows = [
            _row(block, sizes, row, fed.passed, item)
            for block, sizes, row, fed in zip(
                decoder.blocks, shapes, work.rows, work.feed_forward, strict=True
            )
        ]
        self._swept = self._rows[unswept:]
        # A row through all blocks under the last one, and through those of them that are swept.
        self._body = sum(row.all for row in self._rows[:-1])
        self._swept_body = sum(row.all for row in self._swept[:-1])
        self._unswept = unswept
        self._head_weights = item * work.width * work.vocabulary
        self._shares: dict[tuple[int, int, int], int] = {}

    def _through(self, body: int, rows: int, queries: int) -> int:
        """Some rows up or down: `body` bytes each under the last block, which makes `queries`."""
        last = self._rows[-1]
        return (body + last.shared) * rows + last.queried * queries

    def _weights(self, rows: int, queries: int, first: int = 0) -> list[int]:
        """What so many rows read of the weights of each block, of the last one's so many queries.

        All of them, save that few rows go to few experts.
        """
        work, each = self._work, []
        last = len(work.shapes) - 1
        for layer in range(first, last + 1):
            sizes, fed = work.shapes[layer], work.feed_forward[layer]
            dense = sizes.shared + sizes.queried - fed.weights
            each.append(self._item * (dense + fed.read(queries if layer == last else rows)))
        return each

    def _batch(self, start: int) -> int:
        """How many sequences from `start` on are run together."""
        length = self._work.length
        return self._budget.batch(length - start, length)

    def _share(self, weights: int, start: int) -> int:
        """A sequence's share of reading some weights."""
        return -(-weights // self._batch(start))

    def _share_of_blocks(self, start: int, queries: int, first: int = 0) -> int:
        """A sequence's share of reading the weights of the blocks from `first` on."""
        place = start, queries, first
        if place not in self._shares:  # many targets ask for the same
            rows, batch = self._work.length - start, self._batch(start)
            weights = sum(self._weights(batch * rows, batch * queries, first))
            self._shares[place] = self._share(weights, start)
        return self._shares[place]

    def branch(self, start: int) -> int:
        """A branch with its share of all weights and of the head's."""
        rows = self._work.length - start
        moved = self._through(self._body, rows, self._work.targets)
        if len(self._rows) > 1:  # the other rows' projections are the trunk's
            moved -= self._rows[0].projected * (rows - 1)
        read = self._share_of_blocks(start, self._work.targets)
        return moved + read + self._share(self._head_weights, start)

    def trunk(self) -> int:
        """The unmodified context with its logits, every weight once."""
        work = self._work
        moved = self._through(self._body, work.length, work.targets)
        read = sum(self._weights(work.length, work.targets)) + self._head_weights
        return moved + work.targets * self.logits + read

    def gate(self, rollout: str) -> list[int]:
        """Queries, keys and values of each block and its output weights, once."""
        length, width = self._work.length, self.width
        return [
            self._item * (length * (each.heads + 2 * each.key_heads) + each.heads * width)
            for each in reversed(self._work.swept)
        ]

    def up(self, start: int) -> int:
        """One tangent up, with its share of the weights."""
        targets = self._work.targets
        moved = self._through(self._swept_body, self._work.length - start, targets)
        return moved + self._share_of_blocks(start, targets, self._unswept)

    def down(self, start: int, target: int) -> int:
        """One tangent of the adjoint of one target down, with its share of the weights."""
        moved = self._through(self._swept_body, self._work.stop(target) - start, 1)
        return moved + self._share_of_blocks(start, 1, self._unswept)

    def adjoint(self, target: int) -> list[int]:
        """The primal adjoint of one target, block by block from the top, every weight once."""
        rows = self._work.stop(target)
        blocks = zip(self._swept, self._weights(rows, 1, self._unswept), strict=True)
        each = [row.all * rows + weights for row, weights in blocks]
        each[-1] -= self._swept[-1].queried * (rows - 1)  # only the target's row makes a query
        return each[::-1]

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
        down = sum(self.down(start, target) for target in targets)
        weights = 0 if shares_curvature(probes, self.width) else 2 * self._head_weights
        head = self.head_product(probes) + self._share(weights, start)
        return self.up(start) + down + len(targets) * head

    def block_norms(self, probes: int) -> int:
        """The factors and the probes, once."""
        return self._item * self.tokens * self.width * 2 * probes

    def factorisation(self, columns: int, rank: int, passes: int) -> int:
        """Test vectors and products read, a basis read and written."""
        return self._item * self.tokens * self.width * (2 * columns + 2 * rank)

    def factor_norms(self, rank: int) -> int:
        """The factors, once for a probe."""
        return self._item * self.tokens * self.width * rank

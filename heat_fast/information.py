"""The information each token carries: what the prediction loses without it (paper Eq. 4).

    I_i = KL( P || P with token i's embedding replaced ),   drop_i = g(X) - g(X without i)

A branch is the trunk with one token replaced. By causality it differs from the trunk at positions
>= i only, so it is run there alone, against the trunk's keys and values below; the last block runs
at the target rows. All targets of a response come from the same branches.

Which branches are run, and whether exactly, is `screening.py`'s choice where that is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from heat_fast.errors import InputError
from heat_fast.kernels.masked_kl import masked_kl, masked_kl_streamed, serves_streamed
from heat_fast.planner import Budget, run_batches, slices
from heat_fast.progress import Ledger, Step
from heat_fast.trunk import Trunk, require_finite

# Logits are made for a few rows at a time: at most this many numbers, 8 MB in float32, of which a
# divergence holds several copies.
LOGIT_ELEMENTS = 1 << 21
# Beyond this size the vocabulary is streamed in chunks, so that many rows share each chunk.
STREAMED_VOCABULARY = 1 << 16
VOCABULARY_CHUNK = 1 << 13
# The GPU kernel wants larger products, and reads a chunk's logits (128 MB in bfloat16) once.
GPU_LOGIT_ELEMENTS = 1 << 26
GPU_VOCABULARY_CHUNK = 1 << 15


def replacement(embed: torch.nn.Module, masking: str, sentinel: int | None, like: Tensor) -> Tensor:
    """The embedding `[d]` that stands in for a masked token.

    `zero`: the zero vector; `mean`: the mean over the vocabulary of what the model's embedding
    layer returns; `sentinel`: the embedding of one token.
    """
    if masking == "zero":
        return torch.zeros_like(like[0])
    weight = embed.weight
    assert isinstance(weight, Tensor)
    rows = weight.shape[0]
    if masking == "sentinel":
        if sentinel is None or not 0 <= sentinel < rows:
            raise InputError(
                f"sentinel_token={sentinel} is outside the model's vocabulary: expected an id from "
                f"0 to {rows - 1}. Pass the id of a token the model knows."
            )
        vector: Tensor = embed(torch.tensor([sentinel], device=like.device))[0]
        return vector
    total = torch.zeros(like.shape[-1], dtype=torch.float64, device=like.device)
    for part in slices(rows, 8192):
        ids = torch.arange(part.start, part.stop, device=like.device)
        total += embed(ids).to(torch.float64).sum(0)
    return (total / rows).to(like.dtype)


class Branches(ABC):
    """A way to run branches of `trunk`, whose tokens are replaced by `vector`.

    `layer_rows` counts the rows that went through an attention or feed-forward layer, `all_rows`
    those of every branch from its own token on.
    """

    def __init__(self, trunk: Trunk, vector: Tensor) -> None:
        self.trunk = trunk
        self.vector = vector
        self.layer_rows = 0
        self.all_rows = 0

    @abstractmethod
    def size(self, length: int) -> int:
        """How many rows of the budget a branch of `length` rows takes."""

    @abstractmethod
    def run(self, tokens: Sequence[int]) -> tuple[Tensor, int]:
        """The last residual rows `[B, n, d]` of the branches of some tokens, in ascending order.

        Also how many rows went through a layer. Changes nothing: batches run side by side.
        """

    def done(self, tokens: Sequence[int], layer_rows: int) -> None:
        """Count the rows of a batch that was run."""
        self.layer_rows += layer_rows
        self.all_rows += self._layers * sum(self.trunk.length - token for token in tokens)

    @property
    def branch_tokens(self) -> int:
        """Rows run; one that was left out on its way counts by its share of the layers."""
        return round(self.layer_rows / self._layers)

    @property
    def _layers(self) -> int:
        return 2 * len(self.trunk.decoder.blocks)


class ExactBranches(Branches):
    """All rows from the first replaced token of a batch on."""

    def size(self, length: int) -> int:
        """A branch takes its rows."""
        return length

    def run(self, tokens: Sequence[int]) -> tuple[Tensor, int]:
        """See `Branches.run`."""
        return self.last(tokens), self._layers * len(tokens) * (self.trunk.length - tokens[0])

    def last(self, tokens: Sequence[int], *, locate: bool = False) -> Tensor:
        """The last residual rows `[B, n, d]`; `locate` (one token) names a non-finite block."""
        decoder, first, batch = self.trunk.decoder, tokens[0], len(tokens)
        embeddings = self.trunk.embeddings[first:].repeat(batch, 1, 1)
        index = torch.tensor(tokens, device=embeddings.device) - first
        embeddings[torch.arange(batch, device=embeddings.device), index] = self.vector
        x = decoder.enter(embeddings, first)
        for layer, block in enumerate(decoder.blocks):
            rows, state = self.trunk.rows(layer, first), self.trunk.states[layer]
            if layer == 0 and len(decoder.blocks) > 1:
                # What enters the first block is the trunk's, save for the replaced rows.
                x = block.feed(x, block.attend_replaced(x, index, rows, state))[0]
            else:
                # Indexed, not unpacked: a name would keep this block's state alive in the next.
                x = block.forward(x, rows, state)[0]
            if locate:
                require_finite(x, f"block {layer} with token {first} masked")
        return x


def information(
    branches: Branches, tokens: Sequence[int], budget: Budget, ledger: Ledger, step: Step
) -> tuple[Tensor, Tensor]:
    """`(KL, drop)` of `k` tokens in ascending order, `[n, k]` each, nats, in at least float32."""
    trunk, count = branches.trunk, len(tokens)
    last = trunk.last.new_empty(count, *trunk.last.shape)
    before = branches.branch_tokens

    def size(first: int) -> int:
        return budget.batch(branches.size(trunk.length - tokens[first]), count - first)

    def run(first: int, stop: int) -> tuple[Tensor, int]:
        return branches.run(tokens[first:stop])

    def keep(first: int, stop: int, found: tuple[Tensor, int]) -> None:
        last[first:stop], rows = found
        branches.done(tokens[first:stop], rows)
        ledger.counts["branches"] += stop - first
        step(sum(trunk.work.branch(token) for token in tokens[first:stop]))

    run_batches(count, budget, size, run, keep)
    ledger.counts["branch_tokens"] += branches.branch_tokens - before
    # The logits of all branches together: the vocabulary's weights are read a few times, not once
    # for every batch.
    divergence, drop = _divergences(trunk, last, budget.workers, step)
    finite = torch.isfinite(divergence).all(-1)
    if not bool(finite.all()):
        token = tokens[int((~finite).nonzero()[0])]
        ExactBranches(trunk, branches.vector).last([token], locate=True)
        require_finite(divergence, f"the logits with token {token} masked")
    return divergence.t().cpu(), drop.t().cpu()


def _divergences(trunk: Trunk, last: Tensor, workers: int, step: Step) -> tuple[Tensor, Tensor]:
    """KL and drop `[B, n]` from the last residual rows, a few branches' logits at a time."""
    targets, vocabulary = trunk.log_probs.shape
    ids = torch.tensor(trunk.targets, device=trunk.log_probs.device)
    divergence = trunk.log_probs.new_empty(last.shape[0], targets)
    drop = torch.empty_like(divergence)
    head = trunk.decoder.head
    plain = head.projection.weight is not None
    fused = plain and serves_streamed(trunk.log_probs, trunk.normaliser)
    streamed = plain and (fused or vocabulary > STREAMED_VOCABULARY)
    chunk = GPU_VOCABULARY_CHUNK if fused else VOCABULARY_CHUNK
    width = min(chunk, vocabulary) if streamed else vocabulary
    elements = GPU_LOGIT_ELEMENTS if fused else LOGIT_ELEMENTS
    budget = Budget(max(1, elements // (targets * width)), workers)

    def run(first: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = last[first:stop]
        if streamed:
            chunks = head.logit_chunks(rows, chunk)
            kl, lost = masked_kl_streamed(
                trunk.log_probs, trunk.normaliser, chunks, ids, head.softcap
            )
            for index in (~torch.isfinite(kl).all(-1)).nonzero()[:, 0].tolist():
                one = head.logits(rows[index : index + 1])
                kl[index : index + 1], lost[index : index + 1] = masked_kl(
                    trunk.log_probs, one, ids
                )
        else:
            kl, lost = masked_kl(trunk.log_probs, head.logits(rows), ids)
        return kl, lost

    def keep(first: int, stop: int, found: tuple[Tensor, Tensor]) -> None:
        divergence[first:stop], drop[first:stop] = found
        step((stop - first) * targets * trunk.work.logits)

    run_batches(len(last), budget, lambda first: budget.batch(1, len(last) - first), run, keep)
    return divergence, drop

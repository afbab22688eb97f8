"""The information each token carries: what the prediction loses without it (paper Eq. 4).

    I_i = KL( P || P with token i's embedding replaced ),   drop_i = g(X) - g(X without i)

A branch is the trunk with one token replaced. By causality it differs from the trunk at positions
>= i only, so it is run there alone, against the trunk's keys and values below; the last block runs
at the target rows. All targets of a response come from the same branches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heat_fast.errors import InputError
from heat_fast.kernels.masked_kl import masked_kl, masked_kl_streamed
from heat_fast.planner import Budget, run_batches, slices
from heat_fast.progress import Ledger, Step
from heat_fast.trunk import Trunk, require_finite

# Logits are made for a few rows at a time: at most this many numbers, 8 MB in float32, of which a
# divergence holds several copies.
LOGIT_ELEMENTS = 1 << 21
# Beyond this size the vocabulary is streamed in chunks, so that many rows share each chunk.
STREAMED_VOCABULARY = 1 << 16
VOCABULARY_CHUNK = 1 << 13


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


def information(
    trunk: Trunk, vector: Tensor, budget: Budget, ledger: Ledger, step: Step
) -> tuple[Tensor, Tensor]:
    """`(KL, drop)`, `[n, N]` each, nats, in at least float32."""
    count = trunk.prompt_length
    last = trunk.last.new_empty(count, *trunk.last.shape)

    def size(first: int) -> int:
        return budget.batch(trunk.length - first, count - first)

    def run(first: int, stop: int) -> None:
        last[first:stop] = _run_branches(trunk, vector, first, stop)
        ledger.counts["branches"] += stop - first
        ledger.counts["branch_tokens"] += (stop - first) * (trunk.length - first)
        step(sum(trunk.work.branch(start) for start in range(first, stop)))

    run_batches(count, budget, size, run)
    # The logits of all branches together: the vocabulary's weights are read a few times, not once
    # for every batch.
    divergence, drop = _divergences(trunk, last, step)
    finite = torch.isfinite(divergence).all(-1)
    if not bool(finite.all()):
        token = int((~finite).nonzero()[0])
        _run_branches(trunk, vector, token, token + 1, locate=True)
        require_finite(divergence, f"the logits with token {token} masked")
    return divergence.t().cpu(), drop.t().cpu()


def _run_branches(
    trunk: Trunk, vector: Tensor, first: int, stop: int, *, locate: bool = False
) -> Tensor:
    """The last residual rows `[B, n, d]` of branches `first..stop-1`, run from position `first`."""
    decoder, batch = trunk.decoder, stop - first
    embeddings = trunk.embeddings[first:].repeat(batch, 1, 1)
    index = torch.arange(batch, device=embeddings.device)
    embeddings[index, index] = vector
    x = decoder.enter(embeddings, first)
    for layer, block in enumerate(decoder.blocks):
        # Indexed, not unpacked: a name would keep this block's state alive during the next.
        x = block.forward(x, trunk.rows(layer, first), trunk.states[layer])[0]
        if locate:
            require_finite(x, f"block {layer} with one of tokens {first}..{stop - 1} masked")
    return x


def _divergences(trunk: Trunk, last: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """KL and drop `[B, n]` from the last residual rows, a few branches' logits at a time."""
    targets, vocabulary = trunk.log_probs.shape
    ids = torch.tensor(trunk.targets, device=trunk.log_probs.device)
    divergence = trunk.log_probs.new_empty(last.shape[0], targets)
    drop = torch.empty_like(divergence)
    head = trunk.decoder.head
    streamed = vocabulary > STREAMED_VOCABULARY and head.projection.weight is not None
    width = VOCABULARY_CHUNK if streamed else vocabulary
    budget = Budget(max(1, LOGIT_ELEMENTS // (targets * width)))

    def run(first: int, stop: int) -> None:
        rows = last[first:stop]
        if streamed:
            chunks = head.logit_chunks(rows, VOCABULARY_CHUNK)
            kl, lost = masked_kl_streamed(trunk.log_probs, trunk.normaliser, chunks, ids)
            for index in (~torch.isfinite(kl).all(-1)).nonzero()[:, 0].tolist():
                one = head.logits(rows[index : index + 1])
                kl[index : index + 1], lost[index : index + 1] = masked_kl(
                    trunk.log_probs, one, ids
                )
        else:
            kl, lost = masked_kl(trunk.log_probs, head.logits(rows), ids)
        divergence[first:stop], drop[first:stop] = kl, lost
        step((stop - first) * targets * trunk.work.logits)

    run_batches(len(last), budget, lambda first: budget.batch(1, len(last) - first), run)
    return divergence, drop

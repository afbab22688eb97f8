"""One prompt and its targets, and the ways in which a baseline asks the model about them.

Predictions and gradients come from the model's own forward, as `inputs_embeds`; attention and
hidden states from the decoder's view, which puts no hooks on the model. Sequences of different
lengths are padded on the right: in a causal model padding there changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from heat_fast.decoder import Decoder, Rows, view
from heat_fast.decoder.norm import wide
from heat_fast.faithful import check_faithful, check_hooks
from heat_fast.forward import (
    check_in_memory,
    context_length,
    padded_log_probs,
    vocabularies,
)
from heat_fast.planner import Budget, collect, forward_rows
from heat_fast.prompt import EncodedPrompt, check_length, encode_prompt, encode_target
from heat_fast.trunk import Trunk, require_finite, run_trunk

# About the logarithm of the smallest double: where all other tokens are ruled out.
_LEAST = -745.0


@dataclass
class Case:
    """The context `X [M, d]`: N prompt tokens, then all but the last of T target tokens.

    `counts` holds how many sequences went forward and backward through the model; `notes` what a
    method has to tell beside its scores.
    """

    model: Any
    tokenizer: Any
    prompt: EncodedPrompt
    targets: tuple[int, ...]
    embeddings: Tensor
    budget: Budget
    counts: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, model: Any, tokenizer: Any, prompt: Any, target: Any) -> Case:
        """Encode prompt and target; a target of None is the model's own next token."""
        (vocabulary, predicted), longest = vocabularies(model), context_length(model)
        encoded = encode_prompt(prompt, tokenizer, vocabulary, longest)
        targets = encode_target(target, tokenizer, min(vocabulary, predicted)) or ()
        check_length(len(encoded), max(1, len(targets)), longest)
        device = check_in_memory(model)
        ids = torch.tensor([*encoded.token_ids, *targets[:-1]], device=device)
        embeddings = model.get_input_embeddings()(ids).detach()
        rows = forward_rows(device, embeddings.shape[-1])
        case = cls(model, tokenizer, encoded, targets or (0,), embeddings, Budget(rows))
        if not targets:
            case.targets = (int(case.log_probs()[0, 0].argmax()),)
        return case

    @property
    def tokens(self) -> int:
        """Number of prompt tokens, N."""
        return len(self.prompt)

    @property
    def target_ids(self) -> Tensor:
        """The target ids `[T]`."""
        return torch.tensor(self.targets, device=self.embeddings.device)

    def pick(self, log_probs: Tensor) -> Tensor:
        """The targets' own of log-probabilities `[B, T, V]`: `[B, T]`."""
        index = self.target_ids.to(log_probs.device).expand(len(log_probs), -1)
        return log_probs.gather(-1, index[..., None])[..., 0]

    def odds(self, log_probs: Tensor) -> Tensor:
        """`logit P = log P - log(1 - P)` of the targets, `[B, T]`.

        1 - P is the sum over the other tokens: the difference has no digits left where P is near 1.
        """
        index = self.target_ids.to(log_probs.device)[:, None]
        # One context at a time: a copy of all would be as large as what is given.
        others = [each.scatter(-1, index, -math.inf).logsumexp(-1) for each in log_probs]
        return self.pick(log_probs) - torch.stack(others).clamp_min(_LEAST)

    def log_probs(self, embeddings: Tensor | None = None) -> Tensor:
        """`log P [B, T, V]` at the target positions of contexts `[B, M, d]`, nats."""
        embeddings = self.embeddings[None] if embeddings is None else embeddings
        return self.forward(embeddings, len(self.targets))

    def target_log_probs(self, contexts: Callable[[int, int], Tensor], count: int) -> Tensor:
        """`g [count, T]` of many contexts; `contexts(first, stop)` makes some of them."""
        length, kept = len(self.embeddings), len(self.targets)

        def run(first: int, stop: int) -> Tensor:
            return self.pick(self.log_probs(contexts(first, stop)))

        return self._batches(count, length, kept, run)

    def subsets(self, subsets: Sequence[Sequence[int]]) -> Tensor:
        """`log P [B, T, V]` with only some prompt tokens left in the text, in ascending order.

        The others are deleted: later tokens move up. Every subset holds at least one token.
        """
        later, targets = self.embeddings[self.tokens :], len(self.targets)
        lengths = [len(each) + len(later) for each in subsets]
        kept = max(lengths) - min(lengths) + targets

        def run(first: int, stop: int) -> Tensor:
            some = [torch.cat((self.embeddings[list(each)], later)) for each in subsets[first:stop]]
            return self.forward(some, targets)

        return self._batches(len(subsets), max(lengths), kept, run)

    def gradients(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """`g [B, T]` of contexts `[B, M, d]` and its gradients `[B, T, N, d]`."""

        def run(first: int, stop: int) -> Tensor:
            with torch.enable_grad():
                leaf = embeddings[first:stop].detach().clone().requires_grad_()
                values = self.pick(self.forward(leaf, len(self.targets)))
                sums, last = values.sum(0), len(self.targets) - 1
                rows = [
                    torch.autograd.grad(sums[target], leaf, retain_graph=target < last)[0]
                    for target in range(len(self.targets))
                ]
            self.counts["backward"] += (stop - first) * len(self.targets)
            found = torch.stack(rows, 1)[:, :, : self.tokens].to(values.dtype)
            column = values.detach()[:, :, None, None].expand(*found.shape[:3], 1)
            return torch.cat((found, column), -1)

        # A graph holds every block's activations: fewer rows at a time.
        both = self._batches(len(embeddings), 2 * len(self.embeddings), len(self.targets), run)
        return both[:, :, 0, -1], both[..., :-1]

    def hidden_states(self, layer: int) -> Tensor:
        """Residual stream `[N + T, d]` of the prompt and all targets, after `layer` blocks."""
        check_length(self.tokens, len(self.targets) + 1, context_length(self.model))
        embed = self.model.get_input_embeddings()
        whole = torch.cat((self.embeddings, embed(self.target_ids[-1:]).detach()))
        decoder, length = view(self.model, len(whole)), len(whole)
        x = decoder.enter(whole[None], 0)
        for block in decoder.blocks[:layer]:
            x = block.forward(x, Rows(0, 0, length))[0]
        self.counts["forward"] += 1
        require_finite(x, f"the hidden states after {layer} blocks")
        return x[0].to(wide(x.dtype))

    def streams(self, embeddings: Tensor) -> tuple[list[Tensor], Tensor]:
        """What enters each block of a context `[M, d]`, and `log P [1, T, V]`."""
        decoder, length = self._decoder, len(embeddings)
        x, entering = decoder.enter(embeddings[None], 0), []
        for block in decoder.blocks:
            entering.append(x[0])
            x = block.forward(x, Rows(0, 0, length))[0]
        self.counts["forward"] += 1
        return entering, self._end(x)

    def patched(self, layer: int, stream: Tensor, other: Tensor) -> Tensor:
        """`g [N, T]` with, one after the other, each prompt token's row of what enters a block
        (`stream [M, d]`) taken from `other`."""
        length = len(stream)

        def run(first: int, stop: int) -> Tensor:
            x = stream.repeat(stop - first, 1, 1)
            x[range(stop - first), range(first, stop)] = other[first:stop]
            for block in self._decoder.blocks[layer:]:
                x = block.forward(x, Rows(0, 0, length))[0]
            self.counts["forward"] += stop - first
            return self.pick(self._end(x))

        return self._batches(self.tokens, length, len(self.targets), run)

    @cached_property
    def _decoder(self) -> Decoder:
        return view(self.model, len(self.embeddings))

    def _end(self, x: Tensor) -> Tensor:
        logits = self._decoder.head.logits(x[:, -len(self.targets) :])
        return torch.log_softmax(logits, dim=-1)

    def prefixes(self, embeddings: Tensor, ids: Sequence[int]) -> Tensor:
        """Log-probabilities `[B, M, n]` of n tokens after every prefix of contexts `[B, M, d]`."""

        def run(first: int, stop: int) -> Tensor:
            whole = self.forward(embeddings[first:stop], embeddings.shape[1])
            return whole[..., list(ids)]

        return self._batches(len(embeddings), embeddings.shape[1], embeddings.shape[1], run)

    def trunk(self) -> Trunk:
        """The context with what every block keeps of it, attention included."""
        trunk = run_trunk(self._decoder, self.embeddings, self.targets)
        check_hooks(self.model, trunk)
        check_faithful(self.model, trunk)
        self.counts["forward"] += 2
        return trunk

    def forward(self, contexts: Sequence[Tensor] | Tensor, kept: int) -> Tensor:
        """`log P [B, kept, V]` at the last positions of one batch of contexts `[M, d]`."""
        self.counts["forward"] += len(contexts)
        return padded_log_probs(self.model, list(contexts), kept)

    def batch(self, length: int, kept: int, most: int) -> int:
        """How many items of `length` rows, of which `kept` make logits, are run at once.

        Within the budget of rows and of logits; at least one, at most `most`.
        """
        _, predicted = vocabularies(self.model)
        return self.budget.batch(length, most, kept * predicted)

    def _batches(
        self, count: int, length: int, kept: int, run: Callable[[int, int], Tensor]
    ) -> Tensor:
        """`run(first, stop)` over all sequences, within the budget of rows and of logits."""
        return collect(
            count, self.budget, lambda first: self.batch(length, kept, count - first), run
        )

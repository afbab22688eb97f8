"""How the metrics ask a model: perturbed contexts in batches; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heat_fast.checks import check_whole, is_whole
from heat_fast.errors import InputError
from heat_fast.forward import context_length, padded_log_probs, undisturbed, vocabularies
from heat_fast.metrics._estimate import check_vector
from heat_fast.planner import Budget, collect, forward_rows
from heat_fast.prompt import check_length
from heat_fast.trunk import require_finite

if TYPE_CHECKING:
    from heat_fast.result import Attribution


@dataclass(frozen=True)
class Case:
    """A prompt, the next token that was explained, and a score for every prompt token.

    token_ids: N ids, a list, an array or a tensor; target: an id; scores: `[N]`, of any method.

    Example:
        >>> Case([5, 6, 7], 9, [0.1, 0.7, 0.2]).target
        9
    """

    token_ids: Sequence[int]
    target: int
    scores: Any

    @classmethod
    def of(cls, result: Attribution) -> Case:
        """That of an attribution, for its first target: the one that follows the prompt."""
        return cls(result.token_ids, result.target_ids[0], result.target_scores[0])


class Asker:
    """Probabilities of the token after a prompt, for many perturbed prompts.

    `rows`: token rows in a batch; None for a choice that suits the device.
    """

    def __init__(self, model: Any, rows: int | None) -> None:
        if not hasattr(model, "get_input_embeddings"):
            raise InputError(
                f"model is {type(model).__name__}: expected a loaded Hugging Face causal language "
                "model. Load one with AutoModelForCausalLM.from_pretrained(...)."
            )
        self.model = model
        self.embed = model.get_input_embeddings()
        weight = self.embed.weight
        #: How many ids the model reads, and how many it predicts.
        self.vocabulary, self.predicted = vocabularies(model)
        self.longest = context_length(model) if hasattr(model, "config") else None
        asked = None if rows is None else check_whole("rows", rows)
        self.budget = Budget(asked or forward_rows(weight.device, weight.shape[-1]))

    def plain(self, case: Case, where: str) -> Case:
        """The case with ids that are Python's, all of them in the vocabulary."""
        if not isinstance(case, Case):
            raise InputError(
                f"{where} is {type(case).__name__}: expected a Case. Write "
                "Case(token_ids, target, scores), or Case.of(result)."
            )
        token_ids = [check_id(token, self.vocabulary, where) for token in case.token_ids]
        target = check_id(case.target, min(self.vocabulary, self.predicted), f"{where}'s target")
        return replace(case, token_ids=token_ids, target=target)

    def embeddings(self, token_ids: Sequence[int]) -> Tensor:
        """The input embeddings `[N, d]`."""
        ids: Tensor = torch.tensor(list(token_ids), device=self.embed.weight.device)
        found: Tensor = self.embed(ids)
        return found.detach()

    def after(
        self,
        lengths: Sequence[int],
        make: Callable[[int], Tensor],
        keep: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """`keep(log P [B, V]) [B]` after every context `make(k) [lengths[k], d]`, on the CPU."""
        longest, spread = max(lengths), max(lengths) - min(lengths) + 1

        def run(first: int, stop: int) -> Tensor:
            contexts = [make(which) for which in range(first, stop)]
            found = padded_log_probs(self.model, contexts, 1)[:, 0]
            require_finite(found, "the logits of a perturbed prompt")
            return keep(found).double().cpu()

        return collect(
            len(lengths),
            self.budget,
            lambda at: self.budget.batch(longest, len(lengths) - at, spread * self.vocabulary),
            run,
        )


@contextmanager
def asking(model: Any, rows: int | None) -> Iterator[Asker]:
    """Ask a model; its modes, gradients and the global random state stay as they are."""
    asker = Asker(model, rows)
    with undisturbed(model, asker.embed.weight.device):
        yield asker


def read(cases: Sequence[Case], asker: Asker) -> list[tuple[Case, Tensor]]:
    """The cases with their scores `[N]`, checked: the model can read every prompt."""
    if len(cases) == 0:
        raise InputError("no case was given: expected at least one. Pass a list of Case.")
    found = []
    for number, case in enumerate(cases):
        where = f"case {number}"
        plain = asker.plain(case, where)
        tokens = len(plain.token_ids)
        try:
            check_length(tokens, 1, asker.longest)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        found.append((plain, check_vector(case.scores, where, tokens=tokens)))
    return found


def check_id(token: Any, vocabulary: int, where: str) -> int:
    """The id of a token, an array's or a tensor's element too, or an error."""
    found = token.tolist() if hasattr(token, "tolist") else token
    if not is_whole(found) or not 0 <= found < vocabulary:
        raise InputError(
            f"token id {found!r} of {where} is not in the vocabulary: expected whole numbers "
            f"from 0 to {vocabulary - 1}. Encode the prompt with the model's own tokenizer."
        )
    return int(found)

"""Attribution by what the model writes itself: chains of thought and the words they take up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heat_fast.baselines.base import Baseline, register
from heat_fast.baselines.case import Case
from heat_fast.fields import integer, positive, setting
from heat_fast.forward import context_length
from heat_fast.generation import PLAIN_SAMPLING, without_end
from heat_fast.prompt import check_length


@register("sea_cot")
@dataclass(frozen=True, kw_only=True)
class SelfEntailedChains(Baseline):
    """Chains of thought, ranked by self-entailment and overlap: SEA-CoT (Yeo et al. 2024).

        score[i] = sum_c w_c [x_i occurs in chain c] / sum_c w_c
        w_c = P(target | chain c, prompt) * overlap_c

    The source samples chains, asks the model itself how far each entails question and answer, adds
    how many of their words it takes up, and keeps the best chain; it scores no tokens, and the HEAT
    paper, which compares with it, does not say how it makes scores of it. The mapping chosen here:
    a prompt token scores the weighted share of the chains that hold its id. Entailment is the
    probability of the target after the chain and then the prompt; overlap is the share of the
    prompt's different ids that the chain holds; the two are multiplied. `chains` continuations of
    the prompt of `length` tokens are sampled at `temperature`, without an instruction to reason, as
    a model that was not tuned for one would not follow it. All 0 where no chain has a word of the
    prompt. From 0 to 1. Cost: `chains` generations and T + 1 times as many tokens read once more.
    """

    chains: int = setting(8, integer(minimum=1))
    length: int = setting(32, integer(minimum=1))
    temperature: float = setting(0.7, positive(0.7))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        ids, count = list(case.prompt.token_ids), len(case.targets)
        check_length(len(ids) + self.length, count, context_length(case.model))
        embed, distinct = case.model.get_input_embeddings(), set(ids)
        total = torch.zeros(count, len(ids), dtype=torch.double)
        weights = torch.zeros(count, 1, dtype=torch.double)
        for chain in self._sample(case, ids):
            held = distinct.intersection(chain)
            before = embed(torch.tensor(chain, device=case.embeddings.device)).detach()
            context = torch.cat((before, case.embeddings))[None]
            entailed = case.pick(case.log_probs(context))[0].exp().double().cpu()
            weight = (entailed * len(held) / len(distinct))[:, None]
            total += weight * torch.tensor([token in held for token in ids])
            weights += weight
        return torch.where(weights > 0, total / weights, 0.0)

    def _sample(self, case: Case, ids: list[int]) -> list[list[int]]:
        device = case.embeddings.device
        given = torch.tensor([ids], device=device)
        ends = getattr(case.model.generation_config, "eos_token_id", None)
        pad = ends[0] if isinstance(ends, list) else ends
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            found = case.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=self.length,
                num_return_sequences=self.chains,
                return_dict_in_generate=False,
                **{**PLAIN_SAMPLING, "temperature": float(self.temperature)},
                pad_token_id=0 if pad is None else pad,
            )
        case.counts["generated"] += found[:, len(ids) :].numel()
        rows: list[list[int]] = found[:, len(ids) :].tolist()
        return [without_end(row, case.model, case.tokenizer) for row in rows]

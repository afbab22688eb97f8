"""Attribution from what the model says of changed prompts; and at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from heat_fast.attributor import Attributor
from heat_fast.baselines.base import Baseline, Replacement, as_result, register
from heat_fast.baselines.case import Case
from heat_fast.config import HeatConfig
from heat_fast.errors import InputError, MissingPackageError
from heat_fast.fields import integer, one_of, positive, setting

Sources = Literal["token", "sentence"]


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Baseline):
    """Uniform random scores in [0, 1): what any method has to beat. Cost: none."""

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        return torch.rand(
            len(case.targets), case.tokens, generator=self._generator(), dtype=torch.float32
        )


@register("leave_one_out")
@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Baseline):
    """Divergence when one token is masked: HEAT's information component by itself.

        score[i] = KL( P || P with token i's embedding replaced )

    `masking`: `"zero"` or `"mean"`, as in `HeatConfig`. Cost: 1 forward and N forwards of the
    tokens from i on, half of N whole ones.
    """

    masking: Replacement = setting("zero", one_of(Replacement))

    def scores(self, case: Case) -> dict[str, Tensor]:
        """See `Baseline.scores`."""
        config = HeatConfig(
            curvature="none", masking=self.masking, beta=0.0, gamma=1.0, seed=self.seed
        )
        attributor = Attributor(case.model, None, config)
        result = attributor.attribute(list(case.prompt.token_ids), list(case.targets))
        case.counts["forward"] += case.tokens + 1
        return {
            "target_scores": result.information,
            "information": result.information,
            "log_prob_drop": result.log_prob_drop,
        }


@register("context_cite")
@dataclass(frozen=True, kw_only=True)
class ContextCite(Baseline):
    """A sparse linear surrogate of random ablations (Cohen-Wang et al. 2024).

        logit p(target | sources v) ~ b + w . v,   w by the Lasso,   v[s] ~ Bernoulli(keep)

    `logit p = log p - log(1 - p)`; each target token has a surrogate of its own. As in the
    authors' code, v is standardised, the penalty is `alpha` = 0.01 and w is scaled back.
    `sources`: `"token"` or `"sentence"` (needs `heat-fast[sentences]`; a sentence's weight is
    shared out evenly among its tokens, so that their sum is the weight). Ablated sources are
    deleted from the sequence. The paper never ablates the question: here special tokens, those of
    a chat template and the last token, from which the prediction is made, always stay and score
    0. Signed. Needs scikit-learn (`heat-fast[evaluation]`). Cost: `ablations` forwards.
    """

    ablations: int = setting(64, integer(minimum=2))
    sources: Sources = setting("token", one_of(Sources))
    keep: float = setting(0.5, positive(0.5, maximum=1))
    alpha: float = setting(0.01, positive(0.01))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        fit = _lasso()
        groups = self._sources(case)
        kept = (
            torch.rand(
                self.ablations, len(groups), generator=self._generator(), dtype=torch.float32
            )
            < self.keep
        )
        removable = {token for group in groups for token in group}
        fixed = set(range(case.tokens)) - removable
        subsets = []
        for row in kept.tolist():
            chosen = [group for group, stays in zip(groups, row, strict=True) if stays]
            subsets.append(sorted(fixed.union(*map(set, chosen))))
        outputs = case.odds(case.subsets(subsets)).double().cpu()
        scores = torch.zeros(len(case.targets), case.tokens, dtype=torch.double)
        for target in range(len(case.targets)):
            weights = fit(kept.double(), outputs[:, target], self.alpha)
            for group, weight in zip(groups, weights.tolist(), strict=True):
                scores[target, group] = weight / len(group)
        return scores

    def _sources(self, case: Case) -> list[list[int]]:
        prompt, last = case.prompt, case.tokens - 1
        template = [role is None for role in prompt.roles or ("",) * len(prompt)]
        fixed = {
            token
            for token in range(case.tokens)
            if prompt.special[token] or template[token] or token == last
        }
        if self.sources == "token":
            groups = [[token] for token in range(case.tokens)]
        else:
            sentences = as_result(case, (0,), {}, torch.zeros(1), {}).by_sentence()
            groups = [list(range(sentence.start, sentence.stop)) for sentence in sentences]
        groups = [[token for token in group if token not in fixed] for group in groups]
        groups = [group for group in groups if group]
        if not groups:
            raise InputError(
                f"a prompt of {case.tokens} tokens has nothing that ContextCite may ablate: "
                "expected tokens beside special ones and the last. Pass a longer prompt."
            )
        return groups


@register("reagent")
@dataclass(frozen=True, kw_only=True)
class ReAGent(Baseline):
    """Random replacements, accumulated as logits (Zhao and Shan 2024).

        D = P(target | x) - P(target | x with a random subset R replaced)
        logits[i] += logit((D + 1) / 2) for i in R, -= for the others;   score = softmax(logits)

    `share` of the tokens are replaced in each of `steps` updates. The paper draws replacements
    from RoBERTa and stops once the top tokens alone keep the prediction; here they come from the
    model's own distribution after the tokens before (uniform for the first token), so that no
    other model is needed, and all steps are taken. The logits are averaged over the steps, not
    summed: the order is the same, and small scores do not vanish in float32. Cost: `steps` + 2
    forwards.
    """

    steps: int = setting(64, integer(minimum=1))
    share: float = setting(0.3, positive(0.3, maximum=1))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        x, count, generator = case.embeddings, case.tokens, self._generator()
        embed = case.model.get_input_embeddings()
        size = max(1, round(self.share * count))
        order = torch.rand(self.steps, count, generator=generator, dtype=torch.float32).argsort(-1)
        replaced = torch.zeros(self.steps, count, dtype=torch.bool)
        replaced.scatter_(1, order[:, :size], True)
        draws = _draw(case, self.steps, generator)

        def contexts(first: int, stop: int) -> Tensor:
            batch = x.repeat(stop - first, 1, 1)
            where = replaced[first:stop].to(x.device)
            batch[:, :count][where] = embed(draws[first:stop].to(x.device)[where]).detach()
            return batch

        found = case.target_log_probs(contexts, self.steps).exp().double().cpu()
        whole = case.pick(case.log_probs()).exp().double().cpu()
        update = torch.logit((whole - found + 1) / 2, eps=1e-6)  # [steps, T]
        sign = torch.where(replaced, 1.0, -1.0).double()
        return (torch.einsum("st,sn->tn", update, sign) / self.steps).softmax(-1)


@register("causal_tracing")
@dataclass(frozen=True, kw_only=True)
class CausalTracing(Baseline):
    """Restoring single states of a corrupted run (Meng et al. 2022).

        score[i] = mean_l P(target | X + noise, h_l[i] restored) - P(target | X + noise)

    h_l[i] is the clean residual stream of token i entering block l. The noise is Gaussian, `noise`
    = 3 times the standard deviation of the prompt's embeddings. The paper corrupts a subject that
    is marked by hand, and looks at every layer; here all prompt tokens are corrupted, and a token's
    score is the mean over the layers and over `samples` draws of the noise (the paper takes 10;
    3 here). Signed. Cost: `samples` (N L + 1) forwards, of half the blocks on average.
    """

    samples: int = setting(3, integer(minimum=1))
    noise: float = setting(3.0, positive(3.0))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        x, count, generator = case.embeddings, case.tokens, self._generator()
        clean, _ = case.streams(x)
        spread = self.noise * float(x[:count].double().std())
        scores = torch.zeros(len(case.targets), count, dtype=torch.double)
        for _ in range(self.samples):
            corrupted = x.clone()
            drawn = torch.randn(count, x.shape[-1], generator=generator, dtype=torch.float32)
            corrupted[:count] += spread * drawn.to(x)
            streams, last = case.streams(corrupted)
            before = case.pick(last).exp()
            for layer, stream in enumerate(streams):
                found = case.patched(layer, stream, clean[layer]).exp()
                scores += (found - before).T.double().cpu() / (len(streams) * self.samples)
        return scores


def _draw(case: Case, steps: int, generator: torch.Generator) -> Tensor:
    """Replacement ids `[steps, N]` from the model's distribution before each token."""
    before = case.forward(case.embeddings[None, : case.tokens], case.tokens)[0].exp().cpu()
    rows = int(case.model.get_input_embeddings().weight.shape[0])
    probabilities = before.roll(1, 0)[:, :rows]
    probabilities[0] = 1
    return torch.multinomial(probabilities, steps, replacement=True, generator=generator).T


def _lasso() -> Any:
    """`fit(v [B, S], outputs [B], alpha) -> w [S]`: the Lasso on standardised masks."""
    try:
        from sklearn.linear_model import Lasso
    except ImportError as error:
        raise MissingPackageError.of(
            "scikit-learn",
            error,
            "for context_cite, which fits a Lasso",
            "Install it with pip install 'heat-fast[evaluation]'.",
        ) from error

    def fit(v: Tensor, outputs: Tensor, alpha: float) -> Tensor:
        scale = v.std(0, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)
        x = (v - v.mean(0)) / scale
        # Without a seed it would draw one from numpy's global state.
        lasso = Lasso(alpha=alpha, random_state=0).fit(x.numpy(), outputs.numpy())
        return torch.from_numpy(lasso.coef_) / scale

    return fit

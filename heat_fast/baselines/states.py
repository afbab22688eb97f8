"""Attribution read off what the model computes anyway: attention, hidden states, predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from heat_fast.baselines.base import Baseline, register
from heat_fast.baselines.case import Case
from heat_fast.decoder.norm import wide
from heat_fast.errors import ConfigError
from heat_fast.fields import OR_NONE, integer, one_of, optional, setting
from heat_fast.gate import head_flows, target_rows
from heat_fast.information import replacement

Direction = Literal["forward", "backward", "bidirectional"]
Mode = Literal["single", "masked"]


@register("attention_rollout")
@dataclass(frozen=True, kw_only=True)
class AttentionRollout(Baseline):
    """Attention multiplied through the layers (Abnar and Zuidema 2020).

        score[i] = (A~_L ... A~_1)[p, i],   A~_l = (I + mean_h A[l,h]) / 2

    p is the position that predicts the target. Rows of the product sum to 1 over the context, of
    which the earlier target tokens have a share. The row alone is carried down the layers, never a
    matrix of all positions. Cost: 2 forwards, the trunk and the model's own beside it.
    """

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        trunk = case.trunk()
        rho = target_rows(trunk, wide(trunk.embeddings.dtype))
        for layer in reversed(trunk.layers):
            rho = (rho + head_flows(trunk, layer, rho).mean((0, 1)).to(rho.device)) / 2
        return rho[:, : case.tokens]


@register("peering")
@dataclass(frozen=True, kw_only=True)
class Peering(Baseline):
    """Similarity of hidden states, "Peering into the Mind of LMs" (Phukan et al. 2024).

        score[i] = cos( h_l[i], h_l[y] )

    y is the target token where it is read (the position after the one that predicts it), l a
    middle layer. The paper chooses l, and a threshold above which a token is an attribution, on
    labelled data; here `layer` counts the blocks passed, by default half of them, and there is no
    threshold. Signed. Cost: 1 forward, of one token more.
    """

    layer: int | None = setting(None, optional(integer(minimum=0, also=OR_NONE)))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        blocks = int(case.model.config.get_text_config().num_hidden_layers)
        layer = blocks // 2 if self.layer is None else self.layer
        if layer > blocks:
            raise ConfigError(
                f"layer={layer} of a model of {blocks} blocks: expected 0 to {blocks}. Choose one "
                "of them, or leave it out."
            )
        states = functional.normalize(case.hidden_states(layer), dim=-1)
        return states[case.tokens :] @ states[: case.tokens].T


@register("tdd")
@dataclass(frozen=True, kw_only=True)
class TokenDistributionDynamics(Baseline):
    """Token distribution dynamics (Feng et al. 2024): how each token moves the prediction.

        forward   score[i] = r(x_1..x_i) - r(x_1..x_{i-1})
        backward  score[i] = r(x_i..x_N) - r(x_{i+1}..x_N)
        r(x) = P(target | x) - P(alternative | x);   bidirectional: the sum of both

    P is the model's next-token distribution: the head on the last layer's hidden state. r of no
    token is 0. `alternative`: the token id that the target is contrasted with; the paper names one
    by hand for each pair, the default here is the most likely token beside the target. Earlier
    target tokens follow the suffix in the backward direction; in the forward direction they are
    not read yet. Signed. Cost: 1 forward (forward direction), N forwards (backward), or N + 1.
    """

    direction: Direction = setting("bidirectional", one_of(Direction))
    alternative: int | None = setting(None, optional(integer(minimum=0, also=OR_NONE)))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        log_probs = case.log_probs()[0]
        others = self._alternatives(case, log_probs)
        count = case.tokens
        scores = torch.zeros(len(case.targets), count, dtype=log_probs.dtype)
        if self.direction != "backward":
            both = case.prefixes(case.embeddings[None, :count], [*case.targets, *others])[0].exp()
            target, other = both.T.chunk(2)
            scores += _steps(target - other).cpu()
        if self.direction != "forward":
            found = case.subsets([range(first, count) for first in range(count)])
            index = torch.tensor(others, device=found.device).expand(count, -1)
            other = found.gather(-1, index[..., None])[..., 0]
            reach = (case.pick(found).exp() - other.exp()).T
            scores += _steps(reach.flip(-1)).flip(-1).cpu()
        return scores

    def _alternatives(self, case: Case, log_probs: Tensor) -> list[int]:
        vocabulary = log_probs.shape[-1]
        if self.alternative is None:
            masked = log_probs.scatter(
                -1, case.target_ids.to(log_probs.device)[:, None], -torch.inf
            )
            return [int(each) for each in masked.argmax(-1)]
        if self.alternative >= vocabulary:
            raise ConfigError(
                f"alternative={self.alternative} is outside the model's vocabulary: expected an id "
                f"from 0 to {vocabulary - 1}. Pass the id of a token the model knows."
            )
        return [self.alternative] * len(case.targets)


@register("progressive_inference")
@dataclass(frozen=True, kw_only=True)
class ProgressiveInference(Baseline):
    """Intermediate predictions (Kariyappa et al. 2024).

        single pass   score[i] = P(target | x_1..x_i) - P(target | x_1..x_{i-1})
        masked        the weights w of  P(target | S) ~ w_0 + sum_{i in S} w_i

    In the masked passes every prefix of a randomly masked prompt is one coalition S, so that one
    forward gives N of them; w is fitted by least squares with the Shapley kernel
    `(N - 1) / (C(N,|S|) |S| (N - |S|))`. The paper optimises the distribution of masks; here each
    mask keeps a share of tokens drawn uniformly. Masked tokens get the zero embedding, and the
    whole and the empty prompt weigh as much as all others together. Before the first token the
    prediction is uniform, `1 / V`. Signed. Cost: 1 forward, or `passes` + 2.
    """

    mode: Mode = setting("single", one_of(Mode))
    passes: int = setting(64, integer(minimum=1))

    def scores(self, case: Case) -> Tensor:
        """See `Baseline.scores`."""
        x, count = case.embeddings[: case.tokens], case.tokens
        vocabulary = case.log_probs().shape[-1]
        if self.mode == "single":
            reached = case.prefixes(x[None], case.targets)[0].exp().T
            return _steps(reached, 1 / vocabulary)
        generator = self._generator()
        share = torch.rand(self.passes, 1, generator=generator, dtype=torch.float32)
        kept = torch.rand(self.passes, count, generator=generator, dtype=torch.float32) < share
        kept = torch.cat((torch.ones(1, count, dtype=torch.bool), kept))
        vector = replacement(case.model.get_input_embeddings(), "zero", None, x)
        masked = torch.where(kept[..., None].to(x.device), x, vector)
        values = case.prefixes(masked, case.targets).exp().double().cpu().flatten(0, 1)
        prefix = torch.ones(count, count, dtype=torch.bool).tril()
        coalitions = (kept[:, None] & prefix).flatten(0, 1).double()
        sizes = coalitions.sum(-1)
        inner = sizes.clamp(1, max(1, count - 1))
        log_kernel = (
            torch.lgamma(inner + 1)
            + torch.lgamma(count - inner + 1)
            - torch.log(inner)
            - torch.log((count - inner).clamp(min=1))
        )
        between = (sizes > 0) & (sizes < count)
        weights = torch.where(between, log_kernel, -torch.inf).softmax(0).nan_to_num()
        weights = torch.where(sizes == count, 1.0, weights)
        design = torch.cat((torch.ones(len(coalitions), 1, dtype=torch.double), coalitions), 1)
        empty = torch.zeros(1, count + 1, dtype=torch.double)
        empty[0, 0] = 1
        uniform = torch.full((1, len(case.targets)), 1 / vocabulary, dtype=torch.double)
        root = torch.cat((weights, torch.ones(1, dtype=torch.double))).sqrt()[:, None]
        solution = torch.linalg.lstsq(
            root * torch.cat((design, empty)), root * torch.cat((values, uniform)), driver="gelsd"
        ).solution
        scores: Tensor = solution[1:].T
        return scores


def _steps(values: Tensor, before: float = 0.0) -> Tensor:
    """Differences of neighbours `[.., N]`, the first from `before`."""
    return torch.diff(values, dim=-1, prepend=torch.full_like(values[..., :1], before))

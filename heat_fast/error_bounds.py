"""What an approximation costs, term by term: the paper's Theorem 4, measured.

With `M`, `S`, `I` of the exact run and `M~`, `S~`, `I~` of the approximate one (windows, low rank,
fewer layers, coded estimates), the triangle inequality splits the error of a score exactly as the
paper's equations 15 and 16 do:

    |score - score~|  <=  |M - M~| (beta S + gamma I)                        window
                          + M~ beta |S - S~|                                 curvature
                          + M~ gamma |I - I~|                                information

The theorem (Eq. 17) replaces the differences by worst cases, each of which is measured here too:

    eps_M = max_i |M - M~|                                   semantic flow that leaves the windows
    sqrt(d) tau_k,   tau_k = | H - H_k |_F                   tail of the low-rank approximation
    (eps_orig + eps_mask) / mu                               shift of the next-token distributions

Three remarks on the theorem. `sqrt(d)` bounds the l1 norm of a vector of d entries, as in this
package's S (`E |H_ii r|_1 <= sqrt(d) |H_ii|_F`), not that of the paper's d x Td matrix. The theorem
compares H_k with H of the same context: where windows and low rank meet, what a window does to H is
in the measured curvature term and in no term of the theorem. And `mu`, the smallest probability of
any token of the vocabulary, makes the last term vacuous for a real model: it is reported, so that
this can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heat_fast.config import HeatConfig
from heat_fast.drops import check_attribution, check_model
from heat_fast.errors import InputError
from heat_fast.forward import log_probs, on_cpu, unchanged
from heat_fast.information import replacement
from heat_fast.provenance import identity
from heat_fast.result import Attribution
from heat_fast.windows import Plan, plan_windows

#: Settings that both runs must share for their difference to be the approximation's error.
SHARED = ("alpha", "beta", "gamma", "rollout", "masking", "sentinel_token", "curvature")


@dataclass(frozen=True)
class Bounds:
    """Theorem 4 for one prompt; arrays `[n_targets, N]` in float32 unless noted.

    `error`: of the scores. `window`, `curvature`, `information`: the measured terms, whose sum is
    at least `error`. The theorem's worst cases: `gate_shift [n]` is eps_M; `tail [n]` is tau_k,
    None without a low-rank approximation; `width` is d; for the `sampled` tokens
    `distribution_shift [n, sampled]` is eps_orig + eps_mask (l1 norms, means over the windows of a
    token) and `mu [n]` the smallest probability met. `theorem [n, sampled]` is their sum as in
    Eq. 17, which knows no gradient term: None where `alpha` is not 0.
    """

    error: Tensor
    window: Tensor
    curvature: Tensor
    information: Tensor
    gate_shift: Tensor
    tail: Tensor | None
    width: int
    sampled: tuple[int, ...]
    distribution_shift: Tensor
    mu: Tensor
    theorem: Tensor | None

    def report(self) -> dict[str, Any]:
        """Means over tokens and the worst cases, as JSON values."""
        measured = ("error", "window", "curvature", "information")
        return {
            **{name: float(getattr(self, name).mean()) for name in measured},
            "gate_shift": self.gate_shift.tolist(),
            "tail": None if self.tail is None else self.tail.tolist(),
            "sampled": list(self.sampled),
            "distribution_shift": self.distribution_shift.tolist(),
            "mu": self.mu.tolist(),
            "theorem": None if self.theorem is None else self.theorem.tolist(),
        }


@on_cpu()
def bounds(model: Any, approximate: Attribution, exact: Attribution, *, sample: int = 8) -> Bounds:
    """Measure where an approximate attribution loses its accuracy.

    `approximate` and `exact` are attributions of one prompt and target by `model`, say of variants
    `"lr+win"` and `"full"` with the same seed. The distributions are run anew for `sample` tokens,
    spread evenly over the prompt: one forward of the model for each in the full context and in
    every window that holds it.

    Raises `InputError` where the two are not of one prompt, target and setting, or not of this
    model, where one was normalised or screened, where `exact` has windows itself, or where those of
    `approximate` are not averaged alike (`window_weights="uniform"`), as the theorem has them.

    Example:
        >>> import heat_fast
        >>> model, prompt = heat_fast.load_demo_model().model, list(range(5, 25))
        >>> exact = heat_fast.attribute(model, None, prompt, 9, probes=2)
        >>> cut = {"window": 12, "sink": 1, "tail": 3, "window_weights": "uniform"}
        >>> windowed = heat_fast.attribute(model, None, prompt, 9, "win", probes=2, **cut)
        >>> found = heat_fast.bounds(model, windowed, exact, sample=2)
        >>> total = found.window + found.curvature + found.information
        >>> bool((found.error <= 1.001 * total).all())
        True
    """
    for name, given in (("approximate", approximate), ("exact", exact)):
        check_attribution(given, name)
    config, reference = _config(approximate), _config(exact)
    _check(model, approximate, exact, config, reference, sample)
    curvature, information = config.beta * exact.curvature, config.gamma * exact.information
    shift = (exact.gate - approximate.gate).abs()
    window = shift * (curvature + information + config.alpha * exact.gradient_norm)
    gate = approximate.gate
    # The plain gradient, where alpha asks for it, is an approximation of curvature's kind.
    apart = config.beta * (exact.curvature - approximate.curvature).abs()
    apart += config.alpha * (exact.gradient_norm - approximate.gradient_norm).abs()
    lost = config.gamma * (exact.information - approximate.information).abs()
    count = len(exact.token_ids)
    sampled = tuple(sorted({round(at) for at in torch.linspace(0, count - 1, sample).tolist()}))
    moved, mu = _distributions(model, exact, config, sampled)
    gate_shift, tail = shift.amax(-1), _tail(approximate)
    width = int(model.get_input_embeddings().weight.shape[-1])
    chosen = list(sampled)
    theorem = gate_shift[:, None] * (curvature + information)[:, chosen]
    theorem = theorem + config.gamma * moved / mu[:, None]
    if tail is not None:
        theorem = theorem + config.beta * math.sqrt(width) * tail[:, None]
    return Bounds(
        error=(exact.target_scores - approximate.target_scores).abs(),
        window=window,
        curvature=gate * apart,
        information=gate * lost,
        gate_shift=gate_shift,
        tail=tail,
        width=width,
        sampled=sampled,
        distribution_shift=moved,
        mu=mu,
        theorem=None if config.alpha else theorem,
    )


def _config(result: Attribution) -> HeatConfig:
    return HeatConfig.from_dict(result.metadata["config"])


def _check(
    model: Any,
    approximate: Attribution,
    exact: Attribution,
    config: HeatConfig,
    other: HeatConfig,
    sample: int,
) -> None:
    one, two = ((each.context_ids, each.target_ids) for each in (approximate, exact))
    if one != two:
        raise InputError(
            "the two attributions are of different prompts, responses or targets: expected the "
            "same tokens. Attribute one prompt twice, with the target written out."
        )
    check_model(approximate.metadata, exact.metadata, "the two attributions")
    check_model(exact.metadata, identity(model), "the attributions and the model")
    different = [name for name in SHARED if getattr(config, name) != getattr(other, name)]
    if different:
        raise InputError(
            f"the two attributions differ in {', '.join(different)}: expected settings that change "
            "the approximation alone. Repeat one of them with the other's settings."
        )
    for run in (config, other):
        for name in ("normalize", "coverage", "branch_tolerance"):
            if getattr(run, name) is not None:
                raise InputError(
                    f"an attribution with {name}={getattr(run, name)!r}: expected None, for the "
                    "theorem's terms are those of plain scores. Repeat it without."
                )
    if len(plan_windows(len(exact.token_ids), other)) > 1:
        raise InputError(
            f"exact has window={other.window}: expected one context. Repeat it with window=None."
        )
    several = len(plan_windows(len(exact.token_ids), config)) > 1
    if several and config.window_weights != "uniform":
        raise InputError(
            f"an attribution with window_weights={config.window_weights!r}: expected 'uniform', "
            "for the theorem's terms are plain means over windows. Repeat it with that."
        )
    if sample < 1:
        raise InputError(f"sample={sample}: expected at least 1. Pass the number of tokens to run.")


def _tail(result: Attribution) -> Tensor | None:
    """`|H - H_k|_F` of every target, as the held-out probes of the run measured it."""
    found = result.metadata.get("low_rank")
    if found is None:
        return None
    return torch.tensor(found["residual"]) * torch.tensor(found["norm"])


@torch.no_grad()
def _distributions(
    model: Any, result: Attribution, config: HeatConfig, sampled: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """`eps_orig + eps_mask [n, sampled]` and the smallest windowed probability `[n]`."""
    embed, count = model.get_input_embeddings(), len(result.token_ids)
    targets = len(result.target_ids)
    ids = result.context_ids
    with unchanged(model):
        embeddings = embed(torch.tensor(ids, device=embed.weight.device))
        vector = replacement(embed, config.masking, config.sentinel_token, embeddings)
        later = list(range(count, len(ids)))

        def run(rows: list[int], masked: int | None = None) -> Tensor:
            context = embeddings[[*rows, *later]]
            if masked is not None:
                context[rows.index(masked)] = vector
            return log_probs(model, context, targets).exp().cpu().double()

        plan, whole = plan_windows(count, config), list(range(count))
        windows = [plan.indices(number) for number in range(len(plan))]
        plain = [run(rows) for rows in windows]
        original, smallest = run(whole), torch.stack(plain).amin((0, -1))
        shifts = []
        for token in sampled:
            masked, found = run(whole, token), []
            for number in _holding(plan, token):
                windowed = run(windows[number], token)
                smallest = torch.minimum(smallest, windowed.amin(-1))
                apart = (original - plain[number]).abs() + (masked - windowed).abs()
                found.append(apart.sum(-1))
            shifts.append(torch.stack(found).mean(0))
    return torch.stack(shifts, dim=-1).float(), smallest.float()


def _holding(plan: Plan, token: int) -> Iterator[int]:
    """The windows that hold a token."""
    return (number for number in range(len(plan)) if token in plan.indices(number))

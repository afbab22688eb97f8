"""Windows: a long context as several short ones, and what they agree on (paper Algorithm 1).

A window holds the first `sink` tokens of the prompt, a stretch of it, and its last `tail` tokens:

    [0, sink)  +  [a, a + body)  +  [N - tail, N),     body = window - sink - tail

so that the prediction is made from the end of the prompt, with the attention sink in place; with
`sink=0, tail=0` a window is the stretch alone, the paper's plain reading, and the target is
predicted from the stretch's own end. Stretches begin every `(1 - overlap) * body` tokens; the last
one ends where the tail begins, so all windows are equally long and every token is in one at least.
A prompt of at most `window` tokens is one window.

Each window is run as its own short context, at positions `0, 1, ...`, its gate normalised in it.
With `W(i)` the windows that hold token i, every component is then

    effect_i = 1 / |W(i)| * sum_{w in W(i)} a_w effect_w[i]
    gate_i   = sum_{w in W(i)} a_w gate_w[i] / sum_{w in W(i)} a_w

and the score is made of these means. Every `a_w` is 1 where `window_weights="uniform"` (the paper's
count normaliser). By default it is the target's probability in the window, as a share of its
largest in any window,

    a_w = P_w(target) / max_v P_v(target),

for what a window says about a token that it does not predict is no reason for that token: a window
without the evidence would be heard as loudly as the one with it, and its gradients are often
larger. With a `window_tolerance` every `a_w` up to it is taken to be 0, and a window that is left
out for all targets is not swept for curvature and information. What crosses from one stretch to
another is lost: `leakage` tells how far windows that share tokens disagree about them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heat_fast.combine import Components, combine
from heat_fast.config import HeatConfig
from heat_fast.finding import Finding
from heat_fast.kernels.window_mean import window_mean
from heat_fast.lowrank import Quality
from heat_fast.screening import Screening

#: The least weight of a window, so that a token which is in such windows alone has a mean gate.
LEAST_WEIGHT = 1e-12


@dataclass(frozen=True)
class Plan:
    """The windows of a prompt of `tokens` tokens: common `sink` and `tail`, and a stretch each.

    Example:
        >>> plan = plan_windows(10, HeatConfig(window=6, overlap=0.5, sink=1, tail=1))
        >>> [plan.indices(number) for number in range(len(plan))]
        [[0, 1, 2, 3, 4, 9], [0, 3, 4, 5, 6, 9], [0, 5, 6, 7, 8, 9]]
    """

    tokens: int
    sink: int
    tail: int
    stretches: tuple[range, ...]

    def __len__(self) -> int:
        return len(self.stretches)

    @property
    def length(self) -> int:
        """Prompt tokens of each window."""
        return self.sink + len(self.stretches[0]) + self.tail

    def indices(self, number: int) -> list[int]:
        """The prompt tokens of one window, in order."""
        stretch = self.stretches[number]
        return [*range(self.sink), *stretch, *range(self.tokens - self.tail, self.tokens)]


def plan_windows(tokens: int, config: HeatConfig) -> Plan:
    """Cut a prompt into windows as the configuration says: one where it says nothing."""
    if config.window is None or tokens <= config.window:
        return Plan(tokens, 0, 0, (range(tokens),))
    sink, tail = config.sink, config.tail
    body = config.window - sink - tail
    last = tokens - tail - body
    stride = max(1, round((1 - config.overlap) * body))
    starts = [*range(sink, last, stride), last]
    return Plan(tokens, sink, tail, tuple(range(start, start + body) for start in starts))


def weights(findings: Sequence[Finding], config: HeatConfig) -> Tensor:
    """`a_w` of every window and target, `[windows, n]` in float64, from 0 to 1."""
    log_probs = torch.stack([finding.log_probs for finding in findings]).double()
    if config.window_weights == "uniform":
        return torch.ones_like(log_probs)
    # Of those that were swept: which, the model's own forward decided, and in half precision that
    # is not the view's to the last digit.
    swept = torch.tensor([[finding.swept] for finding in findings])
    log_probs = log_probs.masked_fill(~swept, -math.inf)
    # No window gives the target any probability: none is to be preferred.
    relative = (log_probs - log_probs.amax(0)).exp().nan_to_num(1.0).masked_fill(~swept, 0.0)
    if config.window_tolerance is not None:
        relative = relative.masked_fill(relative <= config.window_tolerance, 0.0)
    return relative.clamp_min(LEAST_WEIGHT)


def worth_sweeping(log_probs: Tensor, tolerance: float) -> list[bool]:
    """Which windows weigh more than `tolerance` for some target; `log_probs [windows, n]`, nats."""
    best = log_probs.amax(0)
    # A target that no window gives any probability has windows of equal weight.
    worth = (log_probs > best + math.log(tolerance)) | (log_probs == best)
    return [bool(each) for each in worth.any(-1)]


def accumulate(plan: Plan, findings: Sequence[Finding], config: HeatConfig) -> Finding:
    """The means over windows, `[n, N]` each; of one window, that window itself.

    Information that screening left out of a window is taken to be what the windows that measured it
    found, each by its weight; a token is skipped only where every one of its windows skipped it.
    The standard error of a mean is at most the mean of the standard errors, however the windows'
    errors are correlated, and is given as that. The log-probabilities of the targets are those of
    the last window.
    """
    if len(findings) == 1:
        return findings[0]
    shares = weights(findings, config)[..., None]
    findings = [each.times(share) for each, share in zip(findings, shares, strict=True)]
    parts = [finding.parts for finding in findings]
    screenings = [each.screening for each in findings if each.screening is not None]
    skipped = [torch.tensor(each.skipped) for each in screenings if each.skipped is not None]
    measured = [~each for each in skipped] or None
    rows = [
        share.to(part.gate).expand_as(part.gate) for share, part in zip(shares, parts, strict=True)
    ]
    average = _mean(plan, rows)
    gate = _mean(plan, [part.gate for part in parts]) / average

    def known(values: Sequence[Tensor]) -> Tensor:
        """The mean of what was measured; a window that skipped a token is taken to be like it."""
        if measured is None:
            return _mean(plan, values)
        counted = [row * each.to(row) for row, each in zip(rows, measured, strict=True)]
        least = torch.finfo(gate.dtype).tiny  # tokens that no window measured have 0
        return (
            _mean(plan, values, measured)
            / _mean(plan, counted, measured).clamp_min(least)
            * average
        )

    screening = Screening.together(screenings, gate, partial(_mean, plan)) if screenings else None
    together = Components(
        gate=gate,
        curvature=_mean(plan, [part.curvature for part in parts]),
        information=known([part.information for part in parts]),
        log_prob_drop=known([part.log_prob_drop for part in parts]),
        gradient_norm=_mean(plan, [part.gradient_norm for part in parts]),
        skipped=None if screening is None else screening.sums,
    )
    errors = [each.stderr for each in findings if each.stderr is not None]
    stderr = _mean(plan, errors) if len(errors) == len(findings) else None
    quality = Quality.worst([finding.quality for finding in findings])
    last = findings[-1]
    return Finding(together, stderr, screening, last.targets, last.log_probs, quality)


def leakage(plan: Plan, findings: Sequence[Finding], config: HeatConfig) -> float | None:
    """How far neighbouring windows disagree about the tokens that both hold; None of one window.

        sum_i |a_i - b_i| / sum_i (a_i + b_i),   a, b the scores of two windows in a row,

    over the tokens i of both, averaged over targets and pairs: 0 where they agree, 1 where no token
    has a score in both (a reading of the paper's "attribution mass discrepancy"). Windows that were
    not swept have no scores to compare; None where no pair is left.
    """
    found = []
    for number in range(1, len(plan)):
        if not (findings[number - 1].swept and findings[number].swept):
            continue
        rows = []
        for which in (number - 1, number):
            score, _ = combine(findings[which].parts, config)
            row = score.new_full((len(score), plan.tokens), float("nan"))
            row[:, plan.indices(which)] = score
            rows.append(row)
        shared = ~(rows[0] + rows[1]).isnan().any(0)
        left, right = (row[:, shared] for row in rows)
        total = (left + right).sum(-1)
        apart = (left - right).abs().sum(-1)
        found.append(torch.where(total > 0, apart / total, 0.0).mean())
    return float(torch.stack(found).mean()) if found else None


def report(plan: Plan, findings: Sequence[Finding], config: HeatConfig) -> dict[str, Any]:
    """The plan, the leakage, and the targets' log P in every window, as JSON values.

    `stretches`: half-open ranges of the prompt; `log_probs [windows][n]`, nats; `not_swept`:
    numbers of the windows that `window_tolerance` left out.
    """
    return {
        "tokens": plan.length,
        "sink": plan.sink,
        "tail": plan.tail,
        "stretches": [[stretch.start, stretch.stop] for stretch in plan.stretches],
        "leakage": leakage(plan, findings, config),
        "log_probs": [finding.log_probs.tolist() for finding in findings],
        "not_swept": [number for number, finding in enumerate(findings) if not finding.swept],
    }


def _mean(plan: Plan, rows: Sequence[Tensor], counted: Sequence[Tensor] | None = None) -> Tensor:
    """Means `[n, N]` of the windows' values `[n, length]`, of those `counted [length]` alone."""
    device = rows[0].device
    index = torch.tensor([plan.indices(number) for number in range(len(rows))], device=device)
    mask = None if counted is None else torch.stack(list(counted)).to(device)
    return window_mean(torch.stack(list(rows)), index, plan.tokens, mask)

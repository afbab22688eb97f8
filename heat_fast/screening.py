"""Approximate information: leave out tokens, or rows of their branches, that can hardly matter.

Two screens, alone or together, both off unless the configuration asks for them:

`coverage` leaves out whole tokens. The information part of the score is `sum_i gate[i] I[i]`, and
the gate is known beforehand, so tokens are measured in descending order of their gate (for several
targets, of their largest gate), in rounds, until for every target

    B <= (1 - coverage) (P + B),   P = sum over the measured of gate I,
    B = near * (sum of the gates of the rest) + largest * (largest gate of the rest)

and the same for the envelope's part, with `max(0, drop)` in place of I. `largest` is the largest I
measured, `near` the largest in that half of the measured tokens whose gates are smallest: the rest
is taken to be as informative as the most informative of its neighbours in the order, and one token
of it as informative as any. (`largest` for all of the rest would be safer and useless: one token of
10 nats, and nearly every token has to be measured.) A round at most doubles the number of tokens
and never exceeds what would be enough if it brought no surprise. Curvature, whose part is complete,
does not enter.

`branch_tolerance` leaves out rows. A branch's residual stream is compared with the trunk's after
the attention and after the feed-forward layer of every block; where it differs by less than that
share of the trunk's l2 norm, the row is frozen: from then on nothing is computed for it and others
see the trunk's keys and values there. The target rows always stay, and so do rows that the windows
of the blocks so far keep out of the replaced token's reach: they are the trunk's only for now.
Frozen rows do not wake, so a path through a row that changes little in one block and much in a
later one (a head that copies) is lost; and many small changes that are left out add up, so that
small divergences come out too small.

Neither has a guarantee, since information has no upper bound. Both therefore measure a sample of
what they left out exactly, report it (`Screening.report`), and use it in the result: `coverage` of
the tokens at random, `branch_tolerance` of the branches, half of it those whose gates are largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heat_fast.combine import Components
from heat_fast.config import HeatConfig
from heat_fast.decoder.norm import wide
from heat_fast.information import Branches, ExactBranches, information
from heat_fast.kernels.branch_attention import RaggedRows
from heat_fast.planner import Budget
from heat_fast.progress import Ledger, Step
from heat_fast.ranks import spearman
from heat_fast.trunk import Trunk

#: Tokens of the first round, and tokens or branches of an audit.
FIRST_ROUND = 8
AUDITED = 8
# A batch of branches may start with so many times the rows of the budget: most are soon frozen.
_MOST_STARTED = 8
# Below so many pairs a rank correlation says nothing.
_FEWEST_RANKED = 4


@dataclass(frozen=True)
class _Rows:
    """Active rows `x [R, d]` of several branches, by branch, replaced token and position `[R]`."""

    x: Tensor
    branch: Tensor
    token: Tensor
    position: Tensor

    def select(self, index: Tensor) -> _Rows:
        """Some of the rows."""
        return _Rows(self.x[index], self.branch[index], self.token[index], self.position[index])

    def to(self, device: torch.device | None) -> _Rows:
        """The same rows where a block computes (None: where they are)."""
        if device is None or device == self.x.device:
            return self
        return _Rows(
            self.x.to(device),
            self.branch.to(device),
            self.token.to(device),
            self.position.to(device),
        )


class FrozenBranches(Branches):
    """Runs branches without the rows that stay within `tolerance` of the trunk's."""

    def __init__(self, trunk: Trunk, vector: Tensor, tolerance: float) -> None:
        super().__init__(trunk, vector)
        self.tolerance = tolerance

    def size(self, length: int) -> int:
        """The rows of a branch that stay active, going by the branches before."""
        share = self.layer_rows / self.all_rows if self.all_rows else 1.0
        return round(length * max(share, 1 / _MOST_STARTED))

    def run(self, tokens: Sequence[int]) -> tuple[Tensor, int]:
        """See `Branches.run`."""
        blocks, states = self.trunk.decoder.blocks, self.trunk.states
        rows = self._start(tokens)
        layer_rows, reach = 0, 0
        for layer, (block, state) in enumerate(zip(blocks[:-1], states[:-1], strict=True)):
            rows, count = rows.to(block.device), len(rows.x)
            # What enters the first block is the trunk's, save for the replaced rows.
            keys = count if layer else len(tokens)
            ragged = RaggedRows(rows.branch, rows.position, keys, count)
            middle = block.attend_ragged(rows.x, ragged, state)
            assert state.streams is not None
            window = block.attention.masking.window
            reach += self.trunk.length if window is None else window - 1
            kept = self._moved(rows, middle, state.streams.middle, reach)
            rows, middle = rows.select(kept), middle[kept]
            layer_rows += count + len(rows.x)
            rows = replace(rows, x=block.feed(rows.x, middle)[0])
            rows = rows.select(self._moved(rows, rows.x, state.streams.leaving, reach))
        rows, count = rows.to(blocks[-1].device), len(rows.x)
        rows = rows.select(self._targets_last(rows))
        queries = len(tokens) * len(self.trunk.targets)
        ragged = RaggedRows(rows.branch, rows.position, count, queries)
        middle = blocks[-1].attend_ragged(rows.x, ragged, states[-1])
        x = blocks[-1].feed(rows.x[-queries:], middle)[0]
        return x.view(len(tokens), -1, x.shape[-1]), layer_rows + 2 * count

    def _start(self, tokens: Sequence[int]) -> _Rows:
        """All rows of the branches as they enter the first block, the replaced ones first."""
        device, length = self.trunk.embeddings.device, self.trunk.length
        replaced = torch.tensor(tokens, device=device)
        index = torch.arange(len(tokens), device=device)
        after = length - 1 - replaced
        branch = torch.repeat_interleave(index, after)
        # A branch's rows end with the last position.
        position = length - after.cumsum(0)[branch] + torch.arange(len(branch), device=device)
        branch, position = torch.cat((index, branch)), torch.cat((replaced, position))
        embeddings = self.trunk.embeddings[position]
        embeddings[: len(tokens)] = self.vector
        x = self.trunk.decoder.enter(embeddings, position)
        return _Rows(x, branch, replaced[branch], position)

    def _is_target(self, rows: _Rows) -> Tensor:
        return rows.position >= self.trunk.first_row

    def _targets_last(self, rows: _Rows) -> Tensor:
        """An order of the rows by branch and position, with the target rows of all at the end."""
        length = self.trunk.length
        place = rows.branch * length + rows.position
        return torch.argsort(place + self._is_target(rows) * (length * len(place)))

    def _moved(self, rows: _Rows, x: Tensor, trunk: Tensor, reach: int) -> Tensor:
        """`[R]`, True for rows that stay active; a value that is not finite stays, to be found."""
        original = trunk[rows.position].to(wide(x.dtype))
        distance = torch.linalg.vector_norm(x.to(original.dtype) - original, dim=-1)
        near: Tensor = distance < self.tolerance * torch.linalg.vector_norm(original, dim=-1)
        beyond = rows.position - rows.token > reach
        return ~near | beyond | self._is_target(rows)


#: Of a row `[n, length]` per window, every token's mean over the windows that hold it, `[n, N]`.
Mean = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Screening:
    """What screening left out, and what an audit of it found.

    `skipped [N]`: the tokens without information, None without `coverage`. `estimates [n, 1]`:
    sums over them of information, of positive drop, and of gate times information, from the audit.
    `facts`: counts and errors, as `report` gives them.
    """

    skipped: tuple[bool, ...] | None
    estimates: tuple[Tensor, Tensor, Tensor] | None
    facts: dict[str, dict[str, Any]]

    @property
    def sums(self) -> tuple[Tensor, Tensor] | None:
        """What the skipped tokens' information and positive drop are estimated to sum to."""
        return None if self.estimates is None else self.estimates[:2]

    def times(self, share: Tensor) -> Screening:
        """The same with its estimates multiplied, `[n, 1]`."""
        if self.estimates is None:
            return self
        information, drop, weighted = (each * share.to(each) for each in self.estimates)
        return replace(self, estimates=(information, drop, weighted))

    @staticmethod
    def together(windows: Sequence[Screening], gate: Tensor, mean: Mean) -> Screening:
        """What was left out of several windows together: counts add up, the worst error is kept.

        `gate [n, N]` of the windows together. Errors and divergences of the audits are those of
        single windows, before they are weighted.
        """
        never, estimates = None, None
        facts: dict[str, dict[str, Any]] = {}
        skipped = [torch.tensor(each.skipped) for each in windows if each.skipped is not None]
        if skipped:
            everywhere = mean([each[None].to(gate.dtype) for each in skipped])[0] == 1
            never = tuple(bool(each) for each in everywhere.tolist())

            def expected(kind: int) -> Tensor:
                """An estimate of a sum, spread over its tokens, averaged and summed again."""
                spread = []
                for window, mask in zip(windows, skipped, strict=True):
                    assert window.estimates is not None
                    each = window.estimates[kind] / max(1, int(mask.sum()))
                    spread.append(each * mask.to(each.dtype))
                return mean(spread)[:, everywhere].sum(-1, keepdim=True)

            estimates = (expected(0), expected(1), expected(2))
            found = [each.facts["coverage"] for each in windows]
            audit = _tokens_together([each["audit"] for each in found])
            rounds = sum(each["rounds"] for each in found)
            facts["coverage"] = _token_facts(gate, never, rounds, audit)
        if "branch_tolerance" in windows[0].facts:
            found = [each.facts["branch_tolerance"] for each in windows]
            audit = _branches_together([each["audit"] for each in found])
            rows, frozen = (sum(each[name] for each in found) for name in ("rows", "frozen"))
            facts["branch_tolerance"] = {"rows": rows, "frozen": frozen, "audit": audit}
        return Screening(never, estimates, facts)

    def report(self, parts: Components, score: Tensor, config: HeatConfig) -> dict[str, Any]:
        """Counts and audits as JSON values: `"coverage"` and `"branch_tolerance"`, where set.

        `score_share_lost`: the share of a target's score `[n, N]` that the skipped tokens'
        information is estimated to hold, at the worst target.
        """
        if self.estimates is None:
            return self.facts
        total, _, weighted = self.estimates
        lost = config.gamma * weighted
        if config.normalize is not None:
            lost = lost / (parts.information.sum(-1, keepdim=True) + total)
        share = _share(lost, score.sum(-1, keepdim=True))
        coverage = self.facts["coverage"]
        audit = {**coverage["audit"], "score_share_lost": share}
        return {**self.facts, "coverage": {**coverage, "audit": audit}}


def screened_information(
    trunk: Trunk,
    vector: Tensor,
    gates: Tensor,
    config: HeatConfig,
    budget: Budget,
    ledger: Ledger,
    step: Step,
) -> tuple[Tensor, Tensor, Screening]:
    """`(KL, drop)`, `[n, N]` each, nats, 0 for skipped tokens; and what was left out.

    `gates [n, N]`. The same tokens are skipped and audited for the same seed, whatever the budget.
    """
    count = trunk.prompt_length
    exact = ExactBranches(trunk, vector)
    frozen: FrozenBranches | None = None
    if config.branch_tolerance is not None:
        frozen = FrozenBranches(trunk, vector, config.branch_tolerance)
    generator = torch.Generator().manual_seed(config.seed)
    kl = torch.zeros(gates.shape, dtype=trunk.log_probs.dtype)
    drop = torch.zeros_like(kl)

    def measure(tokens: Sequence[int], branches: Branches, step: Step) -> None:
        if tokens:
            kl[:, tokens], drop[:, tokens] = information(branches, tokens, budget, ledger, step)

    order = torch.argsort(gates.amax(0), descending=True, stable=True).tolist()
    measured, wanted, rounds = 0, count, 0
    if config.coverage is not None:
        wanted = min(count, FIRST_ROUND)
    while measured < wanted:
        measure(sorted(order[measured:wanted]), frozen or exact, step)
        measured, rounds = wanted, rounds + 1
        if config.coverage is not None:
            values = (kl[:, order], drop[:, order].clamp_min(0))
            enough = max(
                tokens_enough(gates[:, order], value[:, :measured], config.coverage)
                for value in values
            )
            wanted = min(enough, 2 * measured)

    skipped, estimates = None, None
    facts: dict[str, dict[str, Any]] = {}
    run = sorted(order[:measured])
    if config.coverage is not None:
        rest = sorted(order[measured:])
        audited = _draw(rest, generator, AUDITED)
        measure(audited, exact, step)
        skipped = tuple(token in set(rest) - set(audited) for token in range(count))
        estimates = _extrapolate(gates, kl, drop, audited, len(rest) - len(audited))
        facts["coverage"] = _token_facts(gates, skipped, rounds, _token_audit(kl[:, audited]))
    if frozen is not None:
        # Those whose information weighs most in the score, and some of the others at random.
        leading = order[: min(measured, AUDITED // 2)]
        others = [token for token in run if token not in leading]
        audited = sorted(leading + _draw(others, generator, AUDITED - len(leading)))
        approximate = kl[:, audited]
        measure(audited, exact, lambda work: None)
        facts["branch_tolerance"] = {
            "rows": frozen.all_rows,
            "frozen": frozen.all_rows - frozen.layer_rows,
            "audit": _branch_audit(approximate, kl[:, audited]),
        }
    return kl, drop, Screening(skipped, estimates, facts)


def tokens_enough(gates: Tensor, values: Tensor, coverage: float) -> int:
    """How many tokens have to be measured if those that follow bring no surprise.

    `gates [n, N]` of all tokens in the order of measurement, `values [n, k]` of the first `k`. The
    smallest count of at least `k` that meets the criterion of this module for every target, with
    what the first `k` tell; `k` itself means that no more are needed.

    Example:
        >>> gates = torch.tensor([[0.5, 0.3, 0.1, 0.09, 0.01]])
        >>> [tokens_enough(gates, torch.tensor([[8.0, 1.0]]), c) for c in (0.7, 0.9, 0.99)]
        [2, 4, 5]
    """
    count, total = values.shape[1], gates.shape[1]
    largest = values.amax(-1, keepdim=True)
    near = values[:, count // 2 :].amax(-1, keepdim=True)
    part = (gates[:, :count] * values).sum(-1, keepdim=True)
    # After 0, 1, ... more tokens: the gates of the rest, their sum and their maximum, 0 at the end.
    rest = torch.nn.functional.pad(gates[:, count:], (0, 1)).flip(-1)
    bound = near * rest.cumsum(-1).flip(-1) + largest * rest.cummax(-1).values.flip(-1)
    enough = (bound <= (1 - coverage) * (part + bound)).all(0)
    return min(total, count + int(enough.nonzero()[0]))


def _draw(tokens: Sequence[int], generator: torch.Generator, most: int) -> list[int]:
    """At most so many of some tokens, drawn without replacement, in ascending order."""
    drawn = torch.randperm(len(tokens), generator=generator)[:most].tolist()
    return sorted(tokens[index] for index in drawn)


def _extrapolate(
    gates: Tensor, kl: Tensor, drop: Tensor, audited: list[int], others: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over `others` tokens, `[n, 1]`, of I, max(0, drop) and gate I, by the audit's means."""

    def total(values: Tensor) -> Tensor:
        if not others:
            return values.new_zeros(len(values), 1)
        return others * values[:, audited].mean(-1, keepdim=True)

    return total(kl), total(drop.clamp_min(0)), total(gates.to(kl.dtype) * kl)


def _share(part: Tensor, rest: Tensor) -> float:
    """`part / (part + rest)` of non-negative numbers, the largest, 0 where both are 0."""
    whole = part + rest
    return float(torch.where(whole > 0, part / whole, 0.0).max())


# --- what is told of it ---------------------------------------------------------------------------


def _token_facts(
    gates: Tensor, skipped: Sequence[bool], rounds: int, audit: dict[str, Any]
) -> dict[str, Any]:
    """What `coverage` left out: counts, and the gates of the skipped tokens at the worst target."""
    chosen = torch.tensor(skipped)
    return {
        "tokens": len(skipped),
        "skipped": sum(skipped),
        "gate_share_skipped": _share(gates[:, chosen].sum(-1), gates[:, ~chosen].sum(-1)),
        "rounds": rounds,
        "audit": audit,
    }


def _token_audit(kl: Tensor) -> dict[str, Any]:
    """The information `[n, k]` of `k` tokens that would have been skipped, nats."""
    return {
        "tokens": kl.shape[1],
        "largest_information": float(kl.max()) if kl.shape[1] else 0.0,
        "mean_information": float(kl.mean()) if kl.shape[1] else 0.0,
    }


def _tokens_together(audits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The audits of tokens in several windows as one."""
    audited = sum(audit["tokens"] for audit in audits)
    weighted = sum(audit["tokens"] * audit["mean_information"] for audit in audits)
    return {
        "tokens": audited,
        "largest_information": max(audit["largest_information"] for audit in audits),
        "mean_information": weighted / audited if audited else 0.0,
    }


def _branch_audit(approximate: Tensor, exact: Tensor) -> dict[str, Any]:
    """Errors of divergences `[n, k]`: nats, relative to the exact ones, and of their order."""
    error = (approximate - exact).abs()
    relative = (error / exact)[exact > 0]
    ranked = zip(approximate, exact, strict=True) if exact.shape[1] >= _FEWEST_RANKED else ()
    orders = [order for pair in ranked if (order := spearman(*pair)) is not None]
    return {
        "branches": exact.shape[1],
        "largest_error": float(error.max()),
        "median_relative_error": float(relative.median()) if len(relative) else 0.0,
        "largest_relative_error": float(relative.max()) if len(relative) else 0.0,
        "rank_correlation": min(orders) if len(orders) == len(exact) else None,
    }


def _branches_together(audits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The audits of branches in several windows as one: each error is the worst window's."""
    orders = [audit["rank_correlation"] for audit in audits]
    errors = ("largest_error", "median_relative_error", "largest_relative_error")
    return {
        "branches": sum(audit["branches"] for audit in audits),
        **{name: max(audit[name] for audit in audits) for name in errors},
        "rank_correlation": None if None in orders else min(orders),
    }

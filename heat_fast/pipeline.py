"""One context from its trunk to its components: the middle of the way through the house.

trunk -> { gate, curvature, information }

A context is the whole prompt, or one window of it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heat_fast.combine import Components
from heat_fast.config import HeatConfig
from heat_fast.cost import curvature_work
from heat_fast.curvature import Curvature, curvature, product_count, target_group
from heat_fast.decoder import Decoder
from heat_fast.decoder.norm import wide
from heat_fast.faithful import check_faithful, check_hooks
from heat_fast.finding import Finding
from heat_fast.gate import gate
from heat_fast.information import ExactBranches, information
from heat_fast.kernels.dispatch import Record, told
from heat_fast.lowrank import Quality, matrix_bytes
from heat_fast.planner import (
    Budget,
    run_batches,
    runs_alone,
    slices,
    token_budget,
    trim_heap,
)
from heat_fast.progress import Ledger
from heat_fast.screening import Screening, screened_information
from heat_fast.stopping import settled
from heat_fast.trunk import Trunk, run_adjoint, run_trunk
from heat_fast.work import Work


class Pipeline:
    """What the contexts of one attribution share: the decoder, the replacement, the budget.

    `vector` `[d]` stands in for a masked token's embedding. `budget` is None until the first
    trunk has told how large it is; one that a context had to halve is kept for the next.
    `trunk_bytes`: the most that the trunk of a context kept.
    """

    def __init__(
        self, model: Any, decoder: Decoder, config: HeatConfig, vector: Tensor, ledger: Ledger
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.config = config
        self.vector = vector
        self.ledger = ledger
        self.budget: Budget | None = None
        self.trunk_bytes = 0

    def run(
        self, embeddings: Tensor, targets: tuple[int, ...] | None, lead: int, *, sweep: bool
    ) -> Finding:
        """What one context says of its targets, or of its own greedy next token where it has none.

        `embeddings [n, d]`: the context's tokens, and of its response what comes before the last
        target; `lead` of those tokens precede the first target. Without `sweep` it ends with the
        gate.
        """
        decoder, config, ledger = self.decoder, self.config, self.ledger
        first, count = decoder.first_of(config.layers), len(targets or (0,))
        work = Work(decoder, len(embeddings) - lead - count + 1, count, first, lead)
        # The model's own forward, that the trunk is checked against, is as much again.
        with ledger.component("trunk", 2 * work.trunk()) as step:
            trunk = run_trunk(
                decoder,
                embeddings,
                targets or (0,),
                step,
                keep_streams=config.branch_tolerance is not None,
                first=first,
                lead=lead,
            )
            if self.budget is None:
                check_hooks(self.model, trunk)
            check_faithful(self.model, trunk)
            step(work.trunk())
        self.trunk_bytes = max(self.trunk_bytes, trunk.bytes)
        if targets is None:  # the trunk of a single target does not depend on it
            trunk = replace(trunk, targets=(int(trunk.log_probs[0].argmax()),))
        budget = self.budget = self.budget or token_budget(
            trunk.bytes,
            trunk.length,
            work.width,
            embeddings.device,
            config.token_budget,
            decoder.concurrent,
        )
        with ledger.component("gate", sum(work.gate(config.rollout))) as step:
            gates = gate(trunk, config.rollout, step).cpu()
        trim_heap()
        log_probs = trunk.target_log_probs.cpu()
        if not sweep:
            return Finding.of_gate(gates, trunk.targets, log_probs)
        parts, screening = self._information(trunk, gates, budget)
        trim_heap(budget.workers)
        together = budget.workers
        budget.workers = 1 if runs_alone(trunk.length, work.width) else together
        ledger.workers = {"information": together, "curvature": budget.workers}
        parts, stderr, quality = self._curvature(trunk, parts, budget)
        budget.workers = together
        return Finding(parts, stderr, screening, trunk.targets, log_probs, quality)

    def report(self, ran: Record) -> dict[str, Any]:
        """How the contexts were run, as JSON values: time, counts, memory, implementations."""
        ledger, budget, blocks = self.ledger, self.budget, len(self.decoder.blocks)
        assert budget is not None
        components = ("trunk", "gate", "information", "curvature", "total")
        probes = {}
        if ledger.probes:
            taken = {
                "most": max(taken for taken, _ in ledger.probes),
                "settled": all(settled for _, settled in ledger.probes),
            }
            probes = {"probes": taken}
        return {
            "seconds": {name: round(ledger.seconds[name], 6) for name in components},
            "flops": ledger.flops,
            "counts": ledger.counts,
            **probes,
            "layers": {"used": blocks - self.decoder.first_of(self.config.layers), "of": blocks},
            "trunk_bytes": self.trunk_bytes,
            "token_budget": budget.rows,
            "workers": ledger.workers,
            "out_of_memory_retries": budget.halvings,
            "implementation": {"curvature": _SWEEPS[self.config.curvature], **told(ran)},
        }

    def _information(
        self, trunk: Trunk, gates: Tensor, budget: Budget
    ) -> tuple[Components, Screening | None]:
        """The components with gate, I and drop filled in, and what screening left out."""
        config, ledger, work = self.config, self.ledger, trunk.work
        screening = None
        expected = sum(work.branch(start) for start in range(work.tokens))
        expected += work.tokens * work.targets * work.logits
        with ledger.component("information", expected) as step:
            if config.coverage is None and config.branch_tolerance is None:
                tokens = range(trunk.prompt_length)
                exact = ExactBranches(trunk, self.vector)
                kl, drop = information(exact, tokens, budget, ledger, step)
            else:
                kl, drop, screening = screened_information(
                    trunk, self.vector, gates, config, budget, ledger, step
                )
        later = torch.zeros_like(kl)
        sums = None if screening is None else screening.sums
        return Components(gates, later, kl, drop, later, sums), screening

    def _curvature(
        self, trunk: Trunk, parts: Components, budget: Budget
    ) -> tuple[Components, Tensor | None, Quality | None]:
        """The components with S and `|grad g|_1` filled in as well, the standard error of S, and
        the quality of the low-rank approximation where there is one.

        Targets are taken in groups whose adjoints fit into memory together.
        """
        config, ledger, count = self.config, self.ledger, trunk.prompt_length
        hessian = config.curvature == "hessian"
        products = product_count(config, count, trunk.work.width) if hessian else 0
        tall = matrix_bytes(config, count, trunk.work.width, trunk.embeddings.element_size())
        together = target_group(config, trunk.swept_bytes, tall)
        # One long sequence at a time has no other in its batch to share them with.
        if products and (config.estimator == "block" or 2 * trunk.length <= budget.rows):
            trunk = trunk.with_derivatives()
        found: list[Curvature] = []
        norms: list[Tensor] = []
        groups = Budget(min(len(trunk.targets), together))
        sizes = [part.stop - part.start for part in slices(len(trunk.targets), groups.rows)]
        done, counted, rows = 0, ledger.counts["hvp"], budget.rows

        def run(first: int, stop: int) -> tuple[Curvature, Tensor]:
            # A group too large for memory is begun anew, in two: its work comes on top, and the
            # batches that it shrank in vain are as before.
            step.skip(done - step.done)
            ledger.counts["hvp"], budget.rows = counted, rows
            adjoints = [run_adjoint(trunk, target, products, step) for target in range(first, stop)]
            trim_heap()
            gradients = [adjoint.gradient[:count] for adjoint in adjoints]
            wide_rows = [row.to(wide(row.dtype)) for row in gradients]
            sums = torch.stack([row.abs().sum(-1).cpu() for row in wide_rows])
            others = replace(parts.rows(slice(first, stop)), gradient_norm=sums)
            enough = partial(settled, others, config=config)
            return curvature(trunk, adjoints, config, budget, ledger, step, enough), sums

        def keep(first: int, stop: int, result: tuple[Curvature, Tensor]) -> None:
            nonlocal done, counted, rows
            found.append(result[0])
            norms.append(result[1])
            done, counted, rows = step.done, ledger.counts["hvp"], budget.rows

        with ledger.component("curvature", curvature_work(trunk.work, sizes, config)) as step:
            done = step.done  # of the windows before
            run_batches(len(trunk.targets), groups, lambda _: groups.rows, run, keep)
        budget.halvings += groups.halvings
        errors = [part.stderr for part in found if part.stderr is not None]
        values = torch.cat([part.values for part in found])
        parts = replace(parts, curvature=values, gradient_norm=torch.cat(norms))
        stderr = torch.cat(errors) if len(errors) == len(found) else None
        return parts, stderr, Quality.joined([part.quality for part in found])


#: How each curvature is computed.
_SWEEPS = {
    "hessian": "tangent sweeps",
    "gauss_newton": "vector-Jacobian products",
    "grad_squared": "one gradient",
    "none": "none",
}

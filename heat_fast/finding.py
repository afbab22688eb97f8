"""What one context found: its components, how sure they are, and how likely its targets are.

A context is the whole prompt, or one window of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heat_fast.combine import Components
from heat_fast.lowrank import Quality
from heat_fast.screening import Screening


@dataclass(frozen=True)
class Finding:
    """What one context found, or the windows of a prompt together.

    `stderr [n, N]` of the curvature is None where it is not known, `screening` where nothing was
    screened. `log_probs [n]`: log P of the `targets`, nats. `quality`: of the low-rank
    approximation, where there is one; of several windows the worst. `swept`: whether curvature and
    information were measured, and are not just taken to be 0.
    """

    parts: Components
    stderr: Tensor | None
    screening: Screening | None
    targets: tuple[int, ...]
    log_probs: Tensor
    quality: Quality | None = None
    swept: bool = True

    @staticmethod
    def of_gate(gate: Tensor, targets: tuple[int, ...], log_probs: Tensor) -> Finding:
        """What is known of a context that is not swept: its gate `[n, N]`, and nothing else."""
        none = torch.zeros_like(gate)
        parts = Components(gate, none, none, none, none)
        return Finding(parts, none, None, targets, log_probs, swept=False)

    def times(self, share: Tensor) -> Finding:
        """The same with its components, their errors and what was screened multiplied, `[n, 1]`."""

        def of(value: Tensor) -> Tensor:
            return value * share.to(value)

        parts = replace(
            self.parts,
            gate=of(self.parts.gate),
            curvature=of(self.parts.curvature),
            information=of(self.parts.information),
            log_prob_drop=of(self.parts.log_prob_drop),
            gradient_norm=of(self.parts.gradient_norm),
        )
        return replace(
            self,
            parts=parts,
            stderr=None if self.stderr is None else of(self.stderr),
            screening=None if self.screening is None else self.screening.times(share),
        )

    @staticmethod
    def joined(parts: Sequence[Finding]) -> Finding:
        """Those of several groups of targets as one; nothing was screened."""
        if len(parts) == 1:
            return parts[0]

        def together(name: str) -> Tensor:
            return torch.cat([getattr(part.parts, name) for part in parts])

        components = Components(
            gate=together("gate"),
            curvature=together("curvature"),
            information=together("information"),
            log_prob_drop=together("log_prob_drop"),
            gradient_norm=together("gradient_norm"),
        )
        errors = [part.stderr for part in parts if part.stderr is not None]
        return Finding(
            parts=components,
            stderr=torch.cat(errors) if len(errors) == len(parts) else None,
            screening=None,
            targets=tuple(target for part in parts for target in part.targets),
            log_probs=torch.cat([part.log_probs for part in parts]),
            quality=Quality.joined([part.quality for part in parts]),
        )

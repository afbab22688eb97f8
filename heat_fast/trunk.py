"""The trunk: the only place where the unmodified context is run.

It keeps, per block, what gate, information and curvature need of the context (see `BlockState`),
the logits of the target rows alone, and on demand the primal adjoints of one target: the
gradient of `g(X) = log p(target | X)` at every nonlinear step.

Positions `0..M-1` are the `N` prompt tokens and the first `n - 1` of the `n` target tokens; target
`t` is predicted at position `N - 1 + t`. The last block and the head see these rows only. Where a
part of a longer response is the target, its `lead` earlier tokens stand between the prompt and the
targets, as context that is not scored; target `t` is then predicted at `N + lead - 1 + t`.

Gate and curvature may be restricted to the last blocks, from block `first` on: the adjoint then
ends at the residual stream that enters it, which takes the place of X.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from heat_fast.decoder import Decoder, Rows
from heat_fast.decoder.block import BlockAdjoint, BlockState
from heat_fast.decoder.head import HeadAdjoint
from heat_fast.decoder.norm import wide
from heat_fast.errors import NumericalError
from heat_fast.forward import picked
from heat_fast.progress import Step
from heat_fast.work import Work


@dataclass(frozen=True)
class Trunk:
    """The unmodified context, run once.

    `embeddings [M, d]`: X; `states`: one per block; `last [n, d]`: the residual stream leaving the
    last block at the target rows; `log_probs [n, V]` (nats, at least float32) and `normaliser [n]`,
    the log-sum-exp of the logits. `first`: the first block that gate and curvature go through;
    `source [M, d]`: what is differentiated, X, or the residual stream entering that block. `lead`:
    response tokens before the targets.
    """

    decoder: Decoder
    embeddings: Tensor
    states: tuple[BlockState, ...]
    last: Tensor
    log_probs: Tensor
    normaliser: Tensor
    targets: tuple[int, ...]
    first: int
    source: Tensor
    lead: int = 0

    @property
    def layers(self) -> range:
        """The blocks that gate and curvature go through."""
        return range(self.first, len(self.decoder.blocks))

    @property
    def length(self) -> int:
        """Number of positions that were run, `M = N + lead + n - 1`."""
        return self.embeddings.shape[0]

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens, `N`."""
        return self.first_row + 1 - self.lead

    @property
    def first_row(self) -> int:
        """The position that predicts the first target."""
        return self.length - len(self.targets)

    @property
    def bytes(self) -> int:
        """What the kept values occupy."""
        return sum(state.bytes for state in self.states)

    @property
    def swept_bytes(self) -> int:
        """What those of the blocks occupy that gate and curvature go through."""
        return sum(state.bytes for state in self.states[self.first :])

    @cached_property
    def work(self) -> Work:
        """FLOPs of the pieces of this attribution."""
        return Work(self.decoder, self.prompt_length, len(self.targets), self.first, self.lead)

    def with_derivatives(self) -> Trunk:
        """The trunk with the activations' derivatives kept, for many probes to share."""
        states = list(self.states)
        for layer in self.layers:
            states[layer] = self.decoder.blocks[layer].with_derivatives(states[layer])
        return replace(self, states=tuple(states))

    def rows(self, layer: int, start: int) -> Rows:
        """The rows that a sweep from position `start` touches in a block, for all targets."""
        return _rows(self.decoder, layer, start, self.first_row, self.length)

    def target_rows(self, layer: int, start: int, target: int) -> Rows:
        """The same for one target: positions up to its own, in the last block its row alone."""
        row = self.first_row + target
        return _rows(self.decoder, layer, start, row, row + 1)

    @property
    def target_log_probs(self) -> Tensor:
        """`g` of each target, `[n]`, nats."""
        return picked(self.log_probs, self.targets)


def _rows(decoder: Decoder, layer: int, start: int, first_row: int, stop: int) -> Rows:
    """The rows from `start` to `stop` in a block; in the last one those from `first_row` on."""
    last = layer == len(decoder.blocks) - 1
    return Rows(start, first_row if last else start, stop)


@dataclass(frozen=True)
class TargetAdjoint:
    """The primal adjoint of one target: `gradient [p + 1, d]` of g, the head's and the blocks'.

    The gradient is with respect to the trunk's `source`, the blocks are those from `first` on.

    The gradient is in at least float32; the head and the blocks hold adjoints of `head.scale * g`.
    """

    target: int
    gradient: Tensor
    head: HeadAdjoint
    blocks: tuple[BlockAdjoint, ...]


def run_trunk(
    decoder: Decoder,
    embeddings: Tensor,
    targets: tuple[int, ...],
    step: Step | None = None,
    *,
    keep_streams: bool = False,
    first: int = 0,
    lead: int = 0,
) -> Trunk:
    """Run the context `embeddings [M, d]` once and keep what the components need.

    `keep_streams` keeps the residual stream as well, `2 M d` numbers for every block. Gate and
    curvature go through the blocks from `first` on. The last `lead` tokens before the targets are
    of the response.
    Raises `NumericalError` naming the block where a non-finite value first appears.
    """
    length = len(embeddings)
    work = Work(decoder, length - lead - len(targets) + 1, len(targets), lead=lead)
    source = embeddings
    x = decoder.enter(embeddings[None], 0)
    require_finite(x, "the input embeddings")
    states = []
    for layer, block in enumerate(decoder.blocks):
        if layer == first > 0:
            source = x[0]
        rows = _rows(decoder, layer, 0, length - len(targets), length)
        x, state = block.forward(x, rows, keep_streams=keep_streams)
        require_finite(x, f"block {layer} of the unmodified context")
        states.append(state)
        if step is not None:
            step(work.block(layer))
    logits = decoder.head.logits(x[0])
    require_finite(logits, "the logits of the unmodified context")
    if step is not None:
        step(len(targets) * work.logits)
    normaliser = torch.logsumexp(logits, dim=-1)
    log_probs = torch.log_softmax(logits, dim=-1)
    return Trunk(
        decoder,
        embeddings,
        tuple(states),
        x[0],
        log_probs,
        normaliser,
        targets,
        first,
        source,
        lead,
    )


def run_adjoint(trunk: Trunk, target: int, probes: int, step: Step) -> TargetAdjoint:
    """The gradient of one target's log-probability, with all that `probes` sweeps need of it."""
    row = trunk.last[target : target + 1]
    x_bar, head = trunk.decoder.head.gradient(row, trunk.targets[target], probes)
    step(trunk.work.head_gradient(probes))
    gradient, blocks = _pull(trunk, target, x_bar, step)
    return TargetAdjoint(target, gradient.to(wide(gradient.dtype)) / head.scale, head, blocks)


def pull_logits(trunk: Trunk, target: int, logits_bar: Tensor, step: Step) -> Tensor:
    """Vector-Jacobian product of a target row's logits `[1, V]` with the source, `[p + 1, d]`.

    Scaled to about 1 on the way through the blocks, as the adjoint of g is.
    """
    scale = logits_bar.abs().amax().clamp_min(torch.finfo(logits_bar.dtype).tiny)
    x_bar = trunk.decoder.head.adjoint(trunk.last[target : target + 1], logits_bar / scale)
    step(trunk.work.head_gradient(0))
    pulled = _pull(trunk, target, x_bar, step)[0]
    return pulled.to(wide(pulled.dtype)) * scale.to(pulled.device)


def _pull(
    trunk: Trunk, target: int, x_bar: Tensor, step: Step
) -> tuple[Tensor, tuple[BlockAdjoint, ...]]:
    """From the adjoint of a target's last residual row down to the source."""
    adjoints = []
    layers = reversed(trunk.layers)
    for layer, work in zip(layers, trunk.work.adjoint(target), strict=True):
        rows = trunk.target_rows(layer, 0, target)
        x_bar, adjoint = trunk.decoder.blocks[layer].adjoint(trunk.states[layer], x_bar, rows)
        require_finite(x_bar, f"the gradient at block {layer}")
        adjoints.append(adjoint)
        step(work)
    if trunk.first == 0:
        x_bar = trunk.decoder.scale(x_bar)
    return x_bar, tuple(reversed(adjoints))


def require_finite(values: Tensor, where: str) -> None:
    """Raise `NumericalError` naming `where` if any value is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(
            f"non-finite values in {where} ({values.dtype}): expected finite numbers. "
            + (
                "The model overflows there; load it in bfloat16 or float32."
                if values.dtype == torch.float16
                else "Its weights or activations are broken there; check the checkpoint."
            )
        )

"""The curvature of the target's log-probability along each token (paper Eq. 3).

`H` is the Hessian of `g(X) = log p(target | X)`, `H_ii` its `d x d` block of token i, `r` a vector
of Rademacher signs.

`block` (the definition)    S_i = mean_k | H_ii r_k |_1                  N * probes products
`coded`                     the same quantity from `codes * probes`      products, whatever N is
`row`                       S_i = mean_k | (H r_k)_i |_1                 probes products
`low_rank`                  `block` of a rank-k approximation of H       see `heat_fast.lowrank`

Operators: `hessian`; `gauss_newton`, `H = -J' (diag p - p p') J` by sampled vector-Jacobian
products; `grad_squared`, `S_i = |grad_i g|_2^2`; `none`.

With `layers` set, X is the residual stream that enters the last blocks, in place of the embeddings.

Every estimator yields one norm per token and probe; S is their mean, its standard error their
deviation over `sqrt(probes)`. With `probes="auto"` probes are added until the ranking is settled.

Signs come from a counter (seed, sample, token, dimension): batches and devices do not change them.
Products run in the model's dtype (`heat_fast.products`); norms are summed in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from heat_fast.config import HeatConfig
from heat_fast.decoder.norm import wide
from heat_fast.kernels.rademacher import (
    coded_moments,
    coded_sums,
    counter_words,
    rademacher,
    row_norms,
)
from heat_fast.lowrank import LowRank, Quality, products_each
from heat_fast.planner import Budget, run_batches, targets_at_once
from heat_fast.products import Products
from heat_fast.progress import Ledger, Meter, Step
from heat_fast.trunk import TargetAdjoint, Trunk, pull_logits

# Streams of the counter-based generator beside the probes' own.
_CODE_STREAM = 0x636F6465
_SKETCH_STREAM = 0x736B6574

# probes="auto" starts with so many and doubles them up to `probes_max`.
FIRST_PROBES = 8
# codes="auto" measures the noise with so many, and never takes fewer.
FIRST_CODES = 8
# Beyond this share of the energy the noise has swallowed the signal and its level says little.
_WORST_SHARE = 0.98
# The most that codes="auto" takes: the power of two that this share asks for.
MOST_CODES = 256

#: Whether per-probe norms `[T, N, m]` settle the ranking; asked between rounds of probes.
Settled = Callable[[Tensor], bool]


@dataclass(frozen=True)
class Curvature:
    """S and its standard error, `[T, N]`; the error is None where it cannot be known.

    `samples [T, N, m]` are the norms per probe (m = 0 for the operators that take none); `quality`
    is that of a low-rank approximation, per target.
    """

    values: Tensor
    stderr: Tensor | None
    samples: Tensor
    quality: Quality | None = None

    @staticmethod
    def of(samples: Tensor, quality: Quality | None = None) -> Curvature:
        """Mean and standard error over probes.

        The error is not known of one probe alone, and of a low-rank approximation: its probes share
        one sketch, whose own randomness they do not show.
        """
        probes = samples.shape[-1]
        known = probes > 1 and quality is None
        stderr = samples.std(-1) / math.sqrt(probes) if known else None
        return Curvature(samples.mean(-1), stderr, samples, quality)

    @staticmethod
    def exact(values: Tensor) -> Curvature:
        """A value without sampling error."""
        return Curvature(values, torch.zeros_like(values), values.new_zeros(*values.shape, 0))


def product_count(config: HeatConfig, tokens: int, width: int) -> int:
    """Most Hessian-vector (or vector-Jacobian) products per target, with embeddings of `width`."""
    if config.curvature in ("none", "grad_squared"):
        return 0
    probes = config.probes_max if config.probes == "auto" else config.probes
    if config.curvature == "gauss_newton" or config.estimator == "row":
        return probes
    if config.estimator == "coded":
        codes = MOST_CODES if config.codes == "auto" else config.codes
        return probes * min(codes, code_length(tokens))
    if config.estimator == "low_rank":
        blocks = tokens if config.rank_scope == "token" else 1
        return blocks * products_each(config, tokens, width)
    return probes * tokens


def target_group(config: HeatConfig, swept_bytes: int, tall_bytes: int) -> int:
    """How many targets are taken together: those that share tangent sweeps, else one at a time.

    `swept_bytes`: of the trunk, as large as an adjoint; `tall_bytes`: of a matrix of a low-rank
    approximation, of which a target has its products, a basis of them and the factors.
    """
    if config.curvature != "hessian":
        return 1
    return targets_at_once(swept_bytes + 3 * tall_bytes * (config.estimator == "low_rank"))


def curvature(
    trunk: Trunk,
    adjoints: Sequence[TargetAdjoint],
    config: HeatConfig,
    budget: Budget,
    ledger: Ledger,
    step: Meter,
    settled: Settled,
) -> Curvature:
    """S `[len(adjoints), N]` of some targets, in at least float32.

    One tangent sweep serves all the targets given; each target then takes its own sweep down.
    """
    if config.curvature == "none":
        zeros = torch.zeros(len(adjoints), trunk.prompt_length)
        return Curvature.exact(zeros.to(wide(trunk.embeddings.dtype)))
    if config.curvature == "grad_squared":
        rows = [adjoint.gradient[: trunk.prompt_length] for adjoint in adjoints]
        squares = [row.to(wide(row.dtype)).square().sum(-1).cpu() for row in rows]
        return Curvature.exact(torch.stack(squares))
    if config.curvature == "gauss_newton":
        values = _gauss_newton(trunk, adjoints, config, step)
        # The probes share one sketch of J, whose error their spread does not show.
        return Curvature(values, None, values.new_zeros(*values.shape, 0))
    expected = product_count(config, trunk.prompt_length, trunk.embeddings.shape[-1])
    products = Products(trunk, adjoints, config.seed, budget, ledger, step, expected)
    estimator: _Estimator
    if config.estimator == "coded":
        estimator = _Coded(products, config)
    elif config.estimator == "row":
        estimator = _Row(products)
    elif config.estimator == "low_rank":
        estimator = LowRank(products, config)
    else:
        estimator = _Block(products)
    quality = estimator.quality if isinstance(estimator, LowRank) else None
    if config.probes != "auto":
        estimator.add(0, config.probes)
        return Curvature.of(estimator.samples(), quality)
    done, more, enough = 0, min(FIRST_PROBES, config.probes_max), False
    while more and not enough:
        estimator.add(done, done + more)
        done += more
        enough = settled(estimator.samples())
        more = min(done, config.probes_max - done)
    ledger.probes.append((done, enough))
    step.skip((config.probes_max - done) * estimator.work())
    return Curvature.of(estimator.samples(), quality)


class _Estimator(Protocol):
    """One norm per target, token and probe, from any number of rounds of probes."""

    def add(self, first: int, stop: int) -> None:
        """Take probes `first..stop-1`."""

    def samples(self) -> Tensor:
        """Norms `[T, N, m]` of the probes taken so far."""
        ...

    def work(self) -> int:
        """FLOPs of one more probe."""
        ...


class _Block:
    """`| H_ii r |_1`: one product per token and probe, run from the probed token on."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self.rounds: list[Tensor] = []
        self.each = [products.work(token) for token in range(products.tokens)]

    def add(self, first: int, stop: int) -> None:
        """Take probes `first..stop-1`."""
        products, probes = self.products, stop - first
        norms = torch.zeros(len(products.adjoints), products.tokens * probes, dtype=products.dtype)

        def directions(tokens: Tensor, numbers: Tensor, start: int) -> Tensor:
            return products.token_probes(first + numbers, tokens, start)

        def keep(low: int, high: int, found: Tensor) -> None:
            norms[:, low:high] = found

        products.blocks(probes, directions, lambda rows: row_norms(rows).cpu(), keep)
        self.rounds.append(norms.view(-1, products.tokens, probes))

    def work(self) -> int:
        """FLOPs of one more probe."""
        return sum(self.each)

    def samples(self) -> Tensor:
        """Norms `[T, N, m]`."""
        return torch.cat(self.rounds, dim=-1)


class _Row:
    """`| (H r)_i |_1` of dense probes over the whole context: one product per probe."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self.rounds: list[Tensor] = []

    def add(self, first: int, stop: int) -> None:
        """Take probes `first..stop-1`."""
        products = self.products
        norms = torch.zeros(
            len(products.adjoints), products.tokens, stop - first, dtype=products.dtype
        )

        def run(low: int, high: int) -> list[Tensor]:
            samples = torch.arange(first + low, first + high)
            found = products(products.probes(samples, products.length), 0)
            return [row_norms(rows[:, : products.tokens]).t().cpu() for rows in found]

        def keep(low: int, high: int, found: list[Tensor]) -> None:
            for index, rows in enumerate(found):
                norms[index, :, low:high] = rows
            products.done(high - low, (high - low) * self.work())

        def size(item: int) -> int:
            return products.budget.batch(products.length, stop - first - item)

        run_batches(stop - first, products.budget, size, run, keep)
        self.rounds.append(norms)

    def work(self) -> int:
        """FLOPs of one more probe."""
        return self.products.work(0)

    def samples(self) -> Tensor:
        """Norms `[T, N, m]`."""
        return torch.cat(self.rounds, dim=-1)


def code_length(tokens: int) -> int:
    """Order of the Hadamard matrix whose columns tell `tokens` tokens apart: a power of two."""
    return 1 << max(0, tokens - 1).bit_length()


class _Coded:
    """Block norms from dense products whose cross terms are averaged away by sign codes.

    For one probe r and code vectors `s_k`, k = 1..K, over tokens,

        z_k = s_k o (H (s_k o r)),   (z_k)_i = H_ii r_i + sum_{j != i} s_ki s_kj H_ij r_j

    so the mean over k, `z-`, estimates `H_ii r_i`. The codes are K rows, drawn without replacement,
    of the Hadamard matrix of order `N' >= N`: distinct columns cancel exactly over all N' rows, so
    by finite-population sampling `z-` has entrywise variance

        v = (1 - K/N') / K * var_k(z_k)

    which is 0 at K = N', where the estimate is `block` itself. What noise remains inflates the l1
    norm, by `1 / sqrt(1 - q_i)` with `q_i = sum v / sum z-^2` (over the block and all probes) if
    signal and noise entries are of one shape. Measured, the inflation is nearly the same for all
    tokens, while `q_i` itself is so noisy with few codes that using it (or the entrywise
    `z-^2 - v`) costs more rank order than it mends. Hence one factor for a target, from the median
    over tokens:

        S_i = sqrt(1 - median_j q_j) * mean_r | z- |_1

    It leaves the ranking to the plain norms and is consistent, for q falls as 1/K and vanishes at
    K = N'. With 8 codes the level was 0.91 to 0.98 of the converged value on a 3M-parameter model.

    `codes="auto"`: the first probe measures the noise of 8 codes, `var_mean = R / 8` times the
    signal, where R is the ratio of off-diagonal to diagonal energy times `1 - 8 / N'`; K is then
    the power of two from 8 on with `R / K <= 2`, at most 256.
    """

    def __init__(self, products: Products, config: HeatConfig) -> None:
        self.products = products
        self.order = code_length(products.tokens)
        self.probes = config.probes_max if config.probes == "auto" else config.probes
        self.automatic = config.codes == "auto"
        codes = FIRST_CODES if config.codes == "auto" else config.codes
        self.codes = min(codes, self.order)
        self.norms: list[Tensor] = []
        shape = (len(products.adjoints), products.tokens)
        self.noise = torch.zeros(shape, dtype=products.dtype)
        self.energy = torch.zeros(shape, dtype=products.dtype)

    def add(self, first: int, stop: int) -> None:
        """Take probes `first..stop-1`, each with `codes` products."""
        for probe in range(first, stop):
            total, squares = self._decode(probe, 0, self.codes)
            if self.automatic and probe == 0:
                before, self.codes = self.codes, self._choose(total, squares)
                spared = min(MOST_CODES, self.order) - self.codes
                self.products.skip(self.probes * spared * self.products.work(0))
                if self.codes > before:
                    more = self._decode(probe, before, self.codes)
                    total, squares = total + more[0], squares + more[1]
            norm, noise, energy = coded_moments(total, squares, self.codes, self.order)
            self.norms.append(norm.cpu())
            self.noise += noise.cpu()
            self.energy += energy.cpu()

    def _decode(self, probe: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Sums of `z_k` and of its squares over codes `low..high-1`, `[T, N, d]`."""
        products = self.products
        lottery = counter_words(
            products.seed ^ _CODE_STREAM, torch.tensor(probe), torch.arange(self.order)
        )
        chosen = torch.argsort(lottery, stable=True)[low:high].to(products.device)
        shape = (len(products.adjoints), products.tokens, products.width)
        total = torch.zeros(shape, dtype=products.dtype, device=products.device)
        squares = torch.zeros_like(total)

        def run(first: int, stop: int) -> tuple[Tensor, Tensor]:
            codes = chosen[first:stop]
            directions = products.probes(torch.tensor([probe]), products.tokens, codes)
            found = [coded_sums(rows, codes, products.tokens) for rows in products(directions, 0)]
            sums, of_squares = zip(*found, strict=True)
            return torch.stack(sums), torch.stack(of_squares)

        def keep(first: int, stop: int, found: tuple[Tensor, Tensor]) -> None:
            sums, of_squares = found
            total.add_(sums.to(total.device))
            squares.add_(of_squares.to(squares.device))
            products.done(stop - first, (stop - first) * products.work(0))

        def size(item: int) -> int:
            return products.budget.batch(products.length, high - low - item)

        run_batches(high - low, products.budget, size, run, keep)
        return total, squares

    def work(self) -> int:
        """FLOPs of one more probe."""
        return self.codes * self.products.work(0)

    def _choose(self, total: Tensor, squares: Tensor) -> int:
        """The number of codes that keeps the noise at most twice the signal's energy."""
        _, noise, energy = coded_moments(total, squares, self.codes, self.order)
        share = float((noise / energy.clamp_min(1e-30)).median())
        share = min(share, _WORST_SHARE)
        ratio = self.codes * share / (1 - share)
        codes = FIRST_CODES
        while codes < self.order and ratio / codes > 2:
            codes *= 2
        return min(codes, self.order)

    def samples(self) -> Tensor:
        """Norms `[T, N, m]`, with the noise's inflation taken out."""
        share = torch.where(self.energy > 0, self.noise / self.energy, 0.0)
        level = share.median(dim=-1, keepdim=True).values.clamp(0, _WORST_SHARE)
        return torch.stack(self.norms, dim=-1) * (1 - level).sqrt()[..., None]


def _gauss_newton(
    trunk: Trunk, adjoints: Sequence[TargetAdjoint], config: HeatConfig, step: Step
) -> Tensor:
    """Block norms of `-J' (diag p - p p') J` from `probes` vector-Jacobian products per target.

    With Rademacher `e` over the vocabulary, `u = sqrt(p) o e - p (sqrt(p) . e)` has covariance
    `diag p - p p'`; rows `G_j = (J' u_j)` then give `H_ii r = -mean_j G_ji (G_ji . r)`, averaged
    over the same number of probes r, which cost nothing more. The l1 norm of a noisy mean is too
    large: with 10 probes, on average over seeds, by 14 to 26 % in three tiny models (a test prints
    it). It is left in: the noise is one sample for all tokens, and more probes take it down.
    """
    tokens = trunk.prompt_length
    probes = config.probes_max if config.probes == "auto" else config.probes
    device = trunk.embeddings.device
    dtype = wide(trunk.embeddings.dtype)
    samples = torch.arange(probes, device=device)
    result = torch.zeros(len(adjoints), tokens, dtype=dtype)
    for index, adjoint in enumerate(adjoints):
        p = trunk.log_probs[adjoint.target].to(device).exp()
        root, top = p.sqrt(), int(p.argmax())
        rest = p[:top].sum() + p[top + 1 :].sum()
        factors = torch.empty(probes, tokens, trunk.embeddings.shape[-1], dtype=dtype)
        for sample in range(probes):
            sign = rademacher(
                config.seed ^ _SKETCH_STREAM,
                samples[sample],
                torch.tensor(trunk.lead + adjoint.target, device=device),
                p.shape[0],
                p.dtype,
            )
            # The likeliest token's entry by the probability of all others, or it would cancel.
            others = root[:top] @ sign[:top] + root[top + 1 :] @ sign[top + 1 :]
            u = root * sign - p * (others + root[top] * sign[top])
            u[top] = sign[top] * root[top] * rest - p[top] * others
            pulled = pull_logits(trunk, adjoint.target, u[None], step)
            factors[sample] = pulled[:tokens].to(dtype).cpu()
        for token in range(tokens):
            signs = rademacher(
                config.seed,
                samples.cpu(),
                torch.tensor(token),
                factors.shape[-1],
                dtype,
            )
            rows = factors[:, token]
            result[index, token] = (signs @ rows.t() @ rows / probes).abs().sum(-1).mean()
        step(trunk.work.block_norms(probes))
    return result

"""The curvature of the target's log-probability along each token (paper Eq. 3).

`H` is the Hessian of `g(X) = log p(target | X)`, `H_ii` its `d x d` block of token i, `r` a vector
of Rademacher signs.

`block` (the definition)    S_i = mean_k | H_ii r_k |_1                  N * probes products
`coded`                     the same quantity from `codes * probes`      products, whatever N is
`row`                       S_i = mean_k | (H r_k)_i |_1                 probes products

Operators: `hessian`; `gauss_newton`, `H = -J' (diag p - p p') J` by sampled vector-Jacobian
products; `grad_squared`, `S_i = |grad_i g|_2^2`; `none`.

Signs come from a counter (seed, sample, token, dimension): batches and devices do not change them.
Products run in the model's dtype on directions scaled by a power of two to the size of the
embeddings, so that half precision neither overflows nor rounds the scale; norms are summed in at
least float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from heat_fast.config import HeatConfig
from heat_fast.decoder.norm import wide
from heat_fast.kernels.rademacher import counter_words, rademacher, walsh
from heat_fast.planner import Budget, run_batches
from heat_fast.progress import Ledger, Step
from heat_fast.sweeps import hessian_rows, tangent_sweep
from heat_fast.trunk import TargetAdjoint, Trunk, pull_logits, require_finite

# Streams of the counter-based generator beside the probes' own.
_CODE_STREAM = 0x636F6465
_SKETCH_STREAM = 0x736B6574


def product_count(config: HeatConfig, tokens: int) -> int:
    """Hessian-vector (or vector-Jacobian) products per target, the unit of progress."""
    if config.curvature in ("none", "grad_squared"):
        return 0
    if config.curvature == "gauss_newton" or config.estimator == "row":
        return config.probes
    if config.estimator == "coded":
        return config.probes * min(config.codes, code_length(tokens))
    return config.probes * tokens


def curvature(
    trunk: Trunk,
    adjoints: Sequence[TargetAdjoint],
    config: HeatConfig,
    budget: Budget,
    ledger: Ledger,
    step: Step,
) -> Tensor:
    """S `[len(adjoints), N]` of some targets, in at least float32.

    One tangent sweep serves all the targets given; each target then takes its own sweep down.
    """
    if config.curvature == "none":
        return torch.zeros(len(adjoints), trunk.prompt_length, dtype=wide(trunk.embeddings.dtype))
    if config.curvature == "grad_squared":
        rows = [adjoint.gradient[: trunk.prompt_length] for adjoint in adjoints]
        return torch.stack([row.to(wide(row.dtype)).square().sum(-1).cpu() for row in rows])
    if config.curvature == "gauss_newton":
        return _gauss_newton(trunk, adjoints, config, step)
    products = _Products(trunk, adjoints, ledger, step)
    estimate = {"block": _block, "coded": _coded, "row": _row}[config.estimator]
    return estimate(products, config, budget)


class _Products:
    """Hessian-vector products of several targets against one trunk."""

    def __init__(
        self, trunk: Trunk, adjoints: Sequence[TargetAdjoint], ledger: Ledger, step: Step
    ) -> None:
        self.trunk = trunk
        self.adjoints = adjoints
        self.ledger = ledger
        self.step = step
        self.tokens = trunk.prompt_length
        self.width = trunk.embeddings.shape[-1]
        self.dtype = wide(trunk.embeddings.dtype)
        size = float(trunk.embeddings.to(self.dtype).square().mean().sqrt())
        self.scale = 2.0 ** round(math.log2(size)) if size > 0 else 1.0

    def signs(self, seed: int, samples: Tensor, tokens: Tensor) -> Tensor:
        device, dtype = self.trunk.embeddings.device, self.trunk.embeddings.dtype
        return rademacher(seed, samples.to(device), tokens.to(device), self.width, dtype)

    def __call__(self, directions: Tensor, start: int) -> list[Tensor]:
        """`H r` at positions `start..p` of each target, `[B, p + 1 - start, d]`, unscaled dtype.

        The directions are taken times `scale`; whoever reduces the result divides by it.
        """
        directions = directions * self.scale
        sweep = tangent_sweep(self.trunk, directions, start)
        results = [hessian_rows(self.trunk, sweep, adjoint) for adjoint in self.adjoints]
        for result in results:
            if not bool(torch.isfinite(result).all()):
                self._locate(directions, start)
                require_finite(result, "a Hessian-vector product")
        return results

    def _locate(self, directions: Tensor, start: int) -> None:
        """Repeat a product that went wrong, checking block by block."""

        def inspect(where: str, values: Tensor) -> None:
            require_finite(values, where)

        sweep = tangent_sweep(self.trunk, directions, start, inspect)
        for adjoint in self.adjoints:
            hessian_rows(self.trunk, sweep, adjoint, inspect)

    def done(self, products: int) -> None:
        """Count products that are finished, for every target."""
        self.ledger.counts["hvp"] += products * len(self.adjoints)
        self.step(products * len(self.adjoints))


def _block(products: _Products, config: HeatConfig, budget: Budget) -> Tensor:
    """One product per token and probe, run from the probed token on."""
    tokens, probes = products.tokens, config.probes
    norms = torch.zeros(len(products.adjoints), tokens * probes, dtype=products.dtype)
    length = products.trunk.length

    def size(first: int) -> int:
        return budget.batch(length - first // probes, tokens * probes - first)

    def run(first: int, stop: int) -> None:
        items = torch.arange(first, stop)
        token, sample = items // probes, items % probes
        start = first // probes
        signs = products.signs(config.seed, sample, token)
        batch = torch.arange(stop - first, device=signs.device)
        own = (token - start).to(signs.device)
        directions = signs.new_zeros(stop - first, length - start, products.width)
        directions[batch, own] = signs
        found = [
            rows[batch, own].to(products.dtype).abs().sum(-1)
            for rows in products(directions, start)
        ]
        norms[:, first:stop] = torch.stack(found).cpu() / products.scale
        products.done(stop - first)

    run_batches(tokens * probes, budget, size, run)
    return norms.view(-1, tokens, probes).mean(-1)


def _row(products: _Products, config: HeatConfig, budget: Budget) -> Tensor:
    """Dense probes over the whole context; the norm of each token's rows."""
    tokens, length = products.tokens, products.trunk.length
    norms = torch.zeros(len(products.adjoints), config.probes, tokens, dtype=products.dtype)

    def run(first: int, stop: int) -> None:
        samples = torch.arange(first, stop)[:, None]
        directions = products.signs(config.seed, samples, torch.arange(length))
        found = [
            rows[:, :tokens].to(products.dtype).abs().sum(-1) for rows in products(directions, 0)
        ]
        norms[:, first:stop] = torch.stack(found).cpu() / products.scale
        products.done(stop - first)

    run_batches(config.probes, budget, lambda first: budget.batch(length, config.probes), run)
    return norms.mean(1)


def code_length(tokens: int) -> int:
    """Order of the Hadamard matrix whose columns tell `tokens` tokens apart: a power of two."""
    return 1 << max(0, tokens - 1).bit_length()


def _coded(products: _Products, config: HeatConfig, budget: Budget) -> Tensor:
    """Block norms from dense products whose cross terms are averaged away by sign codes.

    For one probe r and code vectors `s_k`, k = 1..K, over tokens,

        z_k = s_k o (H (s_k o r)),   (z_k)_i = H_ii r_i + sum_{j != i} s_ki s_kj H_ij r_j

    so the mean over k estimates `H_ii r_i`. The codes are K rows, drawn without replacement, of the
    Hadamard matrix of order `N' >= N`: distinct columns cancel exactly over all N' rows, and by
    finite-population sampling the mean of K of them has entrywise variance

        v = (1 - K/N') / K * var_k(z_k),

    which is 0 at K = N', where the estimate is `block` itself. What noise remains inflates the
    l1 norm. It does so by nearly the same factor for every entry of a block, since signal and noise
    are both sums of many terms of like size; the norm is therefore shrunk by the ratio of
    root-mean-squares, pooled over dimensions and probes:

        S_i = mean_r | z- |_1 * sqrt( max(0, 1 - sum v / sum z-^2) ),   z- = mean_k z_k
    """
    tokens, length = products.tokens, products.trunk.length
    order = code_length(tokens)
    codes = min(config.codes, order)
    targets = len(products.adjoints)
    norm = torch.zeros(targets, tokens, dtype=products.dtype)
    noise, energy = torch.zeros_like(norm), torch.zeros_like(norm)
    unbias = (1 - codes / order) / codes / max(1, codes - 1)
    device = products.trunk.embeddings.device
    positions = torch.arange(tokens, device=device)

    for probe in range(config.probes):
        lottery = counter_words(
            config.seed ^ _CODE_STREAM, torch.tensor(probe), torch.arange(order)
        )
        chosen = torch.argsort(lottery, stable=True)[:codes].to(device)
        total = [torch.zeros(tokens, products.width, dtype=products.dtype, device=device)] * targets
        squares = list(total)
        signs = products.signs(config.seed, torch.tensor(probe), positions)

        def run(first: int, stop: int) -> None:
            code = walsh(chosen[first:stop, None], positions)[..., None].to(signs.dtype)  # noqa: B023
            directions = signs.new_zeros(stop - first, length, products.width)  # noqa: B023
            directions[:, :tokens] = code * signs  # noqa: B023
            found = products(directions, 0)
            for index, rows in enumerate(found):
                decoded = (rows[:, :tokens] * code).to(products.dtype)
                total[index] = total[index] + decoded.sum(0)  # noqa: B023
                squares[index] = squares[index] + decoded.square().sum(0)  # noqa: B023
            products.done(stop - first)

        run_batches(codes, budget, lambda first: budget.batch(length, codes - first), run)
        for index in range(targets):
            mean = total[index] / codes
            spread = (squares[index] - codes * mean.square()).clamp_min(0) * unbias
            norm[index] += mean.abs().sum(-1).cpu()
            noise[index] += spread.sum(-1).cpu()
            energy[index] += mean.square().sum(-1).cpu()
    share = torch.where(energy > 0, noise / energy, torch.zeros_like(noise))
    return norm / config.probes / products.scale * (1 - share).clamp_min(0).sqrt()


def _gauss_newton(
    trunk: Trunk, adjoints: Sequence[TargetAdjoint], config: HeatConfig, step: Step
) -> Tensor:
    """Block norms of `-J' (diag p - p p') J` from `probes` vector-Jacobian products per target.

    With Rademacher `e` over the vocabulary, `u = sqrt(p) o e - p (sqrt(p) . e)` has covariance
    `diag p - p p'`; rows `G_j = (J' u_j)` then give `H_ii r = -mean_j G_ji (G_ji . r)`, averaged
    over the same number of probes r, which cost nothing more.
    """
    tokens, probes = trunk.prompt_length, config.probes
    device = trunk.embeddings.device
    dtype = wide(trunk.embeddings.dtype)
    samples = torch.arange(probes, device=device)
    result = torch.zeros(len(adjoints), tokens, dtype=dtype)
    for index, adjoint in enumerate(adjoints):
        p = trunk.log_probs[adjoint.target].to(device).exp()
        root = p.sqrt()
        factors = torch.empty(probes, tokens, trunk.embeddings.shape[-1], dtype=dtype)
        for sample in range(probes):
            sign = rademacher(
                config.seed ^ _SKETCH_STREAM,
                samples[sample],
                torch.tensor(adjoint.target, device=device),
                p.shape[0],
                p.dtype,
            )
            u = root * sign - p * (root @ sign)
            pulled = pull_logits(trunk, adjoint.target, u[None])
            factors[sample] = pulled[:tokens].to(dtype).cpu()
            step(1)
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
    return result

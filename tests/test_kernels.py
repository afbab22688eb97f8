"""The operations in `kernels/`, each against its formula written plainly.

float64 cases differ from the plain formula in the order of operations alone (1e-12). float32 cases
are held to 1e-5: unit roundoff 6e-8 times the length of the inner sums (at most 40 terms) and the
condition of the exponential (scores of a few units).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import assert_close
from heat_fast.kernels.branch_attention import Masking, branch_attention
from heat_fast.kernels.masked_kl import masked_kl, masked_kl_streamed
from heat_fast.kernels.rademacher import rademacher, walsh
from heat_fast.kernels.value_norm_rollout import attention_flow, value_output_norms
from oracles import softmax_attention, softmax_weights

# Both implementations of everything that has two.
pytestmark = pytest.mark.usefixtures("kernels")

EXACT = 1e-12
SINGLE = 1e-5

MASKINGS = {
    "full": Masking(0.6),
    "window": Masking(0.6, window=5),
    "window_of_one": Masking(0.6, window=1),
    "softcap": Masking(0.6, softcap=1.2),
    "window_softcap": Masking(0.6, window=3, softcap=1.2),
}
each_masking = pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
each_tile = pytest.mark.parametrize("tile", [1, 97, 1 << 20])


def settings(masking: Masking) -> tuple[float, int | None, float | None]:
    return masking.scale, masking.window, masking.softcap


def use_tile(monkeypatch: pytest.MonkeyPatch, module: str, tile: int) -> None:
    monkeypatch.setattr(f"heat_fast.kernels.{module}.reference.TILE_ELEMENTS", tile)


def log_sum_exp(query: Tensor, key: Tensor, masking: Masking) -> Tensor:
    """Recovered from the weights: `lse = s - log A` at each query's own position."""
    weights = softmax_weights(query, key, *settings(masking))
    queries = query.shape[2]
    own = torch.arange(key.shape[1] - queries, key.shape[1])
    score = masking.scale * (query * key[:, None, own]).sum(-1)
    if masking.softcap is not None:
        score = masking.softcap * torch.tanh(score / masking.softcap)
    return score - weights[:, :, torch.arange(queries), own].log()


# --- attention of branches over a shared prefix ---------------------------------------------------


@each_tile
@pytest.mark.parametrize(
    ("prefix", "own", "queries"), [(0, 9, 9), (4, 7, 7), (6, 3, 1), (1, 8, 2), (11, 1, 1)]
)
@each_masking
def test_branch_attention_is_softmax_attention(
    masking: Masking,
    prefix: int,
    own: int,
    queries: int,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_tile(monkeypatch, "branch_attention", tile)
    heads, batch, groups, size = 2, 3, 2, 5
    query = torch.randn(heads, batch, groups, queries, size, dtype=torch.float64)
    key, value = torch.randn(2, heads, batch, own, size, dtype=torch.float64)
    below_key, below_value = torch.randn(2, heads, prefix, size, dtype=torch.float64)
    output, normaliser = branch_attention(query, key, value, below_key, below_value, masking)
    for branch in range(batch):
        all_keys = torch.cat((below_key, key[:, branch]), dim=1)
        all_values = torch.cat((below_value, value[:, branch]), dim=1)
        expected = softmax_attention(query[:, branch], all_keys, all_values, *settings(masking))
        assert_close(f"output {branch}", expected, output[:, branch], rtol=EXACT)
        expected = log_sum_exp(query[:, branch], all_keys, masking)
        assert_close(f"lse {branch}", expected, normaliser[:, branch], rtol=EXACT)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_branch_attention_in_shorter_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Scores and weights are sums in float32; the values are rounded: a few half-precision ulps."""
    masking = Masking(0.4, window=6)
    tensors = [torch.randn(2, 3, 2, 7, 5), *torch.randn(2, 2, 3, 7, 5), *torch.randn(2, 2, 4, 5)]
    rounded = [tensor.to(dtype) for tensor in tensors]
    output, normaliser = branch_attention(*rounded, masking)
    assert output.dtype == dtype
    assert normaliser.dtype == torch.float32
    expected, _ = branch_attention(*(tensor.double() for tensor in rounded), masking)
    assert_close(f"output {dtype}", expected, output, rtol=tolerance)


# --- gate ---------------------------------------------------------------------------------------


@each_tile
@pytest.mark.parametrize("queries", [9, 4, 1])
@pytest.mark.parametrize("per_head", [False, True], ids=["shared_rho", "rho_per_head"])
@each_masking
def test_attention_flow_is_rho_times_the_maps(
    masking: Masking, per_head: bool, queries: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile(monkeypatch, "value_norm_rollout", tile)
    heads, groups, length, size, rows = 2, 3, 9, 5, 4
    query = torch.randn(heads, groups, queries, size, dtype=torch.float64)
    key = torch.randn(heads, length, size, dtype=torch.float64)
    rho = torch.rand((heads, groups) * per_head + (rows, queries), dtype=torch.float64)
    weights = softmax_weights(query, key, *settings(masking))
    flow = attention_flow(query, key, log_sum_exp(query, key, masking), rho, masking)
    assert_close("flow", rho @ weights, flow, rtol=EXACT)


@pytest.mark.parametrize("groups", [1, 3])
def test_value_output_norms(groups: int) -> None:
    heads, size, length, width = 2, 5, 7, 11
    value = torch.randn(heads, length, size, dtype=torch.float64)
    weight = torch.randn(width, heads * groups * size, dtype=torch.float64)
    norms = value_output_norms(value, weight, torch.float64)
    for head in range(heads * groups):
        block = weight[:, head * size : (head + 1) * size]
        expected = (value[head // groups] @ block.T).abs().sum(-1)
        assert_close(f"head {head}", expected, norms[head // groups, head % groups], rtol=EXACT)


# --- signs --------------------------------------------------------------------------------------


def test_signs_do_not_depend_on_shape_order_or_the_global_random_state() -> None:
    samples, tokens, width = torch.arange(3), torch.arange(5), 70
    before = torch.get_rng_state()
    whole = rademacher(11, samples[:, None], tokens, width, torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(whole, rademacher(11, samples[:, None], tokens, width, torch.float64))
    assert whole.shape == (3, 5, width)
    assert set(whole.unique().tolist()) == {-1.0, 1.0}

    order = torch.tensor([4, 0, 3, 1, 2])
    assert torch.equal(whole[:, order], rademacher(11, samples[:, None], order, width).double())
    for sample in range(3):
        for token in range(5):
            one = rademacher(11, torch.tensor(sample), torch.tensor(token), width)
            assert torch.equal(whole[sample, token], one.double())
    # The first dimensions stay what they are when there are more of them.
    assert torch.equal(whole[..., :33], rademacher(11, samples[:, None], tokens, 33).double())


def whole_number_signs(seed: int, sample: int, token: int, width: int) -> list[float]:
    """The documented generator in Python's own integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B9) % 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key = mix(mix(seed % 2**32) ^ (seed >> 32))
    key = mix(mix(key ^ sample) ^ token)
    words = [mix(key ^ word) for word in range(width // 32 + 1)]
    return [1.0 - 2.0 * (words[d // 32] >> d % 32 & 1) for d in range(width)]


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 7, 2**63 - 1])
def test_signs_are_the_documented_ones(seed: int) -> None:
    """Another generator would silently change every published score of a seed."""
    signs = rademacher(seed, torch.tensor(2), torch.tensor(31), 71)
    assert signs.tolist() == whole_number_signs(seed, 2, 31, 71)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_signs_are_balanced_and_uncorrelated(seed: int) -> None:
    """Means and pairwise products of n fair signs stay within 5 / sqrt(n) of 0."""
    samples, tokens, width = 16, 16, 256
    signs = rademacher(seed, torch.arange(samples)[:, None], torch.arange(tokens), width)
    total = signs.numel()
    assert abs(float(signs.mean())) < 5 / total**0.5
    rows = signs.reshape(samples * tokens, width)
    # Over all pairs of rows (32,640), and of columns: bounded by the largest of that many normals.
    for matrix in (rows, rows.T):
        count, terms = matrix.shape
        product = matrix @ matrix.T / terms
        largest = float(product.fill_diagonal_(0).abs().max())
        assert largest < 6 / terms**0.5, f"correlation {largest:.3f} among {count} rows"
        assert abs(float(product.sum()) / count**2) < 5 / (count * terms**0.5)


def test_seeds_give_unrelated_signs() -> None:
    width = 4096
    where = torch.tensor(0), torch.tensor(0)
    seeds = [0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**62]
    signs = torch.stack([rademacher(seed, *where, width) for seed in seeds])
    product = (signs @ signs.T / width).fill_diagonal_(0)
    assert float(product.abs().max()) < 5 / width**0.5


@pytest.mark.parametrize("order", [1, 2, 8, 64])
def test_walsh_matrix_is_orthogonal(order: int) -> None:
    index = torch.arange(order)
    matrix = walsh(index[:, None], index)
    assert set(matrix.unique().tolist()) <= {-1, 1}
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, order * torch.eye(order, dtype=torch.int64))


# --- KL -----------------------------------------------------------------------------------------


def plain_kl(log_probs: Tensor, logits: Tensor) -> Tensor:
    log_probs, logits = log_probs.double(), logits.double()
    return (log_probs.exp() * (log_probs - logits.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_masked_kl_and_drop(dtype: torch.dtype, rtol: float, spread: float) -> None:
    branches, targets, vocabulary = 4, 3, 37
    trunk = (spread * torch.randn(targets, vocabulary, dtype=dtype)).log_softmax(-1)
    logits = spread * torch.randn(branches, targets, vocabulary, dtype=dtype) + 5
    index = torch.tensor([0, 11, 36])
    kl, drop = masked_kl(trunk, logits.clone(), index)
    assert kl.dtype == drop.dtype == dtype
    assert_close("KL", plain_kl(trunk, logits), kl, rtol=rtol)
    branch = logits.double().log_softmax(-1)
    rows = torch.arange(targets)
    assert_close("drop", trunk.double()[rows, index] - branch[:, rows, index], drop, rtol=rtol)


@pytest.mark.parametrize("shift", [1e-3, 1e-5])
def test_tiny_divergences_keep_their_digits_in_float32(shift: float) -> None:
    """Where `sum P (a - b)` would be drowned: 1e-7 or less beside terms of order 1 and eps 6e-8.

    The inputs themselves are rounded: `a - b` of size `shift` carries errors of eps * |a|, about
    3e-7, so KL (quadratic in it) is good to about 1e-6 / shift, and so is held here.
    """
    vocabulary = 1000
    logits = 2 * torch.randn(vocabulary)
    moved = logits + shift * torch.randn(vocabulary)
    trunk = logits.log_softmax(-1)
    kl, _ = masked_kl(trunk[None], moved[None, None].clone(), torch.tensor([3]))
    exact = plain_kl(logits.double().log_softmax(-1), moved)
    assert 0 < float(exact) < 1e-6
    naive = (trunk.exp() * (trunk - moved.log_softmax(-1))).sum()
    assert_close("KL", exact, kl[0, 0], rtol=2e-6 / shift)
    if shift < 1e-4:
        assert abs(float(naive - exact)) > abs(float(kl[0, 0] - exact))


def test_tiny_divergence_in_float64() -> None:
    logits = 2 * torch.randn(500, dtype=torch.float64)
    moved = logits + 1e-5 * torch.randn(500, dtype=torch.float64)
    kl, _ = masked_kl(logits.log_softmax(-1)[None], moved[None, None].clone(), torch.tensor([0]))
    # Second order is exact to 1e-5 relative: KL = var_P(moved - logits) / 2.
    p, change = logits.softmax(-1), moved - logits
    expected = ((p * change.square()).sum() - (p * change).sum().square()) / 2
    assert 1e-11 < float(expected) < 1e-9
    assert_close("KL", expected, kl[0, 0], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_apart_distributions_do_not_overflow(dtype: torch.dtype) -> None:
    """A token with P = e^-200 that the branch is sure of (Q >> P), and one the other way round."""
    log_probs = torch.tensor([[0.0, -200.0, -201.0]], dtype=dtype).log_softmax(-1)
    logits = torch.tensor([[[-200.0, 0.0, -1.0]]], dtype=dtype)
    kl, drop = masked_kl(log_probs, logits.clone(), torch.tensor([1]))
    assert_close("KL", plain_kl(log_probs, logits), kl, rtol=SINGLE)
    assert float(kl) > 199
    assert float(drop) < -199


def test_divergence_from_itself_is_zero() -> None:
    logits = torch.randn(2, 41)
    kl, drop = masked_kl(logits.log_softmax(-1), logits[None].clone(), torch.tensor([0, 1]))
    assert float(kl.abs().max()) < 1e-13
    assert float(drop.abs().max()) < 1e-6


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 3.0])
def test_streamed_kl_is_the_whole_one(chunk: int, scale: float) -> None:
    """Chunks of the vocabulary, in float32, against the whole of it in float64."""
    targets, branches, vocabulary = 3, 4, 37
    base = 5 * torch.randn(targets, vocabulary, dtype=torch.float64)
    logits = base + scale * torch.randn(branches, targets, vocabulary, dtype=torch.float64)
    target = torch.tensor([0, 36, 17])
    expected = masked_kl(base.log_softmax(-1), logits.clone(), target)
    for dtype, rtol in ((torch.float64, 1e-6), (torch.float32, 2e-2)):
        low, moved = base.to(dtype), logits.to(dtype)
        parts = [
            (slice(start, min(start + chunk, vocabulary)), moved[..., start : start + chunk])
            for start in range(0, vocabulary, chunk)
        ]
        actual = masked_kl_streamed(low.log_softmax(-1), low.logsumexp(-1), parts, target)
        # A float32 logit of 10 is good to 1e-6: a divergence of scale^2 / 2 to 1e-6 / scale of it.
        atol = 0.0 if dtype == torch.float64 else 4e-12 / scale**2 + 2e-6 * scale
        for name, want, got in zip(("KL", "drop"), expected, actual, strict=True):
            assert_close(name, want, got, rtol=rtol, atol=atol if name == "KL" else 4e-6)


def test_an_overflowing_branch_comes_out_infinite() -> None:
    """So that the caller can see it and use the whole-vocabulary form."""
    log_probs = torch.zeros(1, 4).log_softmax(-1)
    logits = torch.tensor([[[200.0, 0.0, 0.0, 0.0]], [[-200.0, -200.0, -200.0, -200.0]]])
    divergence, _ = masked_kl_streamed(
        log_probs, torch.tensor([1.386]), [(slice(0, 4), logits)], torch.tensor([0])
    )
    assert not torch.isfinite(divergence).any()

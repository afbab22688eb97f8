"""Screening: what it leaves out, that the rest is right, and that its audit tells the truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
import heat_fast
import heat_fast.screening as screening
from assertions import assert_close
from heat_fast import HeatConfig, NumericalError
from heat_fast.combine import Components, combine
from heat_fast.decoder import Rows, view
from heat_fast.information import ExactBranches
from heat_fast.kernels.branch_attention import Masking, RaggedRows, ragged_attention
from heat_fast.ranks import spearman
from heat_fast.screening import FrozenBranches, tokens_enough
from heat_fast.trunk import Trunk, run_trunk
from oracles import Measured, measure, softmax_attention

LENGTH = 33
TARGETS = (4, 6)
# float64 through three blocks: a few hundred roundings of 1e-16.
EXACT = 1e-12
# Another batching, another order of float32 sums.
ROUNDING = 2e-5
# The gates of random models are nearly even: a coverage that still leaves tokens out.
COVERAGE = {"coverage": 0.2}

every_family = pytest.mark.parametrize("name", families.FAMILIES)
SCREENS: dict[str, dict[str, Any]] = {
    "coverage": COVERAGE,
    "tolerance": {"branch_tolerance": 0.15},
    "both": COVERAGE | {"branch_tolerance": 0.15},
}
each_screen = pytest.mark.parametrize("settings", SCREENS.values(), ids=SCREENS)


def run(branches: FrozenBranches, tokens: list[int]) -> Tensor:
    """The last residual rows, with the rows that were run counted."""
    last, rows = branches.run(tokens)
    branches.done(tokens, rows)
    return last


def attribute(settings: dict[str, Any], name: str = "llama", **more: Any) -> Measured:
    ids = families.prompt_ids(name, LENGTH)
    return measure(
        families.build(name), ids, list(TARGETS), **{"curvature": "none"} | settings | more
    )


@torch.no_grad()
def trunk_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Trunk, Tensor]:
    """The trunk of a test prompt and a vector that replaces its tokens."""
    model = families.build(name, dtype=dtype)
    ids = [*families.prompt_ids(name, LENGTH), *TARGETS[:-1]]
    embeddings = model.get_input_embeddings()(torch.tensor(ids))
    trunk = run_trunk(view(model, len(ids)), embeddings, TARGETS, keep_streams=True)
    return trunk, torch.zeros_like(embeddings[0])


# --- attention of a ragged set of rows ------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 97, 1 << 20])
@pytest.mark.parametrize("queries", ["all", "last"])
@pytest.mark.parametrize(
    "masking",
    [Masking(0.4), Masking(0.7, window=3), Masking(0.3, softcap=1.3), Masking(0.5, 5, 0.9)],
    ids=["plain", "window", "cap", "both"],
)
def test_ragged_attention_is_softmax_attention(
    masking: Masking, queries: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three branches with some own keys each, and queries at rows with and without them."""
    monkeypatch.setattr("heat_fast.kernels.branch_attention.reference.TILE_ELEMENTS", tile)
    monkeypatch.setattr("heat_fast.kernels.branch_attention.reference.TILE_ROWS", 2)
    heads, groups, size, length = 2, 3, 5, 11
    places = [(0, 3), (0, 7), (0, 10), (1, 0), (2, 5), (2, 6), (1, 4), (1, 10), (2, 10)]
    keys, count = 6, len(places)
    attending = count if queries == "all" else 4
    branch, position = torch.tensor(places).t()
    rows = RaggedRows(branch, position, keys, attending)
    query = torch.randn(heads, groups, attending, size, dtype=torch.float64)
    key, value = torch.randn(2, heads, keys, size, dtype=torch.float64)
    trunk_key, trunk_value = torch.randn(2, heads, length, size, dtype=torch.float64)
    output, _ = ragged_attention(query, key, value, trunk_key, trunk_value, rows, masking)
    for index in range(attending):
        who, where = places[count - attending + index]
        own_key, own_value = trunk_key.clone(), trunk_value.clone()
        for row, (other, place) in enumerate(places[:keys]):
            if other == who:
                own_key[:, place], own_value[:, place] = key[:, row], value[:, row]
        expected = softmax_attention(
            query[:, :, index : index + 1],
            own_key[:, : where + 1],
            own_value[:, : where + 1],
            masking.scale,
            masking.window,
            masking.softcap,
        )
        assert_close(f"row {index}", expected, output[:, :, index : index + 1], rtol=EXACT)


# --- branches with frozen rows --------------------------------------------------------------------


def literal_branch(
    trunk: Trunk, vector: Tensor, token: int, tolerance: float
) -> tuple[Tensor, int]:
    """A branch by definition: all rows are run, those that are frozen are set to the trunk's.

    Returns the last rows `[n, d]` and how many rows were frozen, over both layers of all blocks.
    """
    length = trunk.length
    targets = torch.arange(length) >= trunk.prompt_length - 1
    active = torch.arange(length) >= token
    everything = Rows(0, 0, length)
    embeddings = trunk.embeddings.clone()
    embeddings[token] = vector
    x = trunk.decoder.enter(embeddings[None], 0)
    original = trunk.decoder.enter(trunk.embeddings[None], 0)

    def moved(own: Tensor, other: Tensor) -> Tensor:
        change = torch.linalg.vector_norm(own - other, dim=-1)
        return (change >= tolerance * torch.linalg.vector_norm(other, dim=-1)) | targets

    frozen = reach = 0
    for block in trunk.decoder.blocks[:-1]:
        y, state = block.forward(x, everything, keep_streams=True)
        unchanged, plain = block.forward(original, everything, keep_streams=True)
        assert state.streams is not None and plain.streams is not None
        # What no window has let through so far is not frozen, or it could never change.
        window = block.attention.masking.window
        reach += length if window is None else window - 1
        beyond = torch.arange(length) > token + reach
        active = active & (moved(state.streams.middle, plain.streams.middle) | beyond)
        frozen += length - token - int(active.sum())
        active = active & (moved(y[0], unchanged[0]) | beyond)
        frozen += length - token - int(active.sum())
        x = torch.where(active[:, None], y, unchanged)
        original = unchanged
    frozen += length - token - int(active.sum())  # for the attention of the last block
    return trunk.decoder.blocks[-1].forward(x, everything)[0][0, targets], frozen


@every_family
@torch.no_grad()
def test_nothing_frozen_is_exact(name: str) -> None:
    trunk, vector = trunk_of(name)
    tokens = [0, 1, 4, 5, 11, 30, 32]
    branches = FrozenBranches(trunk, vector, 1e-300)
    expected = ExactBranches(trunk, vector).last(tokens)
    assert_close(name, expected, run(branches, tokens), rtol=EXACT)
    started = sum(trunk.length - token for token in tokens)
    assert branches.layer_rows == branches.all_rows == 2 * 3 * started
    assert branches.branch_tokens == started


@pytest.mark.parametrize("tolerance", [0.1, 0.25, 1e9])
@every_family
@torch.no_grad()
def test_frozen_rows_are_the_trunks(name: str, tolerance: float) -> None:
    trunk, vector = trunk_of(name)
    tokens = [0, 3, 4, 19, 28, 30, 32]
    branches = FrozenBranches(trunk, vector, tolerance)
    actual = run(branches, tokens)
    literal = [literal_branch(trunk, vector, token, tolerance) for token in tokens]
    assert_close(name, torch.stack([rows for rows, _ in literal]), actual, rtol=EXACT)
    frozen = branches.all_rows - branches.layer_rows
    # The last block's rows count twice: its feed-forward layer sees target rows only, as always.
    held = sum(count for _, count in literal)
    assert frozen >= held
    assert held > 0 or tolerance < 1, "that much freezes rows of any model"
    windowed = any(block.attention.masking.window for block in trunk.decoder.blocks)
    if tolerance == 1e9 and not windowed:
        first = sum(trunk.length - token for token in tokens)
        kept = len(tokens) * len(TARGETS)
        assert branches.layer_rows == first + 5 * kept
    assert frozen < branches.all_rows
    if tolerance > (0.25 if windowed else 0.1):
        assert not torch.allclose(actual, ExactBranches(trunk, vector).last(tokens))


@pytest.mark.parametrize("tolerance", [1e-300, 0.2, 1e9])
@torch.no_grad()
def test_counts_are_the_rows_that_the_layers_met(tolerance: float) -> None:
    model = families.build("llama", dtype=torch.float64)
    ids = torch.tensor([*families.prompt_ids("llama", LENGTH), *TARGETS[:-1]])
    embeddings = model.get_input_embeddings()(ids)
    trunk = run_trunk(view(model, len(ids)), embeddings, TARGETS, keep_streams=True)
    met: list[int] = []
    layers = model.model.layers
    modules = [layer.self_attn.k_proj for layer in layers] + [
        layer.mlp.down_proj for layer in layers
    ]

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        met.append(output.shape[:-1].numel())

    for module in modules:
        module.register_forward_hook(count)
    tokens = [2, 3, 14]
    branches = FrozenBranches(trunk, torch.zeros_like(embeddings[0]), tolerance)
    run(branches, tokens)
    assert met[-1] == len(tokens) * len(TARGETS)  # the last block's feed-forward layer
    assert branches.layer_rows == sum(met[:-1]) + met[-2]
    assert met == sorted(met, reverse=True)


@torch.no_grad()
def test_batches_of_branches_do_not_meet() -> None:
    trunk, vector = trunk_of("gpt2")
    tokens = [0, 2, 3, 11, 32]
    together = run(FrozenBranches(trunk, vector, 0.2), tokens)
    apart = [run(FrozenBranches(trunk, vector, 0.2), [token]) for token in tokens]
    assert_close("apart", torch.cat(apart), together, rtol=EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
@torch.no_grad()
def test_half_precision_rows(name: str, dtype: torch.dtype) -> None:
    """As `test_half_precision` of the engine: eight times sqrt(30) half-ulps."""
    trunk, vector = trunk_of(name, dtype)
    tokens = [0, 5, 13]
    exact = ExactBranches(trunk, vector).last(tokens)
    rows = run(FrozenBranches(trunk, vector, 1e-300), tokens)
    assert rows.dtype == dtype
    bound = 8 * 30**0.5 * torch.finfo(dtype).eps / 2
    assert_close(f"{name} {dtype}", exact, rows, rtol=bound)


def test_a_broken_branch_is_reported_with_its_block() -> None:
    """Values that are not finite where a token is masked alone: they are never frozen."""
    model = families.build("llama_bias")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    ids = families.prompt_ids("llama_bias", LENGTH)
    ids = [token if token != 7 else 8 for token in ids]
    settings: dict[str, Any]
    for settings in ({}, {"branch_tolerance": 0.02}):
        with pytest.raises(NumericalError, match="block 0 with token 0 masked"):
            heat_fast.attribute(
                model,
                None,
                ids,
                4,
                curvature="none",
                masking="sentinel",
                sentinel_token=7,
                **settings,
            )


# --- which tokens are measured --------------------------------------------------------------------


def literal_enough(gates: Tensor, values: Tensor, coverage: float) -> int:
    """The criterion in plain loops."""
    targets, count = values.shape
    for enough in range(count, gates.shape[1] + 1):
        met = True
        for target in range(targets):
            part = sum(float(gates[target, i] * values[target, i]) for i in range(count))
            rest = [float(gate) for gate in gates[target, enough:]]
            near = max(float(value) for value in values[target, count // 2 :])
            bound = near * sum(rest) + float(values[target].max()) * max(rest, default=0.0)
            met = met and bound <= (1 - coverage) * (part + bound) + 1e-12
        if met:
            return enough
    return gates.shape[1]


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_tokens_enough_is_the_criterion(coverage: float, targets: int) -> None:
    found = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        gates = torch.rand(targets, 30, dtype=torch.float64, generator=generator) ** 4
        gates = gates[:, gates.amax(0).argsort(descending=True)]
        values = torch.rand(targets, 8, dtype=torch.float64, generator=generator) ** 3
        enough = tokens_enough(gates, values, coverage)
        assert enough == literal_enough(gates, values, coverage)
        found.add(enough)
    assert len(found) > 1


def test_tokens_without_any_information_need_no_more() -> None:
    gates = torch.full((2, 9), 1 / 9)
    assert tokens_enough(gates, torch.zeros(2, 4), 0.99) == 4
    assert tokens_enough(gates, torch.ones(2, 9), 0.99) == 9


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_skipped_tokens_are_marked_and_the_others_exact(name: str) -> None:
    exact = attribute({}, name)
    screened = attribute(COVERAGE, name)
    skipped = screened.result.information_skipped
    facts = screened.result.metadata["screening"]["coverage"]
    assert skipped is not None and any(skipped) and not all(skipped)
    chosen = torch.tensor(skipped)
    assert facts["skipped"] == int(chosen.sum())
    assert facts["tokens"] == LENGTH
    for part in ("information", "log_prob_drop"):
        assert not screened[part][:, chosen].any()
        assert_close(part, exact[part][:, ~chosen], screened[part][:, ~chosen], rtol=ROUNDING)
    for part in ("gate", "curvature", "gradient_norm"):
        assert torch.equal(exact[part], screened[part])
    counts = screened.result.metadata["counts"]
    assert counts["branches"] == LENGTH - facts["skipped"]

    # The tokens with the largest gates, and besides them those of the audit.
    order = exact["gate"].amax(0).argsort(descending=True, stable=True)
    audited = facts["audit"]["tokens"]
    first = LENGTH - facts["skipped"] - audited
    assert audited == screening.AUDITED
    assert not chosen[order[:first]].any()
    extra = order[first:][~chosen[order[first:]]]
    assert len(extra) == audited
    found = exact["information"][:, extra]
    audit = facts["audit"]
    assert_close("largest", found.max(), audit["largest_information"], rtol=ROUNDING)
    assert_close("mean", found.mean(), audit["mean_information"], rtol=ROUNDING)
    gates = exact["gate"]
    share = (gates[:, chosen].sum(-1) / gates.sum(-1)).max()
    assert_close("gate", share, facts["gate_share_skipped"], rtol=ROUNDING)


def test_an_audit_of_everything_skips_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "AUDITED", LENGTH)
    exact, screened = attribute({}), attribute(COVERAGE)
    assert screened.result.information_skipped == (False,) * LENGTH
    assert screened.result.metadata["screening"]["coverage"]["audit"]["score_share_lost"] == 0
    for part, values in exact.parts.items():
        assert_close(part, values, screened[part], rtol=ROUNDING)


def test_the_estimates_are_without_bias() -> None:
    """Averaged over all audits of one token, the estimate of the others is what they hold."""
    gates, kl, drop = torch.rand(3, 2, 7, dtype=torch.float64)
    drop -= 0.5
    rest = [1, 2, 5, 6]
    true = [values[:, rest].sum(-1) for values in (kl, drop.clamp_min(0), gates * kl)]
    found = [screening._extrapolate(gates, kl, drop, [token], len(rest) - 1) for token in rest]
    for index, expected in enumerate(true):
        mean = torch.stack([sums[index][:, 0] for sums in found]).mean(0)
        assert_close(f"sum {index}", expected * (len(rest) - 1) / len(rest), mean, rtol=EXACT)
    assert not any(values.any() for values in screening._extrapolate(gates, kl, drop, [1], 0))


@pytest.mark.parametrize("normalize", [None, "sum"])
def test_the_score_share_lost_follows_from_the_audit(normalize: str | None) -> None:
    """Curvature dilutes it: its part of the score is complete."""
    settings = {"normalize": normalize, "curvature": "grad_squared", "gamma": 0.3}
    exact, screened = attribute(settings), attribute(settings | COVERAGE)
    skipped = torch.tensor(screened.result.information_skipped)
    order = exact["gate"].amax(0).argsort(descending=True, stable=True)
    audited = order[-int(skipped.sum()) - screening.AUDITED :]
    audited = audited[~skipped[audited]]
    count = int(skipped.sum())
    lost = 0.3 * count * (exact["gate"] * exact["information"])[:, audited].mean(-1)
    if normalize is not None:
        estimate = count * exact["information"][:, audited].mean(-1)
        lost = lost / (exact["information"][:, ~skipped].sum(-1) + estimate)
    expected = (lost / (lost + screened["target_scores"].sum(-1))).max()
    audit = screened.result.metadata["screening"]["coverage"]["audit"]
    assert 0 < audit["score_share_lost"] < 1
    assert_close("share", expected, audit["score_share_lost"], rtol=10 * ROUNDING)


def test_normalised_sums_take_in_what_was_skipped() -> None:
    row = torch.tensor([[0.2, 0.3, 0.5]])
    information, drop = torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[2.0, -1.0, 0.0]])
    skipped = (torch.tensor([[4.0]]), torch.tensor([[6.0]]))
    config = HeatConfig(beta=0.0, gamma=1.0, normalize="sum")
    parts = Components(row, row, information, drop, row, skipped)
    score, envelope = combine(parts, config)
    assert_close("score", row * information / 8, score, rtol=1e-6)
    assert_close("envelope", row * drop.clamp_min(0) / 8, envelope, rtol=1e-6)
    plain, _ = combine(parts, HeatConfig(beta=0.0, gamma=1.0))
    assert torch.equal(plain, row * information)
    both = torch.cat((row, 2 * row))
    two = Components(both, both, both, both, both, (both[:, :1], both[:, 1:2]))
    second = two.rows(slice(1, 2))
    assert second.skipped is not None
    assert torch.equal(second.skipped[1], 2 * row[:, 1:2])
    assert torch.equal(second.gate, 2 * row)


def test_normalised_scores_of_measured_tokens_stay_near_the_exact_ones() -> None:
    """Without the estimate they would all grow by the share of information that was skipped."""
    settings = {"normalize": "sum", "beta": 0.0, "gamma": 1.0}
    exact, screened = attribute(settings), attribute(settings | COVERAGE)
    chosen = torch.tensor(screened.result.information_skipped)
    ratio = (screened["target_scores"] / exact["target_scores"])[:, ~chosen]
    whole = exact["information"].sum(-1)
    grown = whole / screened["information"].sum(-1)
    assert (grown > 1.05).all(), "too little was skipped to tell"
    # One factor for all tokens of a target, from the audit's estimate of the sum.
    assert_close("factor", ratio[:, :1].expand_as(ratio), ratio, rtol=ROUNDING)
    assert ((ratio[:, 0] - 1).abs() < (grown - 1).abs()).all()


# --- what the engine promises ---------------------------------------------------------------------


@each_screen
def test_batch_size_and_repetition_change_nothing(settings: dict[str, Any]) -> None:
    expected = attribute(settings, token_budget=4096)
    for budget in (1, 7, 64):
        actual = attribute(settings, token_budget=budget)
        assert actual.result.information_skipped == expected.result.information_skipped
        for part, values in expected.parts.items():
            assert_close(f"{budget} {part}", values, actual[part], rtol=ROUNDING)
    torch.manual_seed(99)
    again = attribute(settings, token_budget=4096)
    for part, values in expected.parts.items():
        assert torch.equal(values, again[part]), part
    assert again.result.metadata["screening"] == expected.result.metadata["screening"]


def test_the_seed_draws_the_audit() -> None:
    marks = {attribute(COVERAGE, seed=seed).result.information_skipped for seed in (1, 2)}
    assert len(marks) == 2


@each_screen
def test_progress_memory_and_interruption(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = attribute(settings, token_budget=200)
    kernel = "ragged_attention" if "branch_tolerance" in settings else "branch_attention"
    original: Any = getattr(__import__("heat_fast.decoder.attention", fromlist=["x"]), kernel)
    tried: list[int] = []

    def limited(*arguments: Any) -> Any:
        ragged = kernel == "ragged_attention"
        size = int(arguments[5].branch.max()) + 1 if ragged else arguments[0].shape[1]
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(f"heat_fast.decoder.attention.{kernel}", limited)
    calls: list[tuple[str, int, int]] = []
    actual = attribute(settings, token_budget=200, progress=lambda *call: calls.append(call))
    assert max(tried) > 3
    assert actual.result.metadata["out_of_memory_retries"] >= 1
    assert actual.result.information_skipped == expected.result.information_skipped
    for part, values in expected.parts.items():
        assert_close(part, values, actual[part], rtol=ROUNDING)
    steps = [(done, total) for name, done, total in calls if name == "information"]
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    # What coverage leaves out is taken back; frozen rows are counted as if they had been run.
    assert (steps[-1][1] < steps[0][1]) == ("coverage" in settings)

    def interrupt(name: str, done: int, _: int) -> None:
        if name == "information" and done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute(settings, progress=interrupt)
    for part, values in expected.parts.items():
        assert_close(part, values, attribute(settings, token_budget=200)[part], rtol=ROUNDING)


def test_the_audit_of_frozen_rows_tells_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = attribute({})["information"]
    monkeypatch.setattr(screening, "AUDITED", 1)
    nearly = attribute({"branch_tolerance": 0.15})
    facts = nearly.result.metadata["screening"]["branch_tolerance"]
    assert facts["audit"]["rank_correlation"] is None  # one branch has no order
    assert 0 < facts["frozen"] < facts["rows"]
    wrong = (nearly["information"] - exact).abs().amax(0) > ROUNDING * exact.max()
    assert wrong.any()

    monkeypatch.setattr(screening, "AUDITED", LENGTH)
    audited = attribute({"branch_tolerance": 0.15})
    audit = audited.result.metadata["screening"]["branch_tolerance"]["audit"]
    assert audit["branches"] == LENGTH
    # All were measured again, so the result is exact, and the errors are those of the others.
    assert_close("information", exact, audited["information"], rtol=ROUNDING)
    error = (nearly["information"] - exact).abs()
    assert audit["largest_error"] >= float(error.max()) * (1 - 1e-3)
    assert 0 < audit["median_relative_error"] <= audit["largest_relative_error"]
    ranks = [spearman(*pair) for pair in zip(nearly["information"], exact, strict=True)]
    assert -1 <= audit["rank_correlation"] <= max(ranks) + 0.05
    counts = audited.result.metadata["counts"]
    assert counts["branches"] == 2 * LENGTH


def test_half_the_audit_of_frozen_rows_are_the_leading_tokens() -> None:
    """What weighs most in the score is right, whatever is frozen."""
    exact, nearly = attribute({}), attribute({"branch_tolerance": 10.0})
    leading = exact["gate"].amax(0).argsort(descending=True, stable=True)
    half = leading[: screening.AUDITED // 2]
    found, wanted = nearly["information"], exact["information"]
    assert_close("leading", wanted[:, half], found[:, half], rtol=ROUNDING)
    wrong = (found - wanted).abs().amax(0) > 0.5 * wanted.amax(0)
    assert int(wrong.sum()) > 0
    audit = nearly.result.metadata["screening"]["branch_tolerance"]["audit"]
    assert audit["branches"] == screening.AUDITED
    assert audit["largest_error"] >= 0.5 * float(wanted[:, half].max())


def test_screens_on_a_story(local_model: Callable[[str], Path], figures: Any) -> None:
    """220 tokens that the story model tells itself."""
    path = local_model("stories3M")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    start = tokenizer("Once upon a time there was a", return_tensors="pt").input_ids
    torch.manual_seed(1)
    ids = model.generate(
        start, do_sample=True, temperature=0.9, max_length=220, suppress_tokens=[1, 2]
    )[0].tolist()
    exact = heat_fast.attribute(model, None, ids, curvature="none")
    for settings in ({"coverage": 0.95}, {"branch_tolerance": 0.02}, {"branch_tolerance": 0.001}):
        result = heat_fast.attribute(model, None, ids, curvature="none", **settings)
        run = result.metadata["counts"]["branch_tokens"]
        share = run / sum(range(len(ids) + 1))
        if "branch_tolerance" in settings:
            order = spearman(result.information[0], exact.information[0])
            scores = spearman(result.scores, exact.scores)
            figure = f"Spearman's rho of the divergence {order:.3f}, of the score {scores:.3f}"
            assert order > 0.7
        else:
            skipped = torch.tensor(result.information_skipped)
            part = (exact.gate * exact.information)[0]
            lost = float(part[skipped].sum() / part.sum())
            figure = f"{int(skipped.sum())} tokens skipped, {lost:.2%} of their part lost"
            assert lost < 0.05
        assert share < 0.9
        figures.add(f"{settings}, {len(ids)} tokens: {share:.0%} of the branch tokens, {figure}")

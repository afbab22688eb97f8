"""Standard errors, automatic numbers of probes and codes, and the cost told beforehand."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import families
import heat_fast
from heat_fast import Attribution, Attributor, HeatConfig
from heat_fast.ceilings import Ceilings, measure
from heat_fast.combine import Components
from heat_fast.cost import bytes_moved, flops
from heat_fast.curvature import _Coded, code_length
from heat_fast.decoder import view
from heat_fast.errors import InputError
from heat_fast.planner import token_budget
from heat_fast.reading import approximations
from heat_fast.stopping import agreement
from heat_fast.trunk import run_adjoint
from heat_fast.work import Work

LENGTH = 9


def attribute(name: str = "llama", target: Any = 5, **settings: Any) -> Attribution:
    model = families.build(name)
    ids = families.prompt_ids(name, LENGTH)
    return Attributor(model, None, HeatConfig(**settings)).attribute(ids, target)


@pytest.mark.parametrize("estimator", ["block", "row", "coded"])
def test_standard_errors_tell_the_spread_over_seeds(estimator: str) -> None:
    """Over 40 seeds the deviation of S is its standard error, within the noise of either."""
    settings = (
        {"estimator": estimator, "codes": 16} if estimator == "coded" else {"estimator": estimator}
    )
    runs = [attribute(probes=8, seed=seed, **settings) for seed in range(40)]
    spread = torch.stack([run.curvature[0] for run in runs]).std(0)
    errors = [run.curvature_stderr for run in runs]
    assert all(error is not None for error in errors)
    told = torch.stack([error[0] for error in errors if error is not None])
    ratio = (told.square().mean(0).sqrt() / spread).log()
    # A deviation from 40 draws is off by 11 % itself; the mean over 9 tokens by less.
    assert abs(float(ratio.mean())) < 0.15


def test_what_is_exact_has_no_error_and_what_is_unknown_none() -> None:
    exact = attribute(curvature="grad_squared").curvature_stderr
    assert exact is not None and not exact.any()
    assert attribute(probes=1).curvature_stderr is None
    assert attribute(curvature="gauss_newton", probes=4).curvature_stderr is None


def test_probes_auto_stops_when_the_ranking_is_settled() -> None:
    """A lenient demand takes the first round; an impossible one all probes there are."""
    easy = attribute(probes="auto", confidence=0.01, top_k=2)
    assert easy.metadata["counts"]["hvp"] == 8 * LENGTH
    hard = attribute(probes="auto", confidence=0.9999, top_k=9, probes_max=16)
    assert hard.metadata["counts"]["hvp"] in (8 * LENGTH, 16 * LENGTH)
    assert easy.metadata["probes"] == {"most": 8, "settled": True}
    assert "probes" not in attribute(probes=2).metadata
    fixed = attribute(probes=hard.metadata["counts"]["hvp"] // LENGTH)
    torch.testing.assert_close(hard.curvature, fixed.curvature)


def test_it_is_told_that_probes_did_not_settle_the_ranking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("heat_fast.pipeline.settled", lambda *_, **__: False)
    result = attribute(probes="auto", probes_max=16)
    assert result.metadata["probes"] == {"most": 16, "settled": False}
    assert "16 probes did not settle" in "".join(approximations(result))


def test_probes_of_a_low_rank_approximation_take_no_products() -> None:
    """Until the ranking is settled or not: the count is that of the approximation."""
    settings: dict[str, Any] = {"variant": "lr", "rank": 6, "target": [5, 6]}
    few, most = (
        attribute(probes="auto", confidence=confidence, probes_max=40, **settings)
        for confidence in (0.01, 0.9999)
    )
    assert few.metadata["counts"]["hvp"] == most.metadata["counts"]["hvp"] == 2 * (12 + 4)
    fixed = attribute(probes=8, **settings)
    torch.testing.assert_close(few.curvature, fixed.curvature)
    # Probes of one sketch do not show the sketch's own error.
    assert most.curvature_stderr is None and few.curvature_stderr is None
    assert not torch.equal(most.curvature, few.curvature)


@pytest.mark.parametrize("scope", ["sequence", "token"])
@pytest.mark.parametrize("passes", [1, 2])
def test_estimate_of_a_low_rank_run(scope: str, passes: int) -> None:
    config = HeatConfig(variant="lr", rank=5, rank_scope=scope, passes=passes)  # type: ignore[arg-type]
    told = heat_fast.estimate(families.build("llama"), LENGTH, 2, config, calibrate=False)
    run = attribute(target=[5, 6], **config.to_dict())
    assert told.hvp == run.metadata["counts"]["hvp"]


def test_agreement_tells_noise_from_order() -> None:
    zeros = torch.zeros(1, 6)
    parts = Components(torch.full((1, 6), 1 / 6), zeros, zeros, zeros, zeros)
    order = torch.arange(6.0)[None, :, None]
    noise = torch.randn(1, 6, 32)
    config = HeatConfig(top_k=6)
    assert agreement(parts, 100 * order + noise, config) == 1.0
    assert agreement(parts, noise, config) < 0.9


@pytest.mark.parametrize(("ratio", "codes"), [(1, 8), (12, 8), (24, 16), (96, 64), (2000, 256)])
def test_codes_auto_follows_the_noise(ratio: float, codes: int) -> None:
    """Off-diagonal energy R times the diagonal's: the power of two with R / codes <= 2, up to 256.

    The median over 300 tokens of 48 dimensions knows R far better than to a third, which is the
    distance of these R from where the choice turns.
    """
    tokens, width, first = 300, 48, 8
    products: Any = SimpleNamespace(tokens=tokens, adjoints=[None], dtype=torch.float64)
    coded = _Coded(products, HeatConfig(estimator="coded", codes="auto"))
    noise = ratio**0.5 * torch.randn(first, 1, tokens, width, dtype=torch.float64)
    decoded = torch.randn(1, tokens, width, dtype=torch.float64) + noise
    assert coded._choose(decoded.sum(0), decoded.square().sum(0)) == codes


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_codes_auto_is_the_run_with_the_codes_it_chose(name: str) -> None:
    """Never fewer than 8, never more than tell all tokens apart; then it is exact."""
    order = code_length(LENGTH)
    result = attribute(name, estimator="coded", codes="auto", probes=2)
    codes = result.metadata["counts"]["hvp"] // 2
    assert 8 <= codes <= order
    fixed = attribute(name, estimator="coded", codes=codes, probes=2)
    torch.testing.assert_close(result.curvature, fixed.curvature, rtol=1e-5, atol=0)


@pytest.mark.parametrize("targets", [5, [5, 6, 7]], ids=["one", "three"])
def test_coded_survives_a_failed_allocation(targets: Any) -> None:
    """A batch that fails half way through its sums is run again and counted once."""
    settings = {"estimator": "coded", "codes": 4, "probes": 2, "token_budget": 64}
    expected = attribute(target=targets, **settings)
    plain, failures = torch.Tensor.square, [1, 3]
    calls = 0

    def square(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += tensor.ndim == 3 and tensor.shape[0] > 1
        if calls in failures:
            failures.remove(calls)
            raise MemoryError("simulated")
        return plain(tensor)

    with mock.patch.object(torch.Tensor, "square", square):
        actual = attribute(target=targets, **settings)
    assert actual.metadata["out_of_memory_retries"] > 0
    torch.testing.assert_close(actual.curvature, expected.curvature, rtol=1e-5, atol=0)


# --- the cost told beforehand -------------------------------------------------------------------


class FlopCounter(TorchDispatchMode):
    """torch's own formulas for every operation; its FlopCounterMode also hooks into modules,
    which the differentiation of an activation does not survive."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


def squares(start: int, stop: int) -> int:
    """What `work.pairs` is to the products of whole matrices that torch computes and counts."""
    return (stop - start) * stop


def made_anew(work: Work, start: int) -> int:
    """FLOPs of the scores and their adjoint that a product alone in its batch makes again."""
    rows, total = work.length - start, 0
    for layer, sizes in enumerate(work.swept, 1):
        queries = rows if layer < len(work.swept) else 1
        # Scores on the way up; scores, their adjoint and their tangent on the way down.
        total += 2 * sizes.heads * queries * (4 * work.length + rows)
    return total


@pytest.mark.parametrize("name", families.ARCHITECTURES)
@pytest.mark.parametrize(
    "curvature",
    ["none", "gauss_newton", "block", "coded", "row", "low_rank"],
)
def test_counted_flops_are_what_torch_counts(
    name: str, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 3 %, of every family; one sequence per batch, so that nothing is shared or padded.

    No window is shorter than the prompt: what lies outside one is counted all the same.
    """
    monkeypatch.setattr("heat_fast.work.pairs", squares)
    monkeypatch.setattr("heat_fast.pipeline.check_faithful", lambda *_: None)
    model = families.build(name)
    windows = [getattr(model.config, field, None) for field in ("sliding_window", "window_size")]
    length = min([12, *filter(None, windows)])
    ids = families.prompt_ids(name, length)
    settings: dict[str, Any] = {"token_budget": 1, "kernels": "reference"}
    if curvature in ("none", "gauss_newton"):
        config = HeatConfig(curvature=curvature, probes=2, **settings)
    else:
        config = HeatConfig(estimator=curvature, probes=1, codes=4, rank=4, **settings)
    with FlopCounter() as counter:
        result = Attributor(model, None, config).attribute(ids, 5)
    decoder = view(model, length)
    expected = sum(flops(decoder, length, 1, config).values())
    work = Work(decoder, length, 1)
    if curvature == "block":
        expected += sum(made_anew(work, start) for start in range(length))
    elif curvature in ("coded", "row", "low_rank"):
        expected += result.metadata["counts"]["hvp"] * made_anew(work, 0)
    assert abs(counter.total / expected - 1) < 0.03


class TrafficCounter(TorchDispatchMode):
    """Bytes of the operands and results of every product with one of the model's parameters."""

    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.products:
            operands = args[-2:]
            if any(each.untyped_storage().data_ptr() in self.weights for each in operands):
                self.total += sum(each.nbytes for each in (*operands, output))
        return output


@pytest.mark.parametrize("name", families.ARCHITECTURES)
@pytest.mark.parametrize("curvature", ["none", "block", "coded", "low_rank"])
def test_counted_bytes_are_what_products_with_weights_move(
    name: str, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 5 %, of every family; one sequence per batch, so that none shares its weights.

    Experts are counted as if chosen evenly; rows of one prompt agree more than that.
    """
    monkeypatch.setattr("heat_fast.pipeline.check_faithful", lambda *_: None)
    model = families.build(name)
    settings: dict[str, Any] = {"token_budget": 1, "kernels": "reference"}
    if curvature == "none":
        config = HeatConfig(curvature="none", **settings)
    else:
        config = HeatConfig(estimator=curvature, probes=1, codes=4, rank=4, **settings)
    with TrafficCounter(model) as counter:
        Attributor(model, None, config).attribute(families.prompt_ids(name, 8), 5)
    told = sum(bytes_moved(view(model, 8), 8, 1, config, rows=1).values())
    assert abs(counter.total / told - 1) < (0.08 if families.is_routed(name) else 0.05)


def test_larger_batches_move_fewer_bytes() -> None:
    decoder = view(families.build("llama"), 16)
    config = HeatConfig(probes=2)
    moved = [sum(bytes_moved(decoder, 16, 1, config, rows).values()) for rows in (1, 32, 512)]
    assert moved == sorted(set(moved), reverse=True)


def test_floor_is_the_longer_of_operations_and_bytes() -> None:
    floor = Ceilings(100.0, 10.0).floor({"a": 200, "b": 200}, {"a": 10, "b": 50})
    assert floor == {"a": 2.0, "b": 5.0}


def test_ceilings_are_measured() -> None:
    found = measure(torch.device("cpu"), torch.float32)
    assert 1e8 < found.flop_rate < 1e15
    assert 1e8 < found.byte_rate < 1e13


def test_estimate_counts_what_a_run_counts() -> None:
    model = families.build("llama")
    ids = families.prompt_ids("llama", 9)
    config = HeatConfig(probes=3, token_budget=1)
    told = heat_fast.estimate(model, 9, 2, config, calibrate=False)
    counts = Attributor(model, None, config).attribute(ids, [5, 6]).metadata["counts"]
    assert (told.hvp, told.branches, told.branch_tokens) == (
        counts["hvp"],
        counts["branches"],
        counts["branch_tokens"],
    )
    assert told.seconds is None
    assert heat_fast.estimate(model, 9, config=config).seconds > 0  # type: ignore[operator]


class Alive(TorchDispatchMode):
    """The bytes of all tensors made under it that are alive, and the most there have been."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.most = 0
        # Views of weights are no memory of their own.
        self.known = {each.untyped_storage()._cdata for each in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    weakref.finalize(storage, self.forget, key, size)
                    self.now += size
                    self.most = max(self.most, self.now)
        return output

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "coded", "codes": 4},
        {"estimator": "row", "token_budget": 90},
        {"estimator": "low_rank", "rank": 8},
        {"curvature": "gauss_newton"},
        {"variant": "gs"},
    ],
    ids=["block", "coded", "row", "low_rank", "gauss_newton", "gs"],
)
@pytest.mark.parametrize(
    ("name", "targets", "dtype"),
    [
        ("llama", 1, torch.float32),
        ("llama", 4, torch.float64),
        ("llama", 32, torch.float32),
        ("gpt2", 3, torch.float32),
        ("gemma2", 1, torch.bfloat16),
        ("olmoe", 2, torch.float32),
        ("glm4_moe", 1, torch.float32),
        ("deepseek_v3", 2, torch.float32),
    ],
)
def test_estimated_bytes_are_near_those_alive(
    name: str, targets: int, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """The trunk's within a tenth, the most of all within a factor of two."""
    model = families.build(name, dtype=dtype)
    config = HeatConfig(**{"probes": 2, "kernels": "reference", **settings})
    with mock.patch("heat_fast.decoder.product._COMPILED", 0):  # code, which is no tensor
        told = heat_fast.estimate(model, 40, targets, config, calibrate=False)
    kept: list[int] = []

    def budget(trunk_bytes: int, *arguments: Any) -> Any:
        kept.append(trunk_bytes)
        return token_budget(trunk_bytes, *arguments)

    with (
        # A block for the allocator's sake, never touched and so never resident.
        mock.patch("heat_fast.attributor.keep_heap"),
        mock.patch("heat_fast.pipeline.token_budget", budget),
        Alive(model) as alive,
    ):
        ids = families.prompt_ids(name, 40)
        Attributor(model, None, config).attribute(ids, ([4, 6, 8, 10] * targets)[:targets])
    print(f"peak {told.peak_bytes / alive.most:.2f}, trunk {told.trunk_bytes / kept[0]:.2f}")
    assert 0.6 < told.peak_bytes / alive.most < 2
    assert 0.9 < told.trunk_bytes / kept[0] < 1.1


@pytest.mark.parametrize(
    ("settings", "together"),
    [
        ({"curvature": "none"}, 1),
        ({"variant": "gs"}, 1),
        ({"curvature": "gauss_newton", "probes": 1}, 1),
        ({"estimator": "coded", "probes": 1}, 6),
        ({"estimator": "low_rank", "rank": 2, "probes": 1}, 4),
    ],
)
def test_targets_are_kept_together_only_where_they_share_something(
    settings: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def tracked(*arguments: Any) -> Any:
        nonlocal most
        found = run_adjoint(*arguments)
        alive.add(found)
        most = max(most, len(alive))
        return found

    ids = families.prompt_ids("llama", 9)
    config = HeatConfig(**settings)
    targets = [4, 6, 8, 10, 3, 5]
    attributor = Attributor(families.build("llama"), None, config)
    # Room for six adjoints; a target's three matrices of a low-rank approximation are half a one.
    room = 6 * attributor.attribute(ids, targets).metadata["trunk_bytes"]
    monkeypatch.setattr("heat_fast.curvature.targets_at_once", lambda each: max(1, room // each))
    monkeypatch.setattr("heat_fast.pipeline.run_adjoint", tracked)
    attributor.attribute(ids, targets)
    assert most == together


def test_estimate_of_a_longer_prompt_is_more() -> None:
    model = families.build("llama")
    short, long = (heat_fast.estimate(model, n, calibrate=False) for n in (8, 16))
    assert long.total_flops > 2 * short.total_flops
    assert 1.8 < long.trunk_bytes / short.trunk_bytes < 2  # the last block keeps one query row


@pytest.mark.parametrize(("tokens", "targets"), [(0, 1), (5, 0)])
def test_estimate_of_nothing_is_refused(tokens: int, targets: int) -> None:
    with pytest.raises(InputError, match="at least one of each"):
        heat_fast.estimate(families.build("llama"), tokens, targets)


@pytest.mark.parametrize("name", ["gptj", "gemma2"])
def test_a_streamed_vocabulary_changes_nothing(name: str) -> None:
    """With a head bias, with soft-caps; chunks that do not divide the vocabulary."""
    expected = attribute(name, [5, 6], probes=1)
    with (
        mock.patch("heat_fast.information.STREAMED_VOCABULARY", 0),
        mock.patch("heat_fast.information.VOCABULARY_CHUNK", 10),
    ):
        actual = attribute(name, [5, 6], probes=1)
    torch.testing.assert_close(actual.information, expected.information, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(actual.log_prob_drop, expected.log_prob_drop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("raised", [8.0, 14.0, 30.0])
def test_a_streamed_vocabulary_serves_certain_predictions(raised: float) -> None:
    """A token far above all others: masking lowers the normaliser by nats, or raises it."""
    model, ids = families.build("llama"), families.prompt_ids("llama", 12)
    entering: list[torch.Tensor] = []
    head: Any = model.lm_head
    handle = head.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
        handle.remove()
        last = entering[0][0, -1]
        above = logits.logsumexp(0) - logits[5] + raised
        head.weight[5] += above * last / (last @ last)
    settings: dict[str, Any] = {"curvature": "none"}
    expected = heat_fast.attribute(model, None, ids, 5, **settings)
    with mock.patch("heat_fast.information.STREAMED_VOCABULARY", 0):
        actual = heat_fast.attribute(model, None, ids, 5, **settings)
    torch.testing.assert_close(actual.information, expected.information, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(actual.log_prob_drop, expected.log_prob_drop, rtol=1e-3, atol=2e-5)

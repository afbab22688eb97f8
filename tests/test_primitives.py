"""Every rule of the decoder view in four readings, in float64, against double backward.

Each rule is compared with a plain formula of its own (or, for the block, with autograd through its
forward reading, which `test_decoder.py` holds against Hugging Face). Both sides are float64 and
differ in the order of operations alone: a relative error of 1e-12 is four thousand roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from assertions import assert_close
from heat_fast.decoder.attention import Attention, Rows
from heat_fast.decoder.block import Block
from heat_fast.decoder.head import Head
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Mlp
from heat_fast.decoder.norm import Identity, Norm
from heat_fast.decoder.projection import FusedProjection, SeparateProjection
from heat_fast.decoder.rotary import Rotary
from heat_fast.kernels.branch_attention import Masking, branch_attention, sink
from heat_fast.kernels.second_order_attention import (
    Primal,
    attention_adjoint,
    attention_adjoint_tangent,
    attention_tangent,
)
from oracles import Readings, double_backward, softmax_attention, softmax_weights

# Both implementations of everything that has two.
pytestmark = pytest.mark.usefixtures("kernels")

EXACT = 1e-12
PROBES = 3
ROWS = 5
WIDTH = 7

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu")


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    """Modules and draws below are float64; gradients are asked for where they are wanted."""
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)


def near(name: str, expected: Tensor, actual: Tensor) -> None:
    assert actual.dtype == torch.float64
    assert_close(name, expected, actual, rtol=EXACT, atol=1e-15)


class OddLinear(nn.Linear):
    """The same affine map as `nn.Linear`, in a class the view cannot look into."""


def conv1d(inputs: int, outputs: int) -> Conv1D:
    layer = Conv1D(outputs, inputs)
    layer.weight.copy_(torch.randn(inputs, outputs) / inputs**0.5)
    layer.bias.copy_(torch.randn(outputs))
    return layer


# --- norms --------------------------------------------------------------------------------------

NORMS = {
    "rms": {"centered": False, "weight": True, "bias": False},
    "rms_offset": {"centered": False, "weight": True, "bias": False, "weight_offset": 1.0},
    "rms_bare": {"centered": False, "weight": False, "bias": False},
    "layer": {"centered": True, "weight": True, "bias": True},
    "layer_unbiased": {"centered": True, "weight": True, "bias": False},
    "layer_bare": {"centered": True, "weight": False, "bias": False},
}


def make_norm(
    width: int, weight: bool = True, bias: bool = False, **settings: Any
) -> tuple[Norm, Callable[[Tensor], Tensor]]:
    """A norm with random parameters, and torch's own function for the same one."""
    eps = 1e-2  # large enough to matter
    scale = torch.randn(width) if weight else None
    shift = torch.randn(width) if bias else None
    norm = Norm(scale, shift, eps, **settings)
    full = None if scale is None else scale + settings.get("weight_offset", 0.0)
    if settings["centered"]:
        return norm, lambda x: functional.layer_norm(x, (width,), full, shift, eps)
    return norm, lambda x: functional.rms_norm(x, (width,), full, eps)


@pytest.mark.parametrize("late_cast", [False, True], ids=["early_cast", "late_cast"])
@pytest.mark.parametrize("kind", NORMS)
def test_norm(kind: str, late_cast: bool) -> None:
    norm, plain = make_norm(WIDTH, **NORMS[kind], late_cast=late_cast)
    x, y_bar = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    x_dot, y_bar_dot = torch.randn(PROBES, ROWS, WIDTH), torch.randn(PROBES, ROWS, WIDTH)
    expected = double_backward(plain, [x], [x_dot], y_bar, y_bar_dot)
    y, state = norm.forward(x)
    near("forward", expected.value, y)
    x_bar, bar = norm.adjoint(state, y_bar)
    near("adjoint", expected.adjoint[0], x_bar)
    near("tangent", expected.tangent, norm.tangent(state, x_dot))
    actual = norm.adjoint_tangent(state, x_dot, bar, y_bar_dot)
    near("adjoint_tangent", expected.adjoint_tangent[0], actual)


def test_identity_norm_changes_nothing() -> None:
    x, moved, y_bar, bar_moved = torch.randn(4, ROWS, WIDTH)
    norm = Identity()
    y, state = norm.forward(x)
    x_bar, bar = norm.adjoint(state, y_bar)
    assert y is x and x_bar is y_bar
    assert norm.tangent(state, moved) is moved
    assert norm.adjoint_tangent(state, moved, bar, bar_moved) is bar_moved


# --- rotary -------------------------------------------------------------------------------------


def make_rotary(
    positions: int, turned: int, interleaved: bool, scale: float = 1.3
) -> tuple[Rotary, Tensor]:
    """Tables of random angles, and the angles `[positions, turned / 2]`, one per pair."""
    angles = torch.randn(positions, turned // 2) * 3
    spread = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return Rotary(scale * spread.cos(), scale * spread.sin(), interleaved=interleaved), angles


@pytest.mark.parametrize("turned", [10, 6], ids=["whole", "partial"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_rotary_turns_pairs_in_the_complex_plane(interleaved: bool, turned: int) -> None:
    start, width = 2, 10
    rotary, angles = make_rotary(9, turned, interleaved)
    x = torch.randn(3, ROWS, width)
    part = x[..., :turned]
    if interleaved:
        pairs = part.unflatten(-1, (-1, 2))
    else:
        pairs = part.unflatten(-1, (2, -1)).transpose(-1, -2)
    spin = torch.polar(torch.tensor(1.3), angles[start : start + ROWS])
    spun = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * spin)
    spun = spun.flatten(-2) if interleaved else spun.transpose(-1, -2).flatten(-2)
    near("turn", torch.cat((spun, x[..., turned:]), -1), rotary.forward(x, start))

    # One row per unit vector: the adjoint's matrix is the transpose of the forward one's.
    unit = torch.eye(width)[:, None].expand(-1, ROWS, -1)
    matrix = rotary.forward(unit, start)
    near("adjoint", matrix.permute(2, 1, 0), rotary.adjoint(unit, start))


# --- affine maps --------------------------------------------------------------------------------

LINEARS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(7, 5),
    "plain_unbiased": lambda: nn.Linear(7, 5, bias=False),
    "conv1d": lambda: conv1d(7, 5),
    "opaque": lambda: OddLinear(7, 5),
    "opaque_unbiased": lambda: OddLinear(7, 5, bias=False),
}


@pytest.mark.parametrize("kind", LINEARS)
def test_linear(kind: str) -> None:
    module = LINEARS[kind]()
    linear = Linear(module)
    assert (linear.weight is None) == kind.startswith("opaque")
    x, y_bar = torch.randn(3, ROWS, 7), torch.randn(3, ROWS, 5)
    x_dot = torch.randn(PROBES, 3, ROWS, 7)
    expected = double_backward(module, [x], [x_dot], y_bar, torch.zeros(PROBES, 3, ROWS, 5))
    near("forward", expected.value, linear.forward(x))
    near("tangent", expected.tangent, linear.tangent(x_dot))
    near("adjoint", expected.adjoint[0], linear.adjoint(y_bar, 7))
    unit = torch.eye(7)
    near("matrix", (module(unit) - module(torch.zeros(1, 7))).T, linear.matrix(7, unit))
    assert all(parameter.grad is None for parameter in module.parameters())


# --- feed-forward layer -------------------------------------------------------------------------


def make_mlp(kind: str, activation: str, width: int = WIDTH, inner: int = 11) -> Mlp:
    act = ACT2FN[activation]
    down = Linear(nn.Linear(inner, width))
    if kind == "fused":
        return Mlp(Linear(nn.Linear(width, 2 * inner)), None, down, act, fused=True)
    up = Linear(OddLinear(width, inner)) if kind == "gated" else None
    return Mlp(Linear(nn.Linear(width, inner)), up, down, act)


def plain_mlp(mlp: Mlp, x: Tensor) -> Tensor:
    gate = mlp.gate.module(x)
    if mlp.fused:
        gate, up = gate[..., : gate.shape[-1] // 2], gate[..., gate.shape[-1] // 2 :]
    else:
        up = 1.0 if mlp.up is None else mlp.up.module(x)
    return mlp.down.module(mlp.activation(gate) * up)


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["gated", "plain", "fused"])
def test_mlp(kind: str, activation: str, keep: bool) -> None:
    mlp = make_mlp(kind, activation)
    x, y_bar = 2 * torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    x_dot, y_bar_dot = torch.randn(PROBES, ROWS, WIDTH), torch.randn(PROBES, ROWS, WIDTH)
    expected = double_backward(lambda x: plain_mlp(mlp, x), [x], [x_dot], y_bar, y_bar_dot)
    y, state = mlp.forward(x)
    if keep:
        state = mlp.with_derivatives(state)
    near("forward", expected.value, y)
    x_bar, hidden_bar = mlp.adjoint(state, y_bar, WIDTH)
    near("adjoint", expected.adjoint[0], x_bar)
    y_dot, tangent = mlp.tangent(state, x_dot)
    near("tangent", expected.tangent, y_dot)
    actual = mlp.adjoint_tangent(state, tangent, hidden_bar, y_bar_dot, WIDTH)
    near("adjoint_tangent", expected.adjoint_tangent[0], actual)


# --- softmax core -------------------------------------------------------------------------------

MASKINGS = {
    "full": Masking(0.7),
    "window": Masking(0.7, window=3),
    "softcap": Masking(0.7, softcap=1.5),
    "window_softcap": Masking(0.7, window=4, softcap=1.5),
}
CORE_ROWS = {
    "whole": Rows(0, 0, 9),
    "suffix": Rows(4, 4, 9),
    "few_queries": Rows(3, 7, 9),
    "one_query": Rows(0, 8, 9),
    "last_token": Rows(8, 8, 9),
}


def masking_settings(masking: Masking) -> tuple[float, int | None, float | None]:
    return masking.scale, masking.window, masking.softcap


@pytest.mark.parametrize("tile", [1, 1 << 20], ids=["head_by_head", "one_tile"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows", CORE_ROWS.values(), ids=CORE_ROWS)
@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
def test_attention_core(
    masking: Masking, rows: Rows, groups: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heat_fast.kernels.branch_attention.reference.TILE_ELEMENTS", tile)
    monkeypatch.setattr("heat_fast.kernels.branch_attention.reference.TILE_ROWS", 2)
    heads, size, start = 2, 5, rows.start
    query = torch.randn(heads, groups, rows.queries, size)
    key, value = torch.randn(2, heads, rows.stop, size)
    moved = [torch.randn(PROBES, *tensor.shape) for tensor in (query, key, value)]
    for tensor in moved[1:]:
        tensor[:, :, :start] = 0
    bar, bar_moved = torch.randn_like(query), torch.randn(PROBES, *query.shape)
    expected = double_backward(
        lambda q, k, v: softmax_attention(q, k, v, *masking_settings(masking)),
        [query, key, value],
        moved,
        bar,
        bar_moved,
    )
    output, normaliser = branch_attention(
        query[:, None], key[:, None], value[:, None], key[:, :0], value[:, :0], masking
    )
    near("forward", expected.value, output[:, 0])
    primal = Primal(query, key, value, normaliser[:, 0], output[:, 0], start, masking)
    for name, want, got in zip(
        "qkv", expected.adjoint, attention_adjoint(primal, bar), strict=True
    ):
        near(f"adjoint {name}", want, got)

    # Head-major: the directions come second.
    query_dot = moved[0].transpose(0, 1)
    key_dot, value_dot = (tensor[:, :, start:].transpose(0, 1) for tensor in moved[1:])
    output_dot = attention_tangent(primal, query_dot, key_dot, value_dot)
    near("tangent", expected.tangent, output_dot.transpose(0, 1))
    found = attention_adjoint_tangent(
        primal, query_dot, key_dot, value_dot, output_dot, bar, bar_moved.transpose(0, 1)
    )
    wanted = [expected.adjoint_tangent[0]]
    wanted += [part[:, :, start:] for part in expected.adjoint_tangent[1:]]
    for name, want, got in zip("qkv", wanted, found, strict=True):
        near(f"adjoint_tangent {name}", want, got.transpose(0, 1))


@pytest.mark.parametrize("kernels", ["native", "reference"], indirect=True)
@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
def test_attention_core_with_a_sink(masking: Masking, kernels: str) -> None:
    """A column of learned logits in the softmax, which has no value."""
    heads, group, rows, size = 2, 3, 7, 5
    query = torch.randn(heads, group, rows, size)
    key, value = torch.randn(2, heads, rows, size)
    logits = torch.randn(heads, group)
    moved = [torch.randn(PROBES, *tensor.shape) for tensor in (query, key, value)]
    bar, bar_moved = torch.randn_like(query), torch.randn(PROBES, *query.shape)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = softmax_weights(q, k, *masking_settings(masking), logits)
        return torch.einsum("hgqt,htd->hgqd", shares, v)

    expected = double_backward(attention, [query, key, value], moved, bar, bar_moved)
    core = branch_attention(
        query[:, None], key[:, None], value[:, None], key[:, :0], value[:, :0], masking
    )
    output, normaliser, sunk = (part[:, 0] for part in sink(*core, logits))
    near("forward", expected.value, output)
    primal = Primal(query, key, value, normaliser, output, 0, masking, sunk)
    for name, want, got in zip(
        "qkv", expected.adjoint, attention_adjoint(primal, bar), strict=True
    ):
        near(f"adjoint {name}", want, got)
    dotted = [tensor.transpose(0, 1) for tensor in moved]
    output_dot = attention_tangent(primal, *dotted)
    near("tangent", expected.tangent, output_dot.transpose(0, 1))
    found = attention_adjoint_tangent(primal, *dotted, output_dot, bar, bar_moved.transpose(0, 1))
    for name, want, got in zip("qkv", expected.adjoint_tangent, found, strict=True):
        near(f"adjoint_tangent {name}", want, got.transpose(0, 1))


# --- head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_kind", ["rms_offset", "layer", "none"])
@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
def test_head(softcap: float | None, bias: bool, norm_kind: str) -> None:
    vocabulary, target = 13, 4
    norm: Norm | Identity = Identity()
    plain_norm: Callable[[Tensor], Tensor] = torch.Tensor.clone
    if norm_kind != "none":
        norm, plain_norm = make_norm(WIDTH, **NORMS[norm_kind])
    projection = nn.Linear(WIDTH, vocabulary, bias=bias)
    head = Head(norm, Linear(projection), softcap)

    def logits(x: Tensor) -> Tensor:
        raw = projection(plain_norm(x))
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    x, logits_bar = torch.randn(1, WIDTH), torch.randn(1, vocabulary)
    x_dot = torch.randn(PROBES, 1, WIDTH)
    expected = double_backward(logits, [x], [x_dot], logits_bar, torch.randn(PROBES, 1, vocabulary))
    near("logits", expected.value, head.logits(x))
    near("adjoint", expected.adjoint[0], head.adjoint(x, logits_bar))

    log_prob = double_backward(
        lambda x: logits(x).log_softmax(-1)[:, target],
        [x],
        [x_dot],
        torch.ones(1),
        torch.zeros(PROBES, 1),
    )
    # Few probes go through the vocabulary one by one, many through its d x d curvature.
    for probes in (1, WIDTH):
        x_bar, bar = head.gradient(x, target, probes)
        assert (bar.curvature is None) == (probes == 1)
        near("gradient", log_prob.adjoint[0], x_bar)
        near("adjoint_tangent", log_prob.adjoint_tangent[0], head.adjoint_tangent(bar, x_dot))


# --- block --------------------------------------------------------------------------------------

LENGTH = 9
HEADS, KEY_HEADS, HEAD_SIZE, MODEL = 4, 2, 6, 15

# Rows of the trunk, of the tangents, and of the target (whose adjoint starts at 0).
BLOCK_ROWS = {
    "whole": (Rows(0, 0, 9), Rows(0, 0, 9), Rows(0, 0, 9)),
    "suffix": (Rows(0, 0, 9), Rows(4, 4, 9), Rows(4, 4, 9)),
    "earlier_target": (Rows(0, 0, 9), Rows(4, 4, 9), Rows(4, 4, 7)),
    "last_block": (Rows(0, 6, 9), Rows(3, 6, 9), Rows(3, 7, 8)),
    "last_block_last_token": (Rows(0, 8, 9), Rows(8, 8, 9), Rows(8, 8, 9)),
}


def separate_projection(key_heads: int) -> SeparateProjection:
    sizes = (HEADS, key_heads, key_heads)
    return SeparateProjection(
        *(Linear(nn.Linear(MODEL, count * HEAD_SIZE)) for count in sizes), HEAD_SIZE
    )


def fused_projection(key_heads: int, interleaved: bool) -> FusedProjection:
    linear = Linear(conv1d(MODEL, (HEADS + 2 * key_heads) * HEAD_SIZE))
    return FusedProjection(linear, HEADS, key_heads, HEAD_SIZE, interleaved=interleaved)


def block_norm(kind: str = "rms", width: int = MODEL) -> Norm:
    return make_norm(width, **NORMS[kind])[0]


def make_block(kind: str) -> Block:
    """A block of each arrangement the families use, with parts the others do not share."""
    grouped = kind not in ("parallel", "parallel_shared_norm")
    key_heads = KEY_HEADS if grouped else HEADS
    rotary, _ = make_rotary(LENGTH, 4 if kind == "parallel" else HEAD_SIZE, kind == "sequential")
    normed = {"query_norm": block_norm(width=HEAD_SIZE), "key_norm": block_norm(width=HEAD_SIZE)}
    projection: Any = separate_projection(key_heads)
    if kind in ("parallel", "fused"):
        projection = fused_projection(key_heads, interleaved=kind == "parallel")
    attention = Attention(
        projection,
        Linear(nn.Linear(HEADS * HEAD_SIZE, MODEL)),
        None if kind == "fused" else rotary,
        Masking(0.6, window=4 if kind == "windowed" else None),
        groups=HEADS // key_heads,
        **(normed if kind in ("head_norms", "everything") else {}),
    )
    post = kind in ("post_norms", "everything")
    norm = block_norm("layer" if kind.startswith("parallel") else "rms_offset")
    return Block(
        norm,
        attention,
        norm if kind == "parallel_shared_norm" else block_norm("layer_unbiased"),
        make_mlp("plain" if kind.startswith("parallel") else "gated", "gelu_new", MODEL),
        parallel=kind.startswith("parallel"),
        post_attention=block_norm() if post else None,
        post_mlp=block_norm() if post else None,
    )


BLOCKS = (
    "sequential",
    "windowed",
    "fused",
    "head_norms",
    "post_norms",
    "everything",
    "parallel",
    "parallel_shared_norm",
)


def block_oracle(
    block: Block, x: Tensor, x_dot: Tensor, bar: Tensor, bar_dot: Tensor, target: Rows
) -> Readings:
    rows = Rows(0, target.first_query, target.stop)
    return double_backward(
        lambda x: block.forward(x[None], rows)[0][0], [x[: target.stop]], [x_dot], bar, bar_dot
    )


@pytest.mark.parametrize("rows", BLOCK_ROWS.values(), ids=BLOCK_ROWS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_block(kind: str, rows: tuple[Rows, Rows, Rows]) -> None:
    block = make_block(kind)
    trunk_rows, tangent_rows, target_rows = rows
    start, stop = target_rows.start, target_rows.stop
    # The target's adjoint has rows from 0 on (in the last block, the target's row alone).
    last_block = trunk_rows.first_query > 0
    first = target_rows.first_query if last_block else 0
    adjoint_rows = Rows(0, first, stop)

    x = torch.randn(LENGTH, MODEL)
    x_dot = torch.zeros(PROBES, LENGTH, MODEL)
    x_dot[:, start:] = torch.randn(PROBES, LENGTH - start, MODEL)
    bar = torch.randn(stop - first, MODEL)
    bar_dot = torch.zeros(PROBES, stop - first, MODEL)
    bar_dot[:, -target_rows.queries :] = torch.randn(PROBES, target_rows.queries, MODEL)

    y, state = block.forward(x[None], trunk_rows)
    state = block.with_derivatives(state)
    x_bar, adjoint = block.adjoint(state, bar, adjoint_rows)
    y_dot, tangent = block.tangent(state, x_dot[:, start:], tangent_rows)
    x_bar_dot = block.adjoint_tangent(
        state, tangent, adjoint, bar_dot[:, -target_rows.queries :], target_rows
    )

    expected = block_oracle(block, x, x_dot[:, :stop], bar, bar_dot, adjoint_rows)
    near("adjoint", expected.adjoint[0], x_bar)
    near("adjoint_tangent", expected.adjoint_tangent[0][:, start:], x_bar_dot)

    queries = tangent_rows.queries
    zeros = torch.zeros(LENGTH - trunk_rows.first_query, MODEL)
    expected = block_oracle(block, x, x_dot, zeros, zeros.expand(PROBES, -1, -1), trunk_rows)
    near("forward", expected.value, y[0])
    near("tangent", expected.tangent[:, -queries:], y_dot)


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_forward_from_a_prefix(kind: str) -> None:
    """Rows from `start` on, against the trunk's keys and values below, are the whole run's rows."""
    block = make_block(kind)
    start, rows = 4, Rows(0, 0, LENGTH)
    x = torch.randn(3, LENGTH, MODEL)
    x[:, :start] = x[0, :start]
    _, state = block.forward(x[:1], rows)
    suffix, _ = block.forward(x[:, start:], Rows(start, start, LENGTH), state)
    few, _ = block.forward(x[:, start:], Rows(start, LENGTH - 2, LENGTH), state)
    for index in range(len(x)):
        whole, _ = block.forward(x[index : index + 1], rows)
        near(f"suffix {index}", whole[0, start:], suffix[index])
        near(f"last rows {index}", whole[0, -2:], few[index])

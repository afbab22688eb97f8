"""What several families share: norms, projections, the head, rotary tables, learned positions."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heat_fast.decoder.head import Head
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Mlp
from heat_fast.decoder.norm import AnyNorm, Norm, NormOfHeads
from heat_fast.decoder.projection import SeparateProjection
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import module_device
from heat_fast.errors import UnsupportedModelError


def text_part(model: Any) -> tuple[Any, Any]:
    """The body of a causal language model, or of the text part of one that reads images too, and
    its config."""
    body = model.model
    return getattr(body, "language_model", body), model.config.get_text_config()


def rms_norm(
    module: Any, *, weight_offset: float = 0.0, late_cast: bool = False, scale: float = 1.0
) -> Norm:
    """An RMSNorm, times `scale`; Gemma's stores `w - 1`.

    With `late_cast` it is multiplied while in float32.
    """
    norm, eps = _tuned(module)
    weight = norm.weight if scale == 1.0 else norm.weight * scale
    return Norm(weight, None, eps, centered=False, weight_offset=weight_offset, late_cast=late_cast)


def rms_norm_of_heads(module: Any, *, late_cast: bool = False) -> NormOfHeads:
    """An RMSNorm over all heads of a row at once."""
    norm, eps = _tuned(module)
    return NormOfHeads(norm.weight, None, eps, centered=False, late_cast=late_cast)


def layer_norm(module: Any, scale: float = 1.0, *, weight_offset: float = 0.0) -> Norm:
    """A LayerNorm, with or without weight and bias, times `scale`.

    Nemotron's stores `w - 1`, and adds 1 in the model's dtype.
    """
    norm, eps = _tuned(module)
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if weight_offset:
        weight = weight + weight_offset
    if scale != 1.0:
        weight, bias = weight * scale, None if bias is None else bias * scale
    return Norm(weight, bias, eps, centered=True, late_cast=True)


def norm_weight(module: Any) -> Tensor:
    """The weight of a norm, which has the dtype and device of what the norm is applied to."""
    weight: Tensor = _tuned(module)[0].weight
    return weight


def _tuned(module: Any) -> tuple[Any, float]:
    """The norm that a module computes with, and its epsilon.

    PEFT's LN tuning puts a layer in the norm's place that calls one of several: the model's own, or
    the active adapter's copy of it. Merging swaps the two. Its own weight is always the former's.
    """
    norm = module
    while hasattr(norm, "ln_tuning_layers"):
        active = [] if norm.merged or norm.disable_adapters else list(norm.active_adapters)
        if len(active) > 1 or not set(active) <= set(norm.ln_tuning_layers):
            raise UnsupportedModelError(
                f"a {type(norm).__name__} in place of a norm has the active adapters {active}, of "
                f"its own {list(norm.ln_tuning_layers)}: expected one of these at most. Activate "
                "one with set_adapter(...), or merge it into the model with merge_and_unload()."
            )
        norm = norm.ln_tuning_layers[active[0]] if active else norm.base_layer
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if eps is None or not hasattr(norm, "weight"):
        raise UnsupportedModelError(
            f"a {type(norm).__name__} in place of a norm has no weight or no epsilon: expected a "
            "norm, whose derivatives are written out. If it is an adapter, merge it into the model "
            "(PEFT: merge_and_unload()); else put the norm back."
        )
    return norm, float(eps)


def separate_projection(attention: Any) -> SeparateProjection:
    """The layers `q_proj`, `k_proj` and `v_proj`."""
    query, key, value = (
        Linear(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return SeparateProjection(query, key, value, attention.head_dim)


def gated_mlp(mlp: Any) -> Mlp:
    """The layers `gate_proj`, `up_proj` and `down_proj`."""
    return Mlp(Linear(mlp.gate_proj), Linear(mlp.up_proj), Linear(mlp.down_proj), mlp.act_fn)


def plain_mlp(mlp: Any) -> Mlp:
    """The layers `up_proj` and `down_proj`, with an activation between them."""
    return Mlp(Linear(mlp.up_proj), None, Linear(mlp.down_proj), mlp.act_fn)


def fused_mlp(mlp: Any) -> Mlp:
    """The layers `gate_up_proj`, gate first, and `down_proj`."""
    layers = Linear(mlp.gate_up_proj), None, Linear(mlp.down_proj)
    return Mlp(*layers, mlp.activation_fn, fused=True)


def head(norm: AnyNorm, projection: nn.Module, softcap: float | None = None) -> Head:
    """The final norm and the vocabulary projection, where the latter computes."""
    return Head(norm, Linear(projection), softcap, device=module_device(projection))


def rotary_tables(
    module: nn.Module,
    like: Tensor,
    length: int,
    *layer_type: str,
    interleaved: bool = False,
    columns: Literal["halves", "neighbours", "pairs"] = "halves",
) -> Rotary:
    """The model's own rotary tables for positions `0..length-1`.

    `columns`: where a pair has its two columns in the module's tables, or that it has one.
    The module is copied first: scaled variants store frequencies for the last length seen.
    """
    positions = torch.arange(length, device=like.device)[None]

    def lay(table: Tensor) -> Tensor:
        width = table.shape[-1]
        pairs = {"halves": table[..., : width // 2], "neighbours": table[..., ::2], "pairs": table}
        column = pairs[columns]
        return column.repeat_interleave(2, -1) if interleaved else torch.cat((column, column), -1)

    tables = copy.deepcopy(module)(like.detach()[None, :1], positions, *layer_type)
    if isinstance(tables, Tensor):  # complex numbers (DeepSeek-V2)
        tables = tables.real, tables.imag
    cos, sin = (lay(each[0]) for each in tables)
    return Rotary(cos, sin, interleaved=interleaved)


def learned_positions(table: nn.Module, length: int, offset: int = 0) -> Tensor:
    """Rows `offset..offset+length-1` of a learned position embedding, `[length, d]`."""
    weight = table.weight
    assert isinstance(weight, Tensor)
    index = torch.arange(offset, offset + length, device=weight.device)
    return nn.functional.embedding(index, weight.detach())

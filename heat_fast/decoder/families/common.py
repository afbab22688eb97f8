"""What several families share: norms, rotary tables and learned positions from their modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast.decoder.norm import Norm
from heat_fast.decoder.rotary import Rotary


def rms_norm(module: Any, *, weight_offset: float = 0.0) -> Norm:
    """An RMSNorm; Gemma's stores `w - 1` and multiplies before it leaves float32."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(
        module.weight,
        None,
        float(eps),
        centered=False,
        weight_offset=weight_offset,
        late_cast=weight_offset != 0.0,
    )


def layer_norm(module: Any) -> Norm:
    """A LayerNorm, with or without weight and bias."""
    return Norm(module.weight, module.bias, float(module.eps), centered=True, late_cast=True)


def rotary_tables(module: nn.Module, like: Tensor, length: int, *layer_type: str) -> Rotary:
    """The model's own rotary tables for positions `0..length-1`.

    The module is copied first: scaled variants store frequencies for the last length seen.
    """
    positions = torch.arange(length, device=like.device)[None]
    cos, sin = copy.deepcopy(module)(like[None, :1], positions, *layer_type)
    return Rotary(cos[0], sin[0])


def learned_positions(table: nn.Module, length: int, offset: int = 0) -> Tensor:
    """Rows `offset..offset+length-1` of a learned position embedding, `[length, d]`."""
    weight = table.weight
    assert isinstance(weight, Tensor)
    index = torch.arange(offset, offset + length, device=weight.device)
    return nn.functional.embedding(index, weight.detach())

"""Nemotron and Minitron: LayerNorms that store `w - 1`, partial rotary, squared ReLU, no gate."""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import (
    head,
    layer_norm,
    norm_weight,
    plain_mlp,
    rotary_tables,
    separate_projection,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import Norm
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("NemotronForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a Nemotron model."""
    causal: Any = model
    body, config = causal.model, causal.config
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length)
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary) for layer in layers),
        head=head(_norm(body.norm), causal.lm_head),
        positions=None,
    )


def _norm(module: Any) -> Norm:
    return layer_norm(module, weight_offset=1.0)


def _block(layer: Any, rotary: Rotary) -> Block:
    attention = layer.self_attn
    return Block(
        norm=_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.head_dim**-0.5),
            groups=attention.num_key_value_groups,
        ),
        mlp_norm=_norm(layer.post_attention_layernorm),
        mlp=plain_mlp(layer.mlp),
        device=module_device(layer),
    )

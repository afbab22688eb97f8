"""Phi-1, Phi-1.5 and Phi-2: attention and MLP in parallel on one norm, partial rotary, biases."""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import (
    head,
    layer_norm,
    norm_weight,
    rotary_tables,
    separate_projection,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Mlp
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("PhiForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a Phi model of the first three generations."""
    causal: Any = model
    body = causal.model
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.final_layernorm), length)
    layers = body.layers[: causal.config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary) for layer in layers),
        head=head(layer_norm(body.final_layernorm), causal.lm_head),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary) -> Block:
    attention = layer.self_attn
    norm = layer_norm(layer.input_layernorm)
    normed = attention.qk_layernorm
    return Block(
        norm=norm,
        attention=Attention(
            separate_projection(attention),
            Linear(attention.dense),
            rotary,
            Masking(attention.scaling),
            groups=attention.num_key_value_groups,
            query_norm=layer_norm(attention.q_layernorm) if normed else None,
            key_norm=layer_norm(attention.k_layernorm) if normed else None,
        ),
        mlp_norm=norm,
        mlp=Mlp(Linear(layer.mlp.fc1), None, Linear(layer.mlp.fc2), layer.mlp.activation_fn),
        parallel=True,
        device=module_device(layer),
    )

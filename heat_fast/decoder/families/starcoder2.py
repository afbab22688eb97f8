"""StarCoder 2: LayerNorm, rotary halves, grouped queries, an ungated MLP, windows, biases."""

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


@family("Starcoder2ForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a StarCoder 2 model."""
    causal: Any = model
    body, config = causal.model, causal.config
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length)
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary, config.sliding_window) for layer in layers),
        head=head(layer_norm(body.norm), causal.lm_head),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary, window: int | None) -> Block:
    attention = layer.self_attn
    return Block(
        norm=layer_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling, window),
            groups=attention.num_key_value_groups,
        ),
        mlp_norm=layer_norm(layer.post_attention_layernorm),
        mlp=Mlp(Linear(layer.mlp.c_fc), None, Linear(layer.mlp.c_proj), layer.mlp.act),
        device=module_device(layer),
    )

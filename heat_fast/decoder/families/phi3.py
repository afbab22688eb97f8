"""Phi-3 and Phi-4: as Llama, with fused qkv and gate-up layers, partial and long-context rotary."""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import (
    fused_mlp,
    head,
    norm_weight,
    rms_norm,
    rotary_tables,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.projection import FusedProjection
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("Phi3ForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a Phi-3 model."""
    causal: Any = model
    body, config = causal.model, causal.config
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length)
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary, config) for layer in layers),
        head=head(rms_norm(body.norm), causal.lm_head),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary, config: Any) -> Block:
    attention = layer.self_attn
    return Block(
        norm=rms_norm(layer.input_layernorm),
        attention=Attention(
            FusedProjection(
                Linear(attention.qkv_proj),
                config.num_attention_heads,
                config.num_key_value_heads,
                attention.head_dim,
                interleaved=False,
            ),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling, config.sliding_window),
            groups=attention.num_key_value_groups,
        ),
        mlp_norm=rms_norm(layer.post_attention_layernorm),
        mlp=fused_mlp(layer.mlp),
        device=module_device(layer),
    )

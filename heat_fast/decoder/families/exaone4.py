"""EXAONE 4: norms after the layers alone and on every query and key head.

Where windowed layers are mixed with full ones, the full ones know no positions.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import (
    gated_mlp,
    head,
    norm_weight,
    rms_norm,
    rotary_tables,
    separate_projection,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import Identity
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("Exaone4ForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View an EXAONE 4 model."""
    causal: Any = model
    body, config = causal.model, causal.config
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length)
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary) for layer in layers),
        head=head(rms_norm(body.norm), causal.lm_head),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary) -> Block:
    attention = layer.self_attn
    mixed = attention.sliding_window is not None
    windowed = mixed and attention.is_sliding
    return Block(
        norm=Identity(),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary if windowed or not mixed else None,
            Masking(attention.scaling, attention.sliding_window if windowed else None),
            groups=attention.num_key_value_groups,
            query_norm=rms_norm(attention.q_norm),
            key_norm=rms_norm(attention.k_norm),
        ),
        mlp_norm=Identity(),
        mlp=gated_mlp(layer.mlp),
        post_attention=rms_norm(layer.post_attention_layernorm),
        post_mlp=rms_norm(layer.post_feedforward_layernorm),
        device=module_device(layer),
    )

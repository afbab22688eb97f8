"""Granite 3 (dense): as Llama, with a factor on embeddings, layers, scores and logits."""

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
from heat_fast.decoder.norm import Factor
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("GraniteForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a Granite model."""
    causal: Any = model
    body, config = causal.model, causal.config
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length)
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary) for layer in layers),
        # The logits' factor is the norm's: s W n(x) = W (s n(x)).
        head=head(rms_norm(body.norm, scale=1 / config.logits_scaling), causal.lm_head),
        positions=None,
        embedding_scale=body.embedding_multiplier,
    )


def _block(layer: Any, rotary: Rotary) -> Block:
    attention = layer.self_attn
    factor = Factor(layer.residual_multiplier)
    return Block(
        norm=rms_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling),
            groups=attention.num_key_value_groups,
        ),
        mlp_norm=rms_norm(layer.post_attention_layernorm),
        mlp=gated_mlp(layer.mlp),
        post_attention=factor,
        post_mlp=factor,
        device=module_device(layer),
    )

"""GPT-2: LayerNorm, learned positions, one transposed layer for query, key and value."""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import head, layer_norm, learned_positions
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Mlp
from heat_fast.decoder.projection import FusedProjection
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.branch_attention import Masking


@family("GPT2LMHeadModel")
def build(model: nn.Module, length: int) -> Decoder:
    """View a GPT-2 model."""
    causal: Any = model
    body = causal.transformer
    if causal.config.add_cross_attention:
        raise UnsupportedModelError(
            "this GPT-2 has cross-attention to an encoder; only decoder-only models can be "
            "attributed. Use a config with add_cross_attention=False."
        )
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer) for layer in body.h),
        head=head(layer_norm(body.ln_f), causal.lm_head),
        positions=learned_positions(body.wpe, length),
    )


def _block(layer: Any) -> Block:
    attention = layer.attn
    heads, head_dim = attention.num_heads, attention.head_dim
    scale = head_dim**-0.5 if attention.scale_attn_weights else 1.0
    if attention.scale_attn_by_inverse_layer_idx:
        scale /= float(attention.layer_idx + 1)
    return Block(
        norm=layer_norm(layer.ln_1),
        attention=Attention(
            FusedProjection(Linear(attention.c_attn), heads, heads, head_dim, interleaved=False),
            Linear(attention.c_proj),
            None,
            Masking(scale),
            groups=1,
        ),
        mlp_norm=layer_norm(layer.ln_2),
        mlp=Mlp(Linear(layer.mlp.c_fc), None, Linear(layer.mlp.c_proj), layer.mlp.act),
        device=module_device(layer),
    )

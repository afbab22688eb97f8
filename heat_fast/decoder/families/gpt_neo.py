"""GPT-Neo: learned positions, unscaled attention, every other layer a local window."""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import (
    head,
    layer_norm,
    learned_positions,
    separate_projection,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Mlp
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("GPTNeoForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a GPT-Neo model."""
    causal: Any = model
    body = causal.transformer
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, causal.config) for layer in body.h),
        head=head(layer_norm(body.ln_f), causal.lm_head),
        positions=learned_positions(body.wpe, length),
    )


def _block(layer: Any, config: Any) -> Block:
    attention = layer.attn.attention
    window = config.window_size if layer.attn.attention_type == "local" else None
    return Block(
        norm=layer_norm(layer.ln_1),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.out_proj),
            None,
            Masking(1.0, window),
            groups=1,
        ),
        mlp_norm=layer_norm(layer.ln_2),
        mlp=Mlp(Linear(layer.mlp.c_fc), None, Linear(layer.mlp.c_proj), layer.mlp.act),
        device=module_device(layer),
    )

"""GPT-J: attention and MLP in parallel on one norm, interleaved partial rotary, biased head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import head, layer_norm, norm_weight, separate_projection
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Mlp
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("GPTJForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a GPT-J model."""
    causal: Any = model
    body = causal.transformer
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, length, norm_weight(body.ln_f).dtype) for layer in body.h),
        head=head(layer_norm(body.ln_f), causal.lm_head),
        positions=None,
    )


def _block(layer: Any, length: int, dtype: torch.dtype) -> Block:
    attention = layer.attn
    # Each row of the table is [sines | cosines] of the pairs; every pair turns two neighbours.
    sin, cos = attention.embed_positions[:length].to(dtype).chunk(2, dim=-1)
    rotary = Rotary(cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), interleaved=True)
    norm = layer_norm(layer.ln_1)
    return Block(
        norm=norm,
        attention=Attention(
            separate_projection(attention),
            Linear(attention.out_proj),
            rotary,
            Masking(attention.head_dim**-0.5),
            groups=1,
        ),
        mlp_norm=norm,
        mlp=Mlp(Linear(layer.mlp.fc_in), None, Linear(layer.mlp.fc_out), layer.mlp.act),
        parallel=True,
        device=module_device(layer),
    )

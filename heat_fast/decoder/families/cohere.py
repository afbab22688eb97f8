"""Command R: attention and MLP in parallel on one norm, interleaved rotary, scaled logits.

Command R7B and A (Cohere 2) mix windowed layers with full ones, which know no positions.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import (
    gated_mlp,
    head,
    layer_norm,
    norm_weight,
    rotary_tables,
    separate_projection,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.branch_attention import Masking


@family("CohereForCausalLM", "Cohere2ForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a Cohere model."""
    causal: Any = model
    body, config = causal.model, causal.config
    if getattr(config, "use_qk_norm", False):
        raise UnsupportedModelError(
            "this Cohere model has a norm of its own for every query and key head "
            "(use_qk_norm=True, as Command R+): expected none. Use Command R, R7B or A."
        )
    like = norm_weight(body.norm)
    rotary = rotary_tables(body.rotary_emb, like, length, interleaved=True, columns="neighbours")
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary, config.model_type) for layer in layers),
        # The logits' factor is the norm's: W (s n(x)) = s W n(x).
        head=head(layer_norm(body.norm, config.logit_scale), causal.lm_head),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary, kind: str) -> Block:
    attention = layer.self_attn
    norm = layer_norm(layer.input_layernorm)
    window = getattr(attention, "sliding_window", None)
    return Block(
        norm=norm,
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary if kind == "cohere" or window is not None else None,
            Masking(attention.scaling, window),
            groups=attention.num_key_value_groups,
        ),
        mlp_norm=norm,
        mlp=gated_mlp(layer.mlp),
        parallel=True,
        device=module_device(layer),
    )

"""GLM-4: as Llama, with interleaved partial rotary, a fused gate-up layer, and in its later version
norms after the layers too."""

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
    separate_projection,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("GlmForCausalLM", "Glm4ForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a GLM-4 model."""
    causal: Any = model
    body, config = causal.model, causal.config
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length, interleaved=True)
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
    after = hasattr(layer, "post_self_attn_layernorm")
    return Block(
        norm=rms_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling),
            groups=attention.num_key_value_groups,
        ),
        # As in Llama, the name tells of the place before the MLP.
        mlp_norm=rms_norm(layer.post_attention_layernorm),
        mlp=fused_mlp(layer.mlp),
        post_attention=rms_norm(layer.post_self_attn_layernorm) if after else None,
        post_mlp=rms_norm(layer.post_mlp_layernorm) if after else None,
        device=module_device(layer),
    )

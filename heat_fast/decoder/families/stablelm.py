"""StableLM: LayerNorm, partial rotary, gated MLP, parallel or sequential residual."""

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


@family("StableLmForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a StableLM model."""
    causal: Any = model
    body, config = causal.model, causal.config
    if config.qk_layernorm:
        raise UnsupportedModelError(
            "this StableLM has a norm of its own for every query and key head (qk_layernorm=True): "
            "expected heads that share one, or none. StableLM 2 1.6B and the 3B models have none."
        )
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length)
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary) for layer in layers),
        head=head(layer_norm(body.norm), causal.lm_head),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary) -> Block:
    attention = layer.self_attn
    norm = layer_norm(layer.input_layernorm)
    parallel = layer.use_parallel_residual
    return Block(
        norm=norm,
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling),
            groups=attention.num_key_value_groups,
        ),
        mlp_norm=norm if parallel else layer_norm(layer.post_attention_layernorm),
        mlp=gated_mlp(layer.mlp),
        parallel=parallel,
        device=module_device(layer),
    )

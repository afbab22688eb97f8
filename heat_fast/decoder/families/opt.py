"""OPT: LayerNorm, learned positions that start at row 2, plain MLP."""

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
from heat_fast.decoder.norm import Identity
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.branch_attention import Masking


@family("OPTForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View an OPT model; the 350M one (norms after the layers, projected embeddings) has none."""
    causal: Any = model
    body, config = causal.model.decoder, causal.config
    if not config.do_layer_norm_before or body.project_in is not None:
        raise UnsupportedModelError(
            "this OPT normalises after its layers or projects its embeddings (as opt-350m does); "
            "only OPT models with do_layer_norm_before=True and word_embed_proj_dim == "
            "hidden_size are supported. Use another OPT size."
        )
    final = body.final_layer_norm
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer) for layer in body.layers),
        head=head(Identity() if final is None else layer_norm(final), causal.lm_head),
        positions=learned_positions(body.embed_positions, length, body.embed_positions.offset),
    )


def _block(layer: Any) -> Block:
    attention = layer.self_attn
    return Block(
        norm=layer_norm(layer.self_attn_layer_norm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.out_proj),
            None,
            Masking(attention.scaling),
            groups=1,
        ),
        mlp_norm=layer_norm(layer.final_layer_norm),
        mlp=Mlp(Linear(layer.fc1), None, Linear(layer.fc2), layer.activation_fn),
        device=module_device(layer),
    )

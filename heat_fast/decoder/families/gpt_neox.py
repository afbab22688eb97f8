"""GPT-NeoX and Pythia: fused per-head qkv, partial rotary, parallel or sequential residual."""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import head, layer_norm, norm_weight, rotary_tables
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Mlp
from heat_fast.decoder.projection import FusedProjection
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("GPTNeoXForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a GPT-NeoX model."""
    causal: Any = model
    body = causal.gpt_neox
    unembedding = causal.get_output_embeddings()  # its attribute's name varies with the version
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.final_layer_norm), length)
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary, causal.config) for layer in body.layers),
        head=head(layer_norm(body.final_layer_norm), unembedding),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary, config: Any) -> Block:
    attention = layer.attention
    heads = config.num_attention_heads
    return Block(
        norm=layer_norm(layer.input_layernorm),
        attention=Attention(
            FusedProjection(
                Linear(attention.query_key_value),
                heads,
                heads,
                attention.head_size,
                interleaved=True,
            ),
            Linear(attention.dense),
            rotary,
            Masking(attention.scaling),
            groups=1,
        ),
        mlp_norm=layer_norm(layer.post_attention_layernorm),
        mlp=Mlp(
            Linear(layer.mlp.dense_h_to_4h), None, Linear(layer.mlp.dense_4h_to_h), layer.mlp.act
        ),
        parallel=layer.use_parallel_residual,
        device=module_device(layer),
    )

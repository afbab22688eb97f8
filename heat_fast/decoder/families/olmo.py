"""OLMo 2 and 3: norms after the layers alone, and one over all query or all key heads of a row."""

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
    rms_norm_of_heads,
    rotary_tables,
    separate_projection,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import Identity, Norm
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("Olmo2ForCausalLM", "Olmo3ForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View an OLMo model of the second or third generation."""
    causal: Any = model
    body, config = causal.model, causal.config
    layers = body.layers[: config.num_hidden_layers]
    # OLMo 3 mixes windowed and full layers; transformers' later versions give each kind a table.
    several = hasattr(body.rotary_emb, "layer_types")
    kinds = config.layer_types if several else [None] * len(layers)
    like = norm_weight(body.norm)
    tables = {
        kind: rotary_tables(body.rotary_emb, like, length, *([kind] if kind else []))
        for kind in dict.fromkeys(kinds)
    }
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(
            _block(layer, tables[kind]) for layer, kind in zip(layers, kinds, strict=False)
        ),
        head=head(_norm(body.norm), causal.lm_head),
        positions=None,
    )


def _norm(module: Any) -> Norm:
    return rms_norm(module, late_cast=True)


def _block(layer: Any, rotary: Rotary) -> Block:
    attention = layer.self_attn
    return Block(
        norm=Identity(),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling, getattr(attention, "sliding_window", None)),
            groups=attention.num_key_value_groups,
            query_norm=rms_norm_of_heads(attention.q_norm, late_cast=True),
            key_norm=rms_norm_of_heads(attention.k_norm, late_cast=True),
        ),
        mlp_norm=Identity(),
        mlp=gated_mlp(layer.mlp),
        post_attention=_norm(layer.post_attention_layernorm),
        post_mlp=_norm(layer.post_feedforward_layernorm),
        device=module_device(layer),
    )

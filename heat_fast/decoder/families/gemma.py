"""Gemma 2 and Gemma 3 (text): norms before and after each layer, windows, soft-caps, head norms.

Gemma 2 caps attention scores and logits; Gemma 3 norms its query and key heads instead and turns
local and global layers by different angles.
"""

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
    text_part,
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import Norm
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.branch_attention import Masking


@family("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
def build(model: nn.Module, length: int) -> Decoder:
    """View a Gemma 2 or Gemma 3 model, of one that reads images its text part."""
    causal: Any = model
    body, config = text_part(causal)
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(
            "this Gemma attends in both directions; attribution needs a causal model. "
            "Use a config with use_bidirectional_attention=False."
        )
    if not hasattr(body.embed_tokens, "embed_scale"):
        raise UnsupportedModelError(
            "this transformers version scales Gemma's embeddings inside the model; a version whose "
            "embedding layer scales its own output is needed. Upgrade transformers."
        )
    like = norm_weight(body.norm)
    if config.model_type == "gemma2":
        tables = dict.fromkeys(config.layer_types, rotary_tables(body.rotary_emb, like, length))
    else:
        tables = {
            kind: rotary_tables(body.rotary_emb, like, length, kind)
            for kind in set(config.layer_types)
        }
    layers = body.layers[: config.num_hidden_layers]
    kinds = config.layer_types
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(
            _block(layer, tables[kind], config) for layer, kind in zip(layers, kinds, strict=False)
        ),
        head=head(_norm(body.norm), causal.lm_head, softcap=config.final_logit_softcapping),
        positions=None,
    )


def _norm(module: Any) -> Norm:
    return rms_norm(module, weight_offset=1.0, late_cast=True)


def _block(layer: Any, rotary: Rotary, config: Any) -> Block:
    attention = layer.self_attn
    capped = config.model_type == "gemma2"
    softcap = attention.attn_logit_softcapping if capped else None
    return Block(
        norm=_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            # Gemma 3 has the setting but never applies it.
            Masking(attention.scaling, attention.sliding_window, softcap),
            groups=attention.num_key_value_groups,
            query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        ),
        mlp_norm=_norm(layer.pre_feedforward_layernorm),
        mlp=gated_mlp(layer.mlp),
        post_attention=_norm(layer.post_attention_layernorm),
        post_mlp=_norm(layer.post_feedforward_layernorm),
        device=module_device(layer),
    )

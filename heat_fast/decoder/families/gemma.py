"""Gemma, Gemma 2 and Gemma 3 (text): norms that store `w - 1`, scaled embeddings.

From Gemma 2 on there are norms before and after each layer, and windows. Gemma 2 caps attention
scores and logits; Gemma 3 norms its query and key heads instead and turns local and global layers
by different angles.
"""

from __future__ import annotations

from typing import Any

import torch
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


@family(
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
)
def build(model: nn.Module, length: int) -> Decoder:
    """View a Gemma, Gemma 2 or Gemma 3 model, of one that reads images its text part."""
    causal: Any = model
    body, config = text_part(causal)
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(
            "this Gemma attends in both directions; attribution needs a causal model. "
            "Use a config with use_bidirectional_attention=False."
        )
    like = norm_weight(body.norm)
    layers = body.layers[: config.num_hidden_layers]
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    if config.model_type in ("gemma", "gemma2"):
        tables = dict.fromkeys(kinds, rotary_tables(body.rotary_emb, like, length))
    else:
        tables = {kind: rotary_tables(body.rotary_emb, like, length, kind) for kind in set(kinds)}
    scale = 1.0
    if not hasattr(body.embed_tokens, "embed_scale"):  # older versions scale inside the model
        scale = float(torch.tensor(config.hidden_size**0.5, dtype=body.embed_tokens.weight.dtype))
    softcap = getattr(config, "final_logit_softcapping", None)
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(
            _block(layer, tables[kind], config) for layer, kind in zip(layers, kinds, strict=False)
        ),
        head=head(_norm(body.norm), causal.lm_head, softcap=softcap),
        positions=None,
        embedding_scale=scale,
    )


def _norm(module: Any) -> Norm:
    return rms_norm(module, weight_offset=1.0, late_cast=True)


def _block(layer: Any, rotary: Rotary, config: Any) -> Block:
    attention = layer.self_attn
    # Gemma 3 has the setting but never applies it.
    capped = config.model_type == "gemma2"
    softcap = attention.attn_logit_softcapping if capped else None
    window = getattr(attention, "sliding_window", None)
    around = config.model_type != "gemma"  # a norm before and after each half of a layer
    return Block(
        norm=_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling, window, softcap),
            groups=attention.num_key_value_groups,
            query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        ),
        mlp_norm=_norm(
            layer.pre_feedforward_layernorm if around else layer.post_attention_layernorm
        ),
        mlp=gated_mlp(layer.mlp),
        post_attention=_norm(layer.post_attention_layernorm) if around else None,
        post_mlp=_norm(layer.post_feedforward_layernorm) if around else None,
        device=module_device(layer),
    )

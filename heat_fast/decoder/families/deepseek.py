"""DeepSeek-V2-Lite, DeepSeek-V3, GLM-4.7-Flash, Moonlight: latent rows between a row and its heads.

Otherwise as Llama, with experts of which all rows share some, after one or a few dense layers.
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
)
from heat_fast.decoder.families.mixtures import mixture
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import Identity
from heat_fast.decoder.projection import LatentProjection
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.branch_attention import Masking


@family("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a model with latent attention."""
    causal: Any = model
    body, config = causal.model, causal.config
    like = norm_weight(body.norm)
    if config.model_type == "deepseek_v2":
        rotary = rotary_tables(body.rotary_emb, like, length, interleaved=True, columns="pairs")
    else:
        interleaved = config.rope_interleave
        rotary = rotary_tables(body.rotary_emb, like, length, interleaved=interleaved)
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary, config) for layer in layers),
        head=head(rms_norm(body.norm), causal.lm_head),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary, config: Any) -> Block:
    attention = layer.self_attn
    mixed = hasattr(layer.mlp, "experts")
    return Block(
        norm=rms_norm(layer.input_layernorm),
        attention=Attention(
            _projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling),
            groups=attention.num_key_value_groups,
            value_dim=attention.v_head_dim,
        ),
        mlp_norm=rms_norm(layer.post_attention_layernorm),
        mlp=mixture(layer.mlp, config) if mixed else gated_mlp(layer.mlp),
        device=module_device(layer),
    )


def _projection(attention: Any) -> LatentProjection:
    direct = attention.q_lora_rank is None
    if attention.v_head_dim > attention.qk_head_dim:
        raise UnsupportedModelError(
            f"values of {attention.v_head_dim} columns (v_head_dim) are wider than this model's "
            f"queries and keys of {attention.qk_head_dim}: expected at most as many. Use a model "
            "that has them so, as all published ones do."
        )
    return LatentProjection(
        None if direct else Linear(attention.q_a_proj),
        Identity() if direct else rms_norm(attention.q_a_layernorm),
        Linear(attention.q_proj if direct else attention.q_b_proj),
        Linear(attention.kv_a_proj_with_mqa),
        rms_norm(attention.kv_a_layernorm),
        Linear(attention.kv_b_proj),
        head_dim=attention.qk_head_dim,
        turned=attention.qk_rope_head_dim,
        value_dim=attention.v_head_dim,
    )

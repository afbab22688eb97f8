"""Llama, Mistral, Qwen2, Qwen3 and kin: RMSNorm, rotary halves, grouped queries, gated MLP.

They differ in biases (read from the modules), sliding windows (Mistral: all layers; Qwen and
Ministral: some), norms on the query and key heads (Qwen3) and layers that know no positions
(SmolLM3).
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
)
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family(
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
)
def build(model: nn.Module, length: int) -> Decoder:
    """View a Llama-like model."""
    causal: Any = model
    body, config = causal.model, causal.config
    rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length)
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
    # Most layers know their own window; Mistral's read the config's; Llama has none.
    window = getattr(attention, "sliding_window", None)
    if config.model_type == "mistral":
        window = config.sliding_window
    return Block(
        norm=rms_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary if getattr(attention, "use_rope", True) else None,
            Masking(attention.scaling, window),
            groups=attention.num_key_value_groups,
            query_norm=rms_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=rms_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        ),
        mlp_norm=rms_norm(layer.post_attention_layernorm),
        mlp=gated_mlp(layer.mlp),
        device=module_device(layer),
    )

"""Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary halves, grouped queries, gated MLP.

They differ in biases (read from the modules), sliding windows (Mistral: all layers; Qwen: some)
and norms on the query and key heads (Qwen3).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from heat_fast.decoder.attention import Attention, SeparateProjection
from heat_fast.decoder.block import Block
from heat_fast.decoder.families.common import norm_weight, rms_norm, rotary_tables
from heat_fast.decoder.head import Head
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import Mlp
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
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
        head=Head(
            rms_norm(body.norm), Linear(causal.lm_head), device=module_device(causal.lm_head)
        ),
        positions=None,
    )


def _block(layer: Any, rotary: Rotary, config: Any) -> Block:
    attention = layer.self_attn
    # Qwen's layers know their own window; Mistral's read the config's; Llama has none.
    window = getattr(attention, "sliding_window", None)
    if config.model_type == "mistral":
        window = config.sliding_window
    return Block(
        norm=rms_norm(layer.input_layernorm),
        attention=Attention(
            SeparateProjection(
                Linear(attention.q_proj),
                Linear(attention.k_proj),
                Linear(attention.v_proj),
                attention.head_dim,
            ),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling, window),
            groups=attention.num_key_value_groups,
            query_norm=rms_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=rms_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        ),
        mlp_norm=rms_norm(layer.post_attention_layernorm),
        mlp=Mlp(
            Linear(layer.mlp.gate_proj),
            Linear(layer.mlp.up_proj),
            Linear(layer.mlp.down_proj),
            layer.mlp.act_fn,
        ),
        device=module_device(layer),
    )

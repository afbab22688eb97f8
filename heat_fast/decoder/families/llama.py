"""Llama, Mistral, Qwen2, Qwen3 and kin: RMSNorm, rotary halves, grouped queries, gated MLP.

They differ in biases (read from the modules), sliding windows (Mistral: all layers; Qwen and
Ministral: some), norms on the query and key heads (Qwen3: each; OLMoE: all at once), layers that
know no positions (SmolLM3), the pairs that rotary turns (ERNIE 4.5: neighbours), feed-forward
layers without a gate (Arcee, Apertus), the names of norms (Apertus) and experts (Mixtral, Qwen-MoE,
OLMoE, ERNIE 4.5 MoE, GLM-4.5 and 4.6, dots.llm1, MiniMax-M2).
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
    plain_mlp,
    rms_norm,
    rms_norm_of_heads,
    rotary_tables,
    separate_projection,
    text_part,
)
from heat_fast.decoder.families.mixtures import mixture
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import FeedForward
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.branch_attention import Masking


@family(
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Ministral3ForCausalLM",
    "Mistral3ForConditionalGeneration",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "Ernie4_5ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Glm4MoeForCausalLM",
    "Dots1ForCausalLM",
    "MiniMaxM2ForCausalLM",
    "OlmoeForCausalLM",
)
def build(model: nn.Module, length: int) -> Decoder:
    """View a Llama-like model, of one that reads images (Mistral3) its text part."""
    causal: Any = model
    body, config = text_part(causal)
    if body is not causal.model and config.model_type not in ("mistral", "ministral3"):
        raise UnsupportedModelError(
            f"the text part of this {type(model).__name__} is a {type(body).__name__}: expected a "
            "MistralModel or Ministral3Model, as those of Mistral Small 3.1 and 3.2 and of "
            "Ministral 3. Use such a model."
        )
    if config.model_type == "ministral3":
        _check_length(config.rope_parameters, length)
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} clips queries, keys and values (clip_qkv="
            f"{config.clip_qkv}): expected clip_qkv=None, as OLMoE-1B-7B has it. Use such a model."
        )
    like, interleaved = norm_weight(body.norm), config.model_type in ("ernie4_5", "ernie4_5_moe")
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
    # Most layers know their own window; Mistral's read the config's; Llama has none.
    window = getattr(attention, "sliding_window", None)
    if config.model_type in ("mistral", "ministral3", "mixtral"):
        window = config.sliding_window
    norm = rms_norm_of_heads if config.model_type in ("olmoe", "minimax_m2") else rms_norm
    renamed = config.model_type == "apertus"
    return Block(
        norm=rms_norm(layer.attention_layernorm if renamed else layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary if getattr(attention, "use_rope", True) else None,
            Masking(attention.scaling, window),
            groups=attention.num_key_value_groups,
            query_norm=norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        ),
        mlp_norm=rms_norm(
            layer.feedforward_layernorm if renamed else layer.post_attention_layernorm
        ),
        mlp=_feed_forward(layer.mlp, config),
        device=module_device(layer),
    )


def _feed_forward(layer: Any, config: Any) -> FeedForward:
    if hasattr(layer, "experts"):
        return mixture(layer, config)
    return plain_mlp(layer) if config.model_type in ("apertus", "arcee") else gated_mlp(layer)


def _check_length(rotary: Any, length: int) -> None:
    """Ministral 3 scales queries by `1 + beta log(1 + floor(position / original length))`."""
    original = rotary["original_max_position_embeddings"]
    if length > original and rotary["llama_4_scaling_beta"]:
        raise UnsupportedModelError(
            f"this model scales the queries of a context of {length} tokens, beyond {original} "
            f"(llama_4_scaling_beta), which its view does not: expected {original} tokens at most. "
            'Shorten the prompt, or use windows (variant="win").'
        )

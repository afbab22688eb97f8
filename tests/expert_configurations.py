"""Tiny configurations of families with experts, as `configurations.py` has those of the others.

Each turns on what its router does: which scores, corrections and scales, what all rows share.
"""

from __future__ import annotations

from typing import Any

import transformers

from configurations import ConfigBuilder, common, half_turned


def _granite_moe(**more: Any) -> dict[str, Any]:
    """Granite's factors and two of four experts."""
    return {
        "vocab_size": 77,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.4,
        "logits_scaling": 2.0,
        **common(),
        **more,
    }


def _granite4(**more: Any) -> transformers.PretrainedConfig:
    """Attention in every layer; one feed-forward layer for all rows beside the experts."""
    layers = {
        "layer_types": ["attention"] * 3,
        "shared_intermediate_size": 31,
        "mamba_n_heads": 4,
    }
    return transformers.GraniteMoeHybridConfig(**_granite_moe(**layers, **more))


def _gpt_oss() -> transformers.PretrainedConfig:
    """Sinks, windowed layers, biases everywhere, bounded experts; head size unrelated to width."""
    return transformers.GptOssConfig(
        vocab_size=79,
        hidden_size=40,
        intermediate_size=33,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=3,
        swiglu_limit=0.4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **common(),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _mixtral() -> transformers.PretrainedConfig:
    """Two of four experts for every row, whose weights sum to 1; a window in every layer."""
    return transformers.MixtralConfig(
        vocab_size=71,
        hidden_size=40,
        intermediate_size=32,
        num_attention_heads=5,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        **common(),
    )


def _qwen3_moe() -> transformers.PretrainedConfig:
    """Three of five experts, weighted as they are; a plain MLP in the middle layer."""
    return transformers.Qwen3MoeConfig(
        vocab_size=73,
        hidden_size=40,
        intermediate_size=51,
        moe_intermediate_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        **common(),
        tie_word_embeddings=False,
    )


def _qwen2_moe() -> transformers.PretrainedConfig:
    """Two of five experts, weighted as they are, beside one for all rows that a sigmoid weighs."""
    return transformers.Qwen2MoeConfig(
        vocab_size=71,
        hidden_size=40,
        intermediate_size=51,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=33,
        num_attention_heads=5,
        num_key_value_heads=1,
        num_experts=5,
        num_experts_per_tok=2,
        mlp_only_layers=[2],
        **common(),
    )


def _sigmoid_routed(**more: Any) -> dict[str, Any]:
    """Three of six experts by corrected sigmoids, scaled, beside one for all rows; a plain first
    layer."""
    return {
        "vocab_size": 75,
        "hidden_size": 40,
        "intermediate_size": 51,
        "moe_intermediate_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1,
        **common(),
        **more,
    }


def _glm4_moe(**more: Any) -> transformers.PretrainedConfig:
    """Half of a head's columns turn, with biases on queries, keys and values."""
    config = transformers.Glm4MoeConfig(**_sigmoid_routed(attention_bias=True, **more))
    return half_turned(config)


def _dots1() -> transformers.PretrainedConfig:
    """Weights of a row's experts as they are, these in two of three groups; a window in the last
    layer, norms of heads."""
    layers = ["full_attention", "full_attention", "sliding_attention"]
    groups = {"n_group": 3, "topk_group": 2}
    routed = _sigmoid_routed(layer_types=layers, sliding_window=5, norm_topk_prob=False)
    return transformers.Dots1Config(**{**routed, **groups})


def _latent(**more: Any) -> dict[str, Any]:
    """Heads of 12 columns, 4 of them turned, values of 7, made by way of narrow rows."""
    routed = _sigmoid_routed(**more)
    del routed["head_dim"]
    return {
        **routed,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "q_lora_rank": 17,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 7,
    }


def _deepseek_v2() -> transformers.PretrainedConfig:
    """Queries made straight of a row; experts by probabilities; neighbours turn."""
    direct = {"q_lora_rank": None, "topk_method": "greedy", "head_dim": 4}
    return transformers.DeepseekV2Config(**{**_latent(), **direct})


def _minimax_m2() -> transformers.PretrainedConfig:
    """Experts by corrected sigmoids; norms over all heads at once; partial rotary."""
    config = transformers.MiniMaxM2Config(
        vocab_size=73,
        hidden_size=40,
        intermediate_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=2,
        **common(),
    )
    return half_turned(config)


def _ernie4_5_moe() -> transformers.PretrainedConfig:
    """Experts by corrected probabilities, beside two that are one; neighbours turn."""
    return transformers.Ernie4_5_MoeConfig(
        vocab_size=67,
        hidden_size=40,
        intermediate_size=51,
        moe_intermediate_size=16,
        num_attention_heads=5,
        num_key_value_heads=1,
        moe_num_experts=5,
        moe_k=2,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        **common(),
        tie_word_embeddings=True,
    )


def _olmoe() -> transformers.PretrainedConfig:
    """Two of four experts, weighted as they are; norms over all query or key heads at once."""
    return transformers.OlmoeConfig(
        vocab_size=69,
        hidden_size=48,
        intermediate_size=24,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_experts=4,
        num_experts_per_tok=2,
        **common(),
        pad_token_id=0,
        eos_token_id=2,
    )


EXPERT_CONFIGS: dict[str, ConfigBuilder] = {
    "granite_moe": lambda: transformers.GraniteMoeConfig(**_granite_moe()),
    "granite_moe_shared": lambda: transformers.GraniteMoeSharedConfig(
        **_granite_moe(shared_intermediate_size=31)
    ),
    "granite4": lambda: _granite4(position_embedding_type="rope"),
    "granite4_dense": lambda: _granite4(num_local_experts=0),
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "ernie4_5_moe": _ernie4_5_moe,
    "glm4_moe": _glm4_moe,
    "glm4_moe_head_norms": lambda: _glm4_moe(use_qk_norm=True),
    "dots1": _dots1,
    "minimax_m2": _minimax_m2,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**_latent()),
    "deepseek_v3_direct": lambda: transformers.DeepseekV3Config(
        **{**_latent(rope_interleave=False), "q_lora_rank": None}
    ),
    "glm4_moe_lite": lambda: transformers.Glm4MoeLiteConfig(
        **_latent(attention_bias=True, mlp_layer_types=["dense", "sparse", "sparse"])
    ),
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
}

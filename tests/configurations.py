"""Tiny configurations of every family, by name; `families.py` builds models of them.

A view of a family is only trusted where a test exercises what makes that family different, so
every configuration here turns on the quirks of its family: odd widths and head counts, grouped
queries, windows shorter than the test prompts, rotary scaling whose thresholds fall inside the test
prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

ConfigBuilder = Callable[[], transformers.PretrainedConfig]


def common() -> dict[str, Any]:
    """What most have in common; a dictionary of their own, as configurations write to it."""
    return {
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }


def half_turned(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """With half of a head's columns turned by rotary."""
    config.rope_parameters["partial_rotary_factor"] = 0.5
    return config


def _llama() -> transformers.PretrainedConfig:
    """Grouped queries; Llama 3 rotary scaling with one frequency in each of its three regimes."""
    return transformers.LlamaConfig(
        vocab_size=83,
        hidden_size=48,
        intermediate_size=61,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        tie_word_embeddings=True,
    )


def _llama_bias() -> transformers.PretrainedConfig:
    """Biases in attention and MLP, untied head, odd width, head size set by hand."""
    return transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=45,
        intermediate_size=53,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=6,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        tie_word_embeddings=False,
    )


def _mistral() -> transformers.PretrainedConfig:
    """A window of 5 (the position itself and 4 before it) in every layer; one key-value head."""
    return transformers.MistralConfig(
        vocab_size=71,
        hidden_size=40,
        intermediate_size=57,
        num_attention_heads=5,
        num_key_value_heads=1,
        sliding_window=5,
        **common(),
    )


def _qwen2() -> transformers.PretrainedConfig:
    """Biases on q, k, v only; tied head; full and windowed layers mixed."""
    return transformers.Qwen2Config(
        vocab_size=79,
        hidden_size=48,
        intermediate_size=59,
        num_attention_heads=6,
        num_key_value_heads=3,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        **common(),
        tie_word_embeddings=True,
    )


def _qwen3() -> transformers.PretrainedConfig:
    """Norms on each query and key head; head size unrelated to the (odd) width."""
    return transformers.Qwen3Config(
        vocab_size=73,
        hidden_size=35,
        intermediate_size=51,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        **common(),
        tie_word_embeddings=False,
    )


def _phi3(**changes: Any) -> transformers.PretrainedConfig:
    """Fused qkv and gate-up projections, partial rotary."""
    settings: dict[str, Any] = {
        "vocab_size": 89,
        "hidden_size": 48,
        "intermediate_size": 55,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return transformers.Phi3Config(**(settings | changes))


def _phi3_longrope(original_length: int) -> transformers.PretrainedConfig:
    """Long-rope: contexts over `original_length` use the long factors, others the short ones."""
    return _phi3(
        max_position_embeddings=96,
        original_max_position_embeddings=original_length,
        sliding_window=7,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.3, 1.7],
            "long_factor": [1.5, 3.0, 7.0],
            "original_max_position_embeddings": original_length,
            "factor": 96 / original_length,
        },
    )


def _gpt2(**changes: Any) -> transformers.PretrainedConfig:
    """Conv1D weights (stored transposed), learned positions, fused qkv, tied head."""
    return transformers.GPT2Config(
        vocab_size=61,
        n_positions=64,
        n_embd=40,
        n_layer=3,
        n_head=5,
        n_inner=67,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )


def _gptj() -> transformers.PretrainedConfig:
    """Parallel residual under one norm, interleaved partial rotary, a bias on the head."""
    return transformers.GPTJConfig(
        vocab_size=97,
        n_positions=64,
        n_embd=40,
        n_layer=3,
        n_head=5,
        rotary_dim=4,
        n_inner=63,
        bos_token_id=0,
        eos_token_id=0,
    )


def _gpt_neox(**changes: Any) -> transformers.PretrainedConfig:
    """Parallel residual under two norms, qkv fused head by head, partial rotary."""
    settings: dict[str, Any] = {
        "vocab_size": 77,
        "hidden_size": 40,
        "intermediate_size": 65,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
    }
    return transformers.GPTNeoXConfig(**(settings | changes))


def _opt(**changes: Any) -> transformers.PretrainedConfig:
    """Learned positions shifted by two, ReLU, queries scaled before the product."""
    settings: dict[str, Any] = {
        "vocab_size": 69,
        "hidden_size": 40,
        "ffn_dim": 63,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "max_position_embeddings": 64,
        "activation_function": "relu",
    }
    return transformers.OPTConfig(**(settings | changes))


def _gemma() -> transformers.PretrainedConfig:
    """Norms (1 + weight) before each layer, scaled embeddings, one key head; tied head."""
    return transformers.GemmaConfig(
        vocab_size=77,
        hidden_size=42,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=8,
        **common(),
    )


def _ministral3() -> transformers.PretrainedConfig:
    """Queries scaled by their position, beyond 64; a window in every layer; head size unrelated."""
    settings = common()
    settings["rope_parameters"] |= {
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 64,
    }
    return transformers.Ministral3Config(
        vocab_size=79,
        hidden_size=40,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        **settings,
    )


def _apertus() -> transformers.PretrainedConfig:
    """Norms on query and key heads, xIELU without a gate."""
    return transformers.ApertusConfig(
        vocab_size=73,
        hidden_size=40,
        intermediate_size=57,
        num_attention_heads=5,
        num_key_value_heads=1,
        **common(),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _arcee() -> transformers.PretrainedConfig:
    """A squared ReLU without a gate."""
    return transformers.ArceeConfig(
        vocab_size=73,
        hidden_size=40,
        intermediate_size=57,
        num_attention_heads=5,
        num_key_value_heads=1,
        **common(),
        bos_token_id=1,
        eos_token_id=2,
    )


def _nemotron() -> transformers.PretrainedConfig:
    """LayerNorms (1 + weight) with biases, half of a head's columns turn, a squared ReLU."""
    config = transformers.NemotronConfig(
        vocab_size=71,
        hidden_size=40,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        **common(),
        bos_token_id=1,
        eos_token_id=2,
    )
    return half_turned(config)


def _gemma2() -> transformers.PretrainedConfig:
    """Soft-caps low enough to bend, double norms (1 + weight), windows in layers 0 and 2."""
    return transformers.Gemma2Config(
        vocab_size=75,
        hidden_size=42,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        query_pre_attn_scalar=11,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        sliding_window=4,
        **common(),
    )


def _gemma3_text() -> transformers.PretrainedConfig:
    """Norms on queries and keys, own rotary base for local and global layers, windows."""
    return transformers.Gemma3TextConfig(
        vocab_size=81,
        hidden_size=42,
        intermediate_size=57,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=13,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=64,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 200.0},
        },
    )


def _phi(**changes: Any) -> transformers.PretrainedConfig:
    """Parallel residual under one norm, partial rotary, biases everywhere, grouped queries."""
    settings: dict[str, Any] = {
        "vocab_size": 65,
        "hidden_size": 48,
        "intermediate_size": 61,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
    }
    return transformers.PhiConfig(**(settings | changes))


def _stablelm(**changes: Any) -> transformers.PretrainedConfig:
    """LayerNorm with biases, gated MLP, partial rotary, biases on q, k, v."""
    settings: dict[str, Any] = {
        "vocab_size": 71,
        "hidden_size": 48,
        "intermediate_size": 59,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
        "use_qkv_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.25,
        },
    }
    return transformers.StableLmConfig(**(settings | changes))


def _starcoder2() -> transformers.PretrainedConfig:
    """LayerNorm, ungated MLP, biases, a window of 5 in every layer, tied head."""
    return transformers.Starcoder2Config(
        vocab_size=67,
        hidden_size=40,
        intermediate_size=63,
        num_attention_heads=5,
        num_key_value_heads=1,
        sliding_window=5,
        **common(),
    )


def _smollm3() -> transformers.PretrainedConfig:
    """No positions in the middle layer."""
    return transformers.SmolLM3Config(
        vocab_size=73,
        hidden_size=48,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=2,
        no_rope_layers=[1, 0, 1],
        **common(),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _ministral() -> transformers.PretrainedConfig:
    """Full and windowed layers mixed, head size unrelated to the width."""
    return transformers.MinistralConfig(
        vocab_size=69,
        hidden_size=40,
        intermediate_size=53,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **common(),
    )


def _seed_oss() -> transformers.PretrainedConfig:
    """Biases on q, k, v and the output, head size unrelated to the width."""
    return transformers.SeedOssConfig(
        vocab_size=77,
        hidden_size=40,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        attention_out_bias=True,
        **common(),
    )


def _olmo2() -> transformers.PretrainedConfig:
    """Norms after the layers alone, and over all query or key heads at once; grouped queries."""
    return transformers.Olmo2Config(
        vocab_size=79,
        hidden_size=48,
        intermediate_size=55,
        num_attention_heads=6,
        num_key_value_heads=2,
        **common(),
        pad_token_id=0,
        eos_token_id=2,
    )


def _olmo3() -> transformers.PretrainedConfig:
    """As OLMo 2, with full and windowed layers whose rotary tables differ."""
    return transformers.Olmo3Config(
        vocab_size=75,
        hidden_size=48,
        intermediate_size=55,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=64,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 200.0},
        },
        pad_token_id=0,
        eos_token_id=2,
    )


def _cohere() -> transformers.PretrainedConfig:
    """Parallel residual under a norm without bias, interleaved rotary, scaled logits, tied head."""
    return transformers.CohereConfig(
        vocab_size=81,
        hidden_size=48,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=2,
        logit_scale=0.6,
        **common(),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _cohere2() -> transformers.PretrainedConfig:
    """As Command R, with windowed layers, and a full one that knows no positions."""
    return transformers.Cohere2Config(
        vocab_size=83,
        hidden_size=48,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=3,
        logit_scale=0.25,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **common(),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _granite() -> transformers.PretrainedConfig:
    """Factors on embeddings, layers, attention scores and logits; tied head."""
    return transformers.GraniteConfig(
        vocab_size=83,
        hidden_size=48,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=2,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        logits_scaling=3.0,
        **common(),
        tie_word_embeddings=True,
    )


def _glm() -> dict[str, Any]:
    """Interleaved partial rotary, biases on q, k, v only, fused gate-up projection."""
    return common() | {
        "vocab_size": 71,
        "hidden_size": 48,
        "intermediate_size": 57,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": 0,
        "eos_token_id": 2,
    }


def _exaone4(**changes: Any) -> transformers.PretrainedConfig:
    """Norms after the layers and on every query and key head; a full layer without positions."""
    settings: dict[str, Any] = {
        "vocab_size": 73,
        "hidden_size": 48,
        "intermediate_size": 57,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.Exaone4Config(**(common() | settings | changes))


def _ernie4_5() -> transformers.PretrainedConfig:
    """Interleaved rotary in float32, biases everywhere."""
    return transformers.Ernie4_5Config(
        vocab_size=79,
        hidden_size=48,
        intermediate_size=57,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        use_bias=True,
        **common(),
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


_NO_EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3() -> transformers.PretrainedConfig:
    """The text part of a model that reads images."""
    return transformers.Gemma3Config(
        text_config=_gemma3_text().to_dict(), vision_config=_NO_EYES, mm_tokens_per_image=4
    )


def _mistral3(text: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The text part of a model that reads images, windows and all."""
    return transformers.Mistral3Config(
        text_config=text.to_dict(),
        vision_config={"model_type": "pixtral", **_NO_EYES},
        image_token_index=70,
    )


def _gpt_neo() -> transformers.PretrainedConfig:
    """Unscaled attention, a window of 4 in the middle layer, a bias on out_proj alone."""
    return transformers.GPTNeoConfig(
        vocab_size=63,
        max_position_embeddings=64,
        hidden_size=40,
        num_layers=3,
        num_heads=5,
        attention_types=[[["global", "local"], 1], [["global"], 1]],
        window_size=4,
        intermediate_size=61,
        bos_token_id=0,
        eos_token_id=0,
    )


CONFIGS: dict[str, ConfigBuilder] = {
    "llama": _llama,
    "llama_bias": _llama_bias,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "phi3_longrope_short": lambda: _phi3_longrope(48),
    "phi3_longrope_long": lambda: _phi3_longrope(4),
    "gpt2": _gpt2,
    # `reorder_and_upcast_attn` stays off: Hugging Face's eager path for it refuses float64.
    "gpt2_scaled": lambda: _gpt2(scale_attn_by_inverse_layer_idx=True),
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "gpt_neox_sequential": lambda: _gpt_neox(use_parallel_residual=False, attention_bias=False),
    "opt": _opt,
    "opt_gelu": lambda: _opt(activation_function="gelu", enable_bias=False),
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gpt_neo": _gpt_neo,
    "phi": _phi,
    "phi_head_norms": lambda: _phi(qk_layernorm=True, num_key_value_heads=6),
    "stablelm": _stablelm,
    "stablelm_parallel": lambda: _stablelm(use_parallel_residual=True, use_qkv_bias=False),
    "starcoder2": _starcoder2,
    "smollm3": _smollm3,
    "ministral": _ministral,
    "ministral3": _ministral3,
    "apertus": _apertus,
    "arcee": _arcee,
    "nemotron": _nemotron,
    "seed_oss": _seed_oss,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "granite": _granite,
    "glm": lambda: transformers.GlmConfig(**_glm()),
    "glm4": lambda: transformers.Glm4Config(**_glm()),
    "exaone4": _exaone4,
    "exaone4_full": lambda: _exaone4(
        sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 3
    ),
    "ernie4_5": _ernie4_5,
    "gemma3": _gemma3,
    "mistral3": lambda: _mistral3(_mistral()),
    "mistral3_ministral3": lambda: _mistral3(_ministral3()),
}
"""Configurations by name; the two long-rope names say which factors 5 to 48 tokens use."""

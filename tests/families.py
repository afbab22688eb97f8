"""Tiny random language models, one per family and quirk, and full-size single blocks of real ones.

All weights, biases and norm weights are drawn anew from a seeded generator: attentions are far from
uniform and the Hessian of the log-probability is not negligible.

The same seed gives the same float32 weights whatever `dtype` is asked for; they are then cast.
Buffers (rotary frequencies, embedding scales) keep their own dtype, as when a checkpoint is loaded.
"""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import no_init_weights

from configurations import CONFIGS as PLAIN_CONFIGS
from configurations import ConfigBuilder
from expert_configurations import EXPERT_CONFIGS

CONFIGS: dict[str, ConfigBuilder] = {**PLAIN_CONFIGS, **EXPERT_CONFIGS}
"""All of them, by name."""

FAMILIES: tuple[str, ...] = tuple(CONFIGS)
"""Names accepted by `build`."""

ARCHITECTURES: tuple[str, ...] = tuple(
    {CONFIGS[name]().model_type: name for name in reversed(FAMILIES)}.values()
)
"""One name for each architecture: those whose variants differ in numbers, not in matrices."""

MAX_TEST_CONTEXT = 48
"""Longest context (prompt and targets) for which every family's name stays true."""


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Redraw all parameters: matrices N(0, 1/fan_in), embeddings N(0, 0.2^2), norms and biases near
    their defaults."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    convolutions = {
        id(module.weight) for module in model.modules() if type(module).__name__ == "Conv1D"
    }
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(0.2 * noise)
            elif parameter.ndim >= 2:
                fan_in = parameter.shape[0 if id(parameter) in convolutions else -1]
                parameter.copy_(1.2 * noise / fan_in**0.5)
            else:
                # Norm weights start at 1 (at 0 in Gemma) and biases at 0: stay around that default.
                parameter.add_(0.25 * noise)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):  # which moves a router's choice, a little
                tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))


def is_routed(name: str) -> bool:
    """Whether a router chooses among experts."""
    config = CONFIGS[name]()
    # Granite 4's dense models have a configuration of experts, and none of these.
    experts = getattr(config, "num_local_experts", 1)
    return hasattr(config, "num_experts_per_tok") and experts > 0


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, attn: str = "eager"
) -> PreTrainedModel:
    """A tiny random model of the family `name`, in eval mode on the CPU.

    `attn` is the Hugging Face attention implementation; GPT-J, GPT-Neo and Gemma 2 know "eager"
    only. The global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        kind = AutoModelForImageTextToText if name.startswith("mistral3") else AutoModelForCausalLM
        model = kind.from_config(CONFIGS[name](), attn_implementation=attn)
    if is_routed(name):
        model.set_experts_implementation("eager")  # the default knows no float64
    _randomise(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def prompt_ids(name: str, length: int, seed: int = 0) -> list[int]:
    """`length` random token ids of the family's vocabulary, none of them 0, 1 or 2."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    vocabulary = int(CONFIGS[name]().get_text_config().vocab_size)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def _gpt_j_6b() -> transformers.PretrainedConfig:
    return transformers.GPTJConfig(
        vocab_size=128,
        n_positions=2048,
        n_embd=4096,
        n_layer=1,
        n_head=16,
        rotary_dim=64,
        bos_token_id=0,
        eos_token_id=0,
    )


def _phi_3_medium_4k() -> transformers.PretrainedConfig:
    return transformers.Phi3Config(
        vocab_size=128,
        hidden_size=5120,
        intermediate_size=17920,
        num_hidden_layers=1,
        num_attention_heads=40,
        num_key_value_heads=10,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        sliding_window=2047,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _qwen_2_5_3b() -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(
        vocab_size=128,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        max_window_layers=70,
        use_sliding_window=False,
        sliding_window=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


def _llama_3_1_70b() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=1,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
    )


FULL_SIZE: dict[str, tuple[ConfigBuilder, torch.dtype]] = {
    "gpt-j-6b": (_gpt_j_6b, torch.float32),
    "phi-3-medium-4k": (_phi_3_medium_4k, torch.float32),
    "qwen2.5-3b": (_qwen_2_5_3b, torch.float32),
    "llama-3.1-70b": (_llama_3_1_70b, torch.bfloat16),
}
"""Published configurations with few layers and 128 tokens, and the dtype to build each one in."""


def build_full_size(name: str, attn: str = "eager") -> PreTrainedModel:
    """The real widths and heads of a published model in one or two layers, with random weights.

    The largest take 1.4 GB (Phi-3-medium, float32) and 1.7 GB (Llama-3.1-70B, bfloat16).
    """
    config_builder, dtype = FULL_SIZE[name]
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config_builder(), attn_implementation=attn, dtype=dtype
        )
    # One block of noise of prime length, laid end to end, begun elsewhere for each parameter:
    # drawing a billion normals takes far longer than the tests that use them, and no two rows and
    # no two matrices come out alike.
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    norm_weights = {
        id(module.weight)
        for module in model.modules()
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    }
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            flat = parameter.view(-1)
            is_norm_weight = id(parameter) in norm_weights
            scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            block = (noise.roll(77_777 * index) * scale + (1.0 if is_norm_weight else 0.0)).to(
                parameter.dtype
            )
            for start in range(0, flat.numel(), block.numel()):
                piece = flat[start : start + block.numel()]
                piece.copy_(block[: piece.numel()])
    return model.eval()

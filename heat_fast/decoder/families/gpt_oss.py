"""gpt-oss: a sink in every head, windows in every second layer, and bounded experts with biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast.decoder.attention import Attention
from heat_fast.decoder.block import Block
from heat_fast.decoder.experts import Experts
from heat_fast.decoder.families.common import (
    head,
    rms_norm,
    rotary_tables,
    separate_projection,
)
from heat_fast.decoder.families.mixtures import plain_tensor
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.norm import Norm
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.router import Router
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.kernels.branch_attention import Masking


@family("GptOssForCausalLM")
def build(model: nn.Module, length: int) -> Decoder:
    """View a gpt-oss model."""
    causal: Any = model
    body, config = causal.model, causal.config
    # Its norms may be float32 in a float16 model, its tables not.
    like = body.embed_tokens.weight
    rotary = rotary_tables(body.rotary_emb, like, length, columns="pairs")
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary) for layer in layers),
        head=head(_norm(body.norm), causal.lm_head),
        positions=None,
    )


def _norm(module: Any) -> Norm:
    return rms_norm(module, late_cast=True)


def _block(layer: Any, rotary: Rotary) -> Block:
    attention = layer.self_attn
    return Block(
        norm=_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling, attention.sliding_window),
            groups=attention.num_key_value_groups,
            sinks=attention.sinks,
        ),
        mlp_norm=_norm(layer.post_attention_layernorm),
        mlp=_experts(layer.mlp.router, layer.mlp.experts),
        device=module_device(layer),
    )


def _experts(router: Any, experts: Any) -> Experts:
    biases = (
        plain_tensor(experts, "gate_up_proj_bias", 2),
        plain_tensor(experts, "down_proj_bias", 2),
    )
    return Experts(
        Router(
            plain_tensor(router, "weight", 2),
            bias=plain_tensor(router, "bias", 1),
            top=router.top_k,
            renormalised=True,
        ),
        plain_tensor(experts, "gate_up_proj", 3).mT,
        plain_tensor(experts, "down_proj", 3).mT,
        _bounded_swish(experts.alpha, experts.limit),
        interleaved=True,
        biases=biases,
        bound=experts.limit,
    )


def _bounded_swish(alpha: float, bound: float) -> Callable[[Tensor], Tensor]:
    """`g sigmoid(alpha g)` of gates that stop at `bound`."""

    def swish(gate: Tensor) -> Tensor:
        gate = gate.clamp(max=bound)
        return gate * torch.sigmoid(alpha * gate)

    return swish

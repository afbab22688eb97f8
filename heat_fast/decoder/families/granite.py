"""Granite 3 and 4: as Llama, with a factor on embeddings, layers, scores and logits.

The MoE models have experts, with or without one that all rows share; of Granite 4 those models are
viewed whose layers all have attention, some of which know no positions.
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
from heat_fast.decoder.families.mixtures import experts_of, plain_tensor
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import FeedForward, Mlp
from heat_fast.decoder.norm import Factor
from heat_fast.decoder.rotary import Rotary
from heat_fast.decoder.router import Router
from heat_fast.decoder.shared import Sum
from heat_fast.decoder.view import Decoder, family, module_device
from heat_fast.errors import UnsupportedModelError
from heat_fast.kernels.branch_attention import Masking


@family(
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "GraniteMoeHybridForCausalLM",
)
def build(model: nn.Module, length: int) -> Decoder:
    """View a Granite model."""
    causal: Any = model
    body, config = causal.model, causal.config
    rotary = None
    if body.rotary_emb is not None:
        rotary = rotary_tables(body.rotary_emb, norm_weight(body.norm), length)
    layers = body.layers[: config.num_hidden_layers]
    return Decoder(
        model=model,
        length=length,
        blocks=tuple(_block(layer, rotary) for layer in layers),
        # The logits' factor is the norm's: s W n(x) = W (s n(x)).
        head=head(rms_norm(body.norm, scale=1 / config.logits_scaling), causal.lm_head),
        positions=None,
        embedding_scale=body.embedding_multiplier,
    )


def _block(layer: Any, rotary: Rotary | None) -> Block:
    attention = layer.self_attn
    if attention is None:
        raise UnsupportedModelError(
            "this Granite model has state-space layers (Mamba), which have no attention that an "
            "attribution could follow: expected attention in every layer, as granite-4.0-micro, "
            "-1b and -350m have it. Use such a model."
        )
    factor = Factor(layer.residual_multiplier)
    return Block(
        norm=rms_norm(layer.input_layernorm),
        attention=Attention(
            separate_projection(attention),
            Linear(attention.o_proj),
            rotary,
            Masking(attention.scaling),
            groups=attention.num_key_value_groups,
        ),
        mlp_norm=rms_norm(layer.post_attention_layernorm),
        mlp=_feed_forward(layer),
        post_attention=factor,
        post_mlp=factor,
        device=module_device(layer),
    )


def _feed_forward(layer: Any) -> FeedForward:
    if hasattr(layer, "mlp"):
        return gated_mlp(layer.mlp)
    parts: list[FeedForward] = []
    if layer.block_sparse_moe is not None:
        moe = layer.block_sparse_moe
        weight = plain_tensor(moe.router, "weight", 2)
        router = Router(weight, top=moe.router.top_k, renormalised=True)
        parts.append(experts_of(router, moe.experts))
    shared = getattr(layer, "shared_mlp", None)
    if shared is not None:
        linears = Linear(shared.input_linear), None, Linear(shared.output_linear)
        parts.append(Mlp(*linears, shared.activation, fused=True))
    return parts[0] if len(parts) == 1 else Sum(*parts)

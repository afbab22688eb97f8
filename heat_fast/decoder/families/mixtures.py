"""Views of transformers' layers of experts: what their routers do, and the experts all rows share.

A file of a family calls `mixture(...)`, or its parts where names differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heat_fast.decoder.experts import Experts
from heat_fast.decoder.families.common import gated_mlp
from heat_fast.decoder.linear import Linear
from heat_fast.decoder.mlp import FeedForward
from heat_fast.decoder.router import Router
from heat_fast.decoder.shared import Sum, Weighed
from heat_fast.errors import UnsupportedModelError

# Types of models whose routers take the largest probabilities as they are.
_PLAIN = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"})
_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def mixture(layer: Any, config: Any) -> FeedForward:
    """A router `gate`, its `experts`, and an expert that all rows share where there is one."""
    experts = experts_of(_router(layer, config), layer.experts)
    if getattr(layer, "shared_experts", None) is not None:
        return Sum(experts, gated_mlp(layer.shared_experts))
    if hasattr(layer, "shared_expert"):  # Qwen2-MoE
        shared = gated_mlp(layer.shared_expert)
        return Sum(experts, Weighed(Linear(layer.shared_expert_gate), shared))
    return experts


def experts_of(router: Router, experts: Any) -> Experts:
    """Experts whose matrices are `gate_up_proj` and `down_proj`."""
    return Experts(
        router,
        plain_tensor(experts, "gate_up_proj", 3),
        plain_tensor(experts, "down_proj", 3),
        experts.act_fn,
    )


def _router(layer: Any, config: Any) -> Router:
    gate = layer.gate
    weight, kind = plain_tensor(gate, "weight", 2), config.model_type
    if kind == "deepseek_v2":
        if config.topk_method != "greedy":
            raise UnsupportedModelError(
                f"this DeepSeek-V2 chooses experts by {config.topk_method!r} (topk_method): "
                "expected 'greedy', as DeepSeek-V2-Lite has it. Use such a model."
            )
        scale, top = config.routed_scaling_factor, config.num_experts_per_tok
        return Router(weight, top=top, renormalised=False, scale=scale, widened=True)
    if kind in ("glm4_moe", "glm4_moe_lite", "dots1", "deepseek_v3"):
        return Router(
            weight,
            top=config.num_experts_per_tok,
            renormalised=config.norm_topk_prob,
            scores="sigmoid",
            correction=gate.e_score_correction_bias,
            groups=(config.n_group, config.topk_group),
            scale=config.routed_scaling_factor,
            widened=True,
        )
    if kind == "minimax_m2":
        correction = layer.e_score_correction_bias
        return Router(
            weight, top=gate.top_k, renormalised=True, scores="sigmoid", correction=correction
        )
    if kind == "ernie4_5_moe":
        correction = gate.moe_statics.e_score_correction_bias.squeeze()
        return Router(
            weight, top=gate.top_k, renormalised=True, correction=correction, widened=True
        )
    if kind not in _PLAIN:
        raise UnsupportedModelError(
            f"the experts of a model of type {kind!r} may be chosen otherwise than is known here: "
            f"expected one of {', '.join(sorted(_PLAIN))}, or another that is viewed. Use such a "
            "model."
        )
    # Mixtral's router does not say whether a row's weights sum to 1: they do.
    return Router(weight, top=gate.top_k, renormalised=getattr(gate, "norm_topk_prob", True))


def plain_tensor(module: Any, name: str, dimensions: int) -> Tensor:
    """A tensor of a module whose numbers torch multiplies."""
    if hasattr(module, "base_layer"):
        raise UnsupportedModelError(
            f"a {type(module).__name__} stands in place of a router or of experts: expected "
            "transformers' own, whose derivatives are written out. If it is an adapter, merge it "
            "into the model (PEFT: merge_and_unload())."
        )
    weight = getattr(module, name, None)
    usable = isinstance(weight, Tensor) and weight.dtype in _NUMBERS and not weight.is_meta
    if isinstance(weight, Tensor) and usable and weight.dim() == dimensions:
        return weight
    raise UnsupportedModelError(
        f"a {type(module).__name__} has no plain {name} of {dimensions} dimensions: expected the "
        "weights of its experts as transformers loads them, [E, 2 f, d] and [E, d, f] in float64, "
        "float32, bfloat16 or float16. Load the model without quantising its experts, or upgrade "
        "transformers."
    )

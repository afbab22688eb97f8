"""Other packages' attributions, called as their documentation says, and ours beside them.

    python bench/baselines/peers.py NAME embedded|PATH TOKENS

prints, as JSON in bytes, the most that was resident during one attribution beyond what the process
held before it, measured in a process of its own after a run of a short prompt. A PATH is a folder
with a model and its tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Scores of the prompt's tokens for one target token, from model, tokenizer, prompt, target.
Method = Callable[[Any, Any, str, str], Tensor]
STEPS = 20  # of integrated gradients, for everyone


@dataclass(frozen=True)
class Peer:
    """A method: the package it is of (None: this one), what its scores are, and how it is run."""

    package: str | None
    returns: str
    run: Method

    @property
    def version(self) -> str | None:
        """The installed package's version; None where it is missing."""
        try:
            return version(self.package or "heat-fast")
        except PackageNotFoundError:
            return None


def _goal(tokenizer: Any, target: str, vocabulary: int) -> Tensor:
    """The target's first token, `[1]`: as text, some would put a begin token before it."""
    from heat_fast.prompt import encode_target

    return torch.tensor((encode_target(target, tokenizer, vocabulary) or ())[:1])


def _captum_ablation(model: Any, tokenizer: Any, prompt: str, target: str) -> Tensor:
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    method = LLMAttribution(FeatureAblation(model), tokenizer)
    goal = _goal(tokenizer, target, model.config.vocab_size)
    scores: Tensor = method.attribute(TextTokenInput(prompt, tokenizer), target=goal).seq_attr
    return scores


def _captum_gradients(model: Any, tokenizer: Any, prompt: str, target: str) -> Tensor:
    from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput

    layer = LayerIntegratedGradients(model, model.get_input_embeddings())
    method = LLMGradientAttribution(layer, tokenizer)
    inputs, goal = (
        TextTokenInput(prompt, tokenizer),
        _goal(tokenizer, target, model.config.vocab_size),
    )
    scores: Tensor = method.attribute(inputs, target=goal, n_steps=STEPS).seq_attr
    return scores


def _inseq(name: str, **settings: Any) -> Method:
    def run(model: Any, tokenizer: Any, prompt: str, target: str) -> Tensor:
        import inseq

        wrapped = inseq.load_model(model, name, tokenizer=tokenizer)
        found = wrapped.attribute(
            prompt, prompt + target, show_progress=False, pretty_progress=False, **settings
        )
        scores: Tensor = found.aggregate().sequence_attributions[0].target_attributions
        return scores[: len(tokenizer(prompt).input_ids), 0]  # the target has rows as well

    return run


def _flashtrace(model: Any, tokenizer: Any, prompt: str, target: str) -> Tensor:
    from flashtrace import FlashTrace

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # as the package's own loader does: it reads the maps
    try:
        tracer = FlashTrace(model, tokenizer, use_chat_template=False)
        trace = tracer.trace(prompt=prompt, target=target, output_span=(0, 0), hops=1)
    finally:
        model.set_attn_implementation(before)
    return torch.tensor(trace.scores)


def _authors(model: Any, tokenizer: Any, prompt: str, target: str) -> Tensor:
    from baselines import authors
    from heat_fast.kernels.rademacher import rademacher
    from heat_fast.prompt import encode_prompt

    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    ids = list(encode_prompt(prompt, tokenizer, vocabulary).token_ids)
    goal = int(_goal(tokenizer, target, vocabulary))
    signs = rademacher(0, torch.arange(1)[:, None], torch.arange(len(ids)), width)
    return authors.attribute(model, ids, goal, signs).scores


def _heat(**settings: Any) -> Method:
    def run(model: Any, tokenizer: Any, prompt: str, target: str) -> Tensor:
        from heat_fast import Attributor, HeatConfig

        return Attributor(model, tokenizer, HeatConfig(**settings)).attribute(prompt, target).scores

    return run


def _baseline(name: str, **settings: Any) -> Method:
    def run(model: Any, tokenizer: Any, prompt: str, target: str) -> Tensor:
        from heat_fast import baselines

        found = baselines.attribute(model, tokenizer, prompt, target, method=name, **settings)
        return found.scores

    return run


GRADIENT = "signed; first order, along a path from zero embeddings"
HEAT = "gate x (curvature + information), not negative, each part with it"
PEERS = {
    "heat_fast HEAT, coded, 32 products": Peer(
        None, HEAT, _heat(estimator="coded", codes=8, probes=4)
    ),
    "heat_fast HEAT, block, 1 probe": Peer(None, HEAT, _heat(probes=1)),
    "the authors' HEAT, 1 probe": Peer(None, HEAT, _authors),
    "heat_fast leave_one_out": Peer(None, "KL per token, not negative", _baseline("leave_one_out")),
    "captum FeatureAblation": Peer(
        "captum", "signed; change of log-probability per token", _captum_ablation
    ),
    f"heat_fast integrated_gradients, {STEPS} steps": Peer(
        None, GRADIENT, _baseline("integrated_gradients", steps=STEPS)
    ),
    f"captum LayerIntegratedGradients, {STEPS} steps": Peer("captum", GRADIENT, _captum_gradients),
    f"inseq integrated_gradients, {STEPS} steps": Peer(
        "inseq",
        "norm of the first-order path integral",
        _inseq("integrated_gradients", n_steps=STEPS),
    ),
    "inseq saliency": Peer("inseq", "norm of the gradient, not negative", _inseq("saliency")),
    "flashtrace": Peer("flashtrace", "attention flow, not negative", _flashtrace),
}


def load(where: str) -> tuple[Any, Any]:
    """The embedded model, or the model and tokenizer of a folder."""
    if where == "embedded":
        import heat_fast

        demo = heat_fast.load_demo_model(1)
        return demo.model, demo.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(where).eval()
    return model, AutoTokenizer.from_pretrained(where)


def text_of(model: Any, tokenizer: Any, tokens: int) -> tuple[str, str]:
    """About `tokens` tokens of the model's own text, and the word that it says next."""
    from models import story_ids

    ids = story_ids(model, tokenizer, tokens + 1)
    prompt = tokenizer.decode(ids[:-1], skip_special_tokens=True)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return prompt, text[len(prompt) :] or " the"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from heat_fast.memory import forget_peak, resident

    name, where, tokens = sys.argv[1:]
    model, tokenizer = load(where)
    run = PEERS[name].run
    run(model, tokenizer, *text_of(model, tokenizer, 8))
    prompt, target = text_of(model, tokenizer, int(tokens))
    reset, before = forget_peak(), resident("VmRSS")
    run(model, tokenizer, prompt, target)
    print(json.dumps({"beyond_model": resident("VmHWM") - before if reset else None}))


if __name__ == "__main__":
    main()

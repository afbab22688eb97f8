"""From a prompt to an attribution: the one way through the house.

prompt -> trunk -> { gate, curvature, information } -> combine -> result
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast._version import __version__
from heat_fast.combine import Components, combine
from heat_fast.config import HeatConfig
from heat_fast.curvature import Curvature, curvature, product_count
from heat_fast.decoder import check_supported, view
from heat_fast.decoder.norm import wide
from heat_fast.errors import InputError
from heat_fast.gate import gate
from heat_fast.information import information, replacement
from heat_fast.planner import Budget, slices, targets_at_once, token_budget
from heat_fast.progress import Ledger, Progress
from heat_fast.prompt import (
    EncodedPrompt,
    check_length,
    encode_prompt,
    encode_target,
    readable_tokens,
)
from heat_fast.result import Attribution
from heat_fast.stopping import settled
from heat_fast.trunk import Trunk, run_adjoint, run_trunk


def attribute(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    target: Any = None,
    variant: str = "full",
    *,
    progress: Progress | None = None,
    **overrides: Any,
) -> Attribution:
    """Score every prompt token by its contribution to the target tokens (paper Eq. 5).

        score[i] = gate[i] * (beta * curvature[i] + gamma * information[i])

    `model`: a Hugging Face decoder-only language model of a supported family. `tokenizer`: its
    tokenizer, or None when `prompt` (and `target`) are ids. `prompt`: text, token ids, or chat
    messages. `target`: None (the model's own greedy next token), text (its tokens, appended
    without special tokens), a token id, or a list of ids. `variant` names a preset of `HeatConfig`;
    `overrides` are its fields. `progress(component, done, total)` is called after every batch.

    The result holds `[n_targets, N]` float32 arrays on the CPU. The same seed gives the same scores
    whatever the batch size. The model is left as it was found.

    Raises `InputError`, `ConfigError`, `UnsupportedModelError` or `NumericalError`, each saying
    what was wrong, what was expected and what to do.

    Example:
        >>> import heat_fast
        >>> demo = heat_fast.load_demo_model()
        >>> result = heat_fast.attribute(demo.model, demo.tokenizer, demo.examples[0].prompt)
        >>> result.scores.shape == (len(result.tokens),)
        True
    """
    config = HeatConfig.preset(variant, **overrides)
    return Attributor(model, tokenizer, config).attribute(prompt, target, progress=progress)


class Attributor:
    """One model, tokenizer and configuration, for repeated use.

    The model is checked when the object is made. Nothing is cached between calls, so the model may
    be changed (an adapter loaded, a weight edited) in between.

    Example:
        >>> import heat_fast
        >>> demo = heat_fast.load_demo_model()
        >>> attributor = heat_fast.Attributor(demo.model, demo.tokenizer, HeatConfig(probes=2))
        >>> [attributor.attribute(text).target_tokens for text in ("Tom has a", "The cat")] != []
        True
    """

    def __init__(self, model: Any, tokenizer: Any = None, config: HeatConfig | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"model is {type(model).__name__}: expected a loaded Hugging Face causal language "
                "model. Load one with AutoModelForCausalLM.from_pretrained(...)."
            )
        check_supported(model)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config if config is not None else HeatConfig()

    def attribute(
        self, prompt: Any, target: Any = None, *, progress: Progress | None = None
    ) -> Attribution:
        """Attribute one prompt; see `heat_fast.attribute` for the arguments and the result."""
        model: Any = self.model
        embed = model.get_input_embeddings()
        vocabulary = int(embed.weight.shape[0])
        longest = _context_length(self.model)
        encoded = encode_prompt(prompt, self.tokenizer, vocabulary, longest)
        targets = encode_target(target, self.tokenizer, vocabulary)
        check_length(len(encoded), len(targets or (0,)), longest)
        # Within inference mode autograd could not differentiate the activations.
        with torch.inference_mode(False), torch.no_grad(), _evaluation_mode(self.model):
            return self._run(encoded, targets, embed, progress)

    def _run(
        self,
        encoded: EncodedPrompt,
        targets: tuple[int, ...] | None,
        embed: nn.Module,
        progress: Progress | None,
    ) -> Attribution:
        config = self.config
        ids = [*encoded.token_ids, *(targets or (0,))[:-1]]
        device = _embedding_device(embed)
        ledger = Ledger(progress, device)
        with ledger.component("total", 1) as finish:
            embeddings = embed(torch.tensor(ids, device=device))
            vector = replacement(embed, config.masking, config.sentinel_token, embeddings)
            with ledger.component("trunk", 1) as step:
                trunk = run_trunk(view(self.model, len(ids)), embeddings, targets or (0,))
                step(1)
            if targets is None:  # the trunk of a single target does not depend on it
                trunk = replace(trunk, targets=(int(trunk.log_probs[0].argmax()),))
            budget = token_budget(trunk.bytes, trunk.length, device, config.token_budget)
            with ledger.component("gate", len(trunk.states)) as step:
                gates = gate(trunk, config.rollout, step).cpu()
            kl, drop = self._information(trunk, vector, budget, ledger)
            parts, stderr = self._curvature(trunk, gates, kl, drop, budget, ledger)
            finish(1)
        score, envelope = combine(parts, config)
        readable = readable_tokens(trunk.targets, self.tokenizer)
        return Attribution(
            gate=parts.gate,
            curvature=parts.curvature,
            information=parts.information,
            log_prob_drop=parts.log_prob_drop,
            gradient_norm=parts.gradient_norm,
            envelope=envelope,
            target_scores=score,
            token_ids=encoded.token_ids,
            tokens=encoded.tokens,
            offsets=encoded.offsets,
            prompt_text=encoded.text,
            special=encoded.special,
            target_ids=trunk.targets,
            target_tokens=readable,
            target_log_probs=trunk.target_log_probs.cpu(),
            curvature_stderr=stderr,
            metadata=self._metadata(trunk, budget, ledger),
        )

    def _information(
        self, trunk: Trunk, vector: Tensor, budget: Budget, ledger: Ledger
    ) -> tuple[Tensor, Tensor]:
        with ledger.component("information", trunk.prompt_length) as step:
            return information(trunk, vector, budget, ledger, step)

    def _curvature(
        self,
        trunk: Trunk,
        gates: Tensor,
        kl: Tensor,
        drop: Tensor,
        budget: Budget,
        ledger: Ledger,
    ) -> tuple[Components, Tensor | None]:
        """All components with S and `|grad g|_1` filled in, and the standard error of S.

        Targets are taken in groups whose adjoints fit into memory together.
        """
        config, count = self.config, trunk.prompt_length
        products = product_count(config, count)
        if products:
            trunk = trunk.with_derivatives()
        found: list[Curvature] = []
        norms: list[Tensor] = []
        total = len(trunk.targets) * max(1, products)
        with ledger.component("curvature", total) as step:
            for group in slices(len(trunk.targets), targets_at_once(trunk.bytes)):
                targets = range(group.start, group.stop)
                adjoints = [run_adjoint(trunk, target, products) for target in targets]
                rows = [adjoint.gradient[:count] for adjoint in adjoints]
                wide_rows = [row.to(wide(row.dtype)) for row in rows]
                norms += [row.abs().sum(-1).cpu() for row in wide_rows]
                others = Components(
                    gates[group], kl[group], kl[group], drop[group], torch.stack(norms[group])
                )
                enough = partial(settled, others, config=config)
                found.append(curvature(trunk, adjoints, config, budget, ledger, step, enough))
                if not products:
                    step(len(adjoints))
        errors = [part.stderr for part in found if part.stderr is not None]
        parts = Components(
            gates, torch.cat([part.values for part in found]), kl, drop, torch.stack(norms)
        )
        return parts, torch.cat(errors) if len(errors) == len(found) else None

    def _metadata(self, trunk: Trunk, budget: Budget, ledger: Ledger) -> dict[str, Any]:
        import transformers

        return {
            "config": self.config.to_dict(),
            "seed": self.config.seed,
            "model": type(self.model).__name__,
            "name": str(getattr(self.model, "name_or_path", "") or ""),
            "device": str(trunk.embeddings.device),
            "dtype": str(trunk.embeddings.dtype).removeprefix("torch."),
            "versions": {
                "heat_fast": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "seconds": {name: round(value, 6) for name, value in ledger.seconds.items()},
            "counts": ledger.counts,
            "token_budget": budget.rows,
            "out_of_memory_retries": budget.halvings,
            "implementation": {"kernels": "reference (torch)", "curvature": "tangent sweeps"},
        }


def _context_length(model: Any) -> int | None:
    """The longest context the model was made for, if its config says."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def _embedding_device(embed: nn.Module) -> torch.device:
    weight = embed.weight
    assert isinstance(weight, Tensor)
    hook = getattr(embed, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else weight.device


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off (an adapter's, say) and afterwards restore every module's own mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True

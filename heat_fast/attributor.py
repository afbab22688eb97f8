"""From a prompt to an attribution: the one way through the house.

prompt -> trunk -> { gate, curvature, information } -> combine -> result

A prompt that is cut into windows goes to the middle of it once per window (`heat_fast.windows`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heat_fast.combine import combine
from heat_fast.config import HeatConfig, Settings, check_config
from heat_fast.decoder import check_supported, view
from heat_fast.errors import HeatError, InputError
from heat_fast.finding import Finding
from heat_fast.forward import (
    check_in_memory,
    check_model,
    context_length,
    log_probs,
    picked,
    undisturbed,
    vocabularies,
)
from heat_fast.information import replacement
from heat_fast.kernels.dispatch import Record, using
from heat_fast.locate import Range, TargetSpan, target_range
from heat_fast.pipeline import Pipeline
from heat_fast.planner import (
    is_out_of_memory,
    keep_heap,
    slices,
)
from heat_fast.progress import Ledger, Progress, reporting
from heat_fast.prompt import (
    EncodedPrompt,
    check_length,
    encode_prompt,
    encode_target,
)
from heat_fast.provenance import provenance
from heat_fast.readable import readable_tokens
from heat_fast.result import Attribution
from heat_fast.windows import Plan, accumulate, plan_windows, report, worth_sweeping

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attribute(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    target: Any = None,
    variant: str = "full",
    *,
    target_span: TargetSpan = None,
    score_response: bool = False,
    segments: Mapping[str, str | Range] | None = None,
    progress: Progress | bool | None = None,
    **overrides: Unpack[Settings],
) -> Attribution:
    """Score every prompt token by its contribution to the target tokens (paper Eq. 5).

        score[i] = gate[i] * (beta * curvature[i] + gamma * information[i])

    `model`: a Hugging Face decoder-only language model of a supported family. `tokenizer`: its
    tokenizer, or None when `prompt` (and `target`) are ids. `prompt`: text, token ids, or chat
    messages. `target`: None (the model's own greedy next token), text (its tokens, appended without
    special tokens), a token id, or a list of ids. `target_span`: which part of the target to
    explain, a half-open range of its tokens or a part of its text that occurs once; the tokens
    before it are context like the prompt, and are not scored, unless `score_response` asks for it:
    they then follow the prompt's in the result, as the segment "response". `segments`: names for
    parts of the prompt, ``{"manual": "...", "question": (120, 160)}``: the text of each, where that
    occurs once, or a half-open range of characters (of tokens, where the prompt is ids);
    `by_segment` and the reports then tell the score of each. `variant` names a preset of
    `HeatConfig`; `overrides` are its fields. `progress=True` draws a bar per component with the
    time that remains, on standard error if that is a terminal; a callable is called as
    `progress(component, done, total)` after every batch, in FLOPs (`heat_fast.progress.Progress`).

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
    attributor = Attributor(model, tokenizer, config)
    return attributor.attribute(
        prompt,
        target,
        target_span=target_span,
        score_response=score_response,
        segments=segments,
        progress=progress,
    )


class Attributor:
    """One model, tokenizer and configuration, for repeated use.

    The model is checked when the object is made. Nothing is cached between calls, so the model may
    be changed (an adapter loaded, a weight edited) in between.

    Example:
        >>> from heat_fast import Attributor, HeatConfig, load_demo_model
        >>> demo = load_demo_model()
        >>> attributor = Attributor(demo.model, demo.tokenizer, HeatConfig(probes=2))
        >>> [attributor.attribute(case.prompt).target_tokens[0] for case in demo.examples[:2]]
        [' Fenston', ' Quilston']
    """

    def __init__(self, model: Any, tokenizer: Any = None, config: HeatConfig | None = None) -> None:
        check_model(model)
        check_supported(model)
        check_config(config)
        # A model can be called too.
        usable = callable(tokenizer) and not isinstance(tokenizer, nn.Module)
        if tokenizer is not None and not usable:
            raise InputError(
                f"tokenizer is {type(tokenizer).__name__}: expected a loaded Hugging Face "
                "tokenizer, or None with token ids. Load one with AutoTokenizer.from_pretrained."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = config if config is not None else HeatConfig()

    def attribute(
        self,
        prompt: Any,
        target: Any = None,
        *,
        target_span: TargetSpan = None,
        score_response: bool = False,
        segments: Mapping[str, str | Range] | None = None,
        progress: Progress | bool | None = None,
    ) -> Attribution:
        """Attribute one prompt; see `heat_fast.attribute` for the arguments and the result."""
        model: Any = self.model
        embed = model.get_input_embeddings()
        vocabulary, predicted = vocabularies(model)
        longest, window = context_length(self.model), self.config.window
        # With windows it is a window that has to fit.
        encoded = encode_prompt(prompt, self.tokenizer, vocabulary, None if window else longest)
        named = encoded.named(segments) if segments else {}
        response = encode_target(target, self.tokenizer, min(vocabulary, predicted))
        span = self._span(response, target_span)
        if not isinstance(score_response, bool):
            raise InputError(
                f"score_response={score_response!r}: expected True or False. Pass one of them."
            )
        before = span.start if score_response else 0
        if score_response:
            encoded, named, response, span = self._scored(encoded, named, response, span)
        # What comes after the span cannot matter to it.
        check_length(len(encoded), span.stop, longest, window)
        device = check_in_memory(self.model)
        try:
            with (
                undisturbed(self.model, device),
                using(self.config.kernels, device) as ran,
                reporting(progress, self.config) as report,
            ):
                result = self._run(encoded, named, response, span, embed, device, report, ran)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise HeatError(
                "out of memory even with one sequence at a time: expected room for the prompt's "
                "own run. Free memory, shorten the prompt, or load the model in a smaller dtype."
            ) from error
        if not before:
            return result
        # How many of the last tokens of `token_ids` are the response's.
        metadata = {**result.metadata, "scored_response": before}
        return dataclasses.replace(result, metadata=metadata)

    def _span(self, response: tuple[int, ...] | None, where: TargetSpan) -> range:
        """The tokens of the response that are explained."""
        if response is None:
            if where is not None:
                raise InputError(
                    f"target_span={where!r} without a target: expected the text or ids that it is "
                    "a part of. Pass target too."
                )
            return range(1)
        tokens = readable_tokens(response, self.tokenizer)
        return range(*target_range(tokens, where))

    def _scored(
        self,
        encoded: EncodedPrompt,
        named: dict[str, Range],
        response: tuple[int, ...] | None,
        span: range,
    ) -> tuple[EncodedPrompt, dict[str, Range], tuple[int, ...], range]:
        """The response before the span as a part of the prompt, and what is left of both."""
        if response is None or span.start == 0:
            raise InputError(
                "score_response=True, and nothing of the response comes before what is explained: "
                "expected a target_span that begins later. Pass target and target_span too."
            )
        before, end = len(encoded), len(encoded) + span.start
        if "response" in named:
            raise InputError(
                "a segment 'response' beside score_response=True, which has one of that name: "
                "expected another. Rename it."
            )
        parts = {**(named or {"prompt": (0, before)}), "response": (before, end)}
        whole = encoded.followed_by(response[: span.start], self.tokenizer)
        return whole, parts, response[span.start :], range(len(span))

    def _run(
        self,
        encoded: EncodedPrompt,
        named: Mapping[str, Range],
        response: tuple[int, ...] | None,
        span: range,
        embed: nn.Module,
        device: torch.device,
        progress: Progress | None,
        ran: Record,
    ) -> Attribution:
        config, count = self.config, len(encoded)
        plan = plan_windows(count, config)
        read = [*encoded.token_ids, *(response or ())[: span.stop - 1]]
        ids = torch.tensor(read, device=device)
        chunks = [span[part] for part in slices(len(span), config.response_chunk or len(span))]
        keep_heap()
        embeddings = embed(ids)
        vector = replacement(embed, config.masking, config.sentinel_token, embeddings)
        later = list(range(count, len(ids)))
        decoder = view(self.model, plan.length + len(later))
        findings: list[Finding] = []
        whole = self._whole(embeddings, len(span)) if len(plan) > 1 else None
        if response is None and whole is not None:
            response = (int(whole[0].argmax()),)
        worth = [True] * len(plan)
        begin = time.perf_counter()
        if config.window_tolerance is not None and len(plan) > 1:
            response, worth = self._worth(plan, embeddings, later, response, span)
        choosing = time.perf_counter() - begin
        runs = len(plan) * len(chunks)
        ledger = Ledger(progress, device, runs, swept=sum(worth) * len(chunks))
        pipeline = Pipeline(self.model, decoder, config, vector, ledger)
        # The last window comes first: it may have to say what the model's own target is.
        for number in reversed(range(len(plan))):
            parts_found = []
            for chunk in chunks:
                rows = embeddings[[*plan.indices(number), *later[: chunk.stop - 1]]]
                targets = None if response is None else response[chunk.start : chunk.stop]
                with ledger.component("total", 1) as finish:
                    parts_found.append(
                        pipeline.run(rows, targets, chunk.start, sweep=worth[number])
                    )
                    finish(1)
            findings.insert(0, Finding.joined(parts_found))
            response = response or findings[0].targets
        for name in ("trunk", "total"):
            ledger.seconds[name] += choosing
        found = accumulate(plan, findings, config)
        parts, screening = found.parts, found.screening
        likely = found.log_probs
        if whole is not None:
            likely = picked(whole, found.targets).to(likely)
        score, envelope = combine(parts, config)
        metadata = {
            "config": config.to_dict(),
            "seed": config.seed,
            **provenance(self.model, embeddings),
            **pipeline.report(ran),
        }
        if named:
            metadata["segments"] = {name: list(where) for name, where in named.items()}
        if screening is not None:
            metadata["screening"] = screening.report(parts, score, config)
        if config.window is not None:
            metadata["windows"] = report(plan, findings, config)
            metadata["windows"]["target_of"] = "last window" if whole is None else "prompt"
        if found.quality is not None:
            metadata["low_rank"] = found.quality.report()
        assert response is not None
        if len(response) > len(span):
            metadata["response"] = {
                "token_ids": list(response),
                "tokens": list(readable_tokens(response, self.tokenizer)),
                "span": [span.start, span.stop],
            }
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
            roles=encoded.roles,
            target_ids=found.targets,
            target_tokens=readable_tokens(found.targets, self.tokenizer),
            target_log_probs=likely,
            curvature_stderr=found.stderr,
            information_skipped=None if screening is None else screening.skipped,
            metadata=metadata,
        )

    def _whole(self, embeddings: Tensor, count: int) -> Tensor | None:
        """Log-probabilities `[count, V]` of the targets after the whole prompt, by one forward.

        None where that is longer than the model's context, or does not fit into memory.
        """
        longest = context_length(self.model)
        if longest is not None and len(embeddings) > longest:
            return None
        try:
            return log_probs(self.model, embeddings, count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _worth(
        self,
        plan: Plan,
        embeddings: Tensor,
        later: Sequence[int],
        response: tuple[int, ...] | None,
        span: range,
    ) -> tuple[tuple[int, ...], list[bool]]:
        """The response, and which windows `window_tolerance` keeps, by one forward of each.

        Without a response it is what the last window predicts.
        """
        found: list[Tensor] = []
        for number in reversed(range(len(plan))):
            rows = embeddings[[*plan.indices(number), *later]]
            row = log_probs(self.model, rows, len(span))
            response = response or (int(row[0].argmax()),)
            found.insert(0, picked(row, response[span.start : span.stop]).cpu())
        assert response is not None and self.config.window_tolerance is not None
        return response, worth_sweeping(torch.stack(found), self.config.window_tolerance)

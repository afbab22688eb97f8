"""From a prompt to an attribution: the one way through the house.

prompt -> trunk -> { gate, curvature, information } -> combine -> result

A prompt that is cut into windows goes to the middle of it once per window (`heat_fast.windows`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast import native
from heat_fast.combine import Components, combine
from heat_fast.config import HeatConfig, check_config
from heat_fast.cost import curvature_work
from heat_fast.curvature import Curvature, curvature, product_count
from heat_fast.decoder import Decoder, check_supported, view
from heat_fast.decoder.norm import wide
from heat_fast.errors import HeatError, InputError
from heat_fast.forward import (
    check_faithful,
    check_hooks,
    check_in_memory,
    check_model,
    context_length,
    log_probs,
    unchanged,
)
from heat_fast.gate import gate
from heat_fast.information import ExactBranches, information, replacement
from heat_fast.kernels.dispatch import Record, using
from heat_fast.lowrank import Quality
from heat_fast.planner import (
    Budget,
    is_out_of_memory,
    keep_heap,
    run_batches,
    runs_alone,
    slices,
    targets_at_once,
    token_budget,
    trim_heap,
)
from heat_fast.progress import Ledger, Progress, bars
from heat_fast.prompt import (
    EncodedPrompt,
    check_length,
    encode_prompt,
    encode_target,
    readable_tokens,
)
from heat_fast.provenance import provenance
from heat_fast.result import Attribution
from heat_fast.screening import Screening, screened_information
from heat_fast.spans import TargetSpan, target_range
from heat_fast.stopping import settled
from heat_fast.trunk import Trunk, run_adjoint, run_trunk
from heat_fast.windows import Finding, Plan, accumulate, plan_windows, report, worth_sweeping
from heat_fast.work import Work


def attribute(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    target: Any = None,
    variant: str = "full",
    *,
    target_span: TargetSpan = None,
    progress: Progress | bool | None = None,
    **overrides: Any,
) -> Attribution:
    """Score every prompt token by its contribution to the target tokens (paper Eq. 5).

        score[i] = gate[i] * (beta * curvature[i] + gamma * information[i])

    `model`: a Hugging Face decoder-only language model of a supported family. `tokenizer`: its
    tokenizer, or None when `prompt` (and `target`) are ids. `prompt`: text, token ids, or chat
    messages. `target`: None (the model's own greedy next token), text (its tokens, appended
    without special tokens), a token id, or a list of ids. `target_span`: which part of the
    target to explain, a half-open range of its tokens or a part of its text that occurs once; the
    tokens before it are context like the prompt, and are not scored. `variant` names a preset of
    `HeatConfig`;
    `overrides` are its fields. `progress=True` draws a bar per component with the time that
    remains, on standard error if that is a terminal; a callable is called as
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
    return attributor.attribute(prompt, target, target_span=target_span, progress=progress)


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
        if tokenizer is not None and not callable(tokenizer):
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
        progress: Progress | bool | None = None,
    ) -> Attribution:
        """Attribute one prompt; see `heat_fast.attribute` for the arguments and the result."""
        model: Any = self.model
        embed = model.get_input_embeddings()
        vocabulary = int(embed.weight.shape[0])
        longest, window = context_length(self.model), self.config.window
        # With windows it is a window that has to fit.
        encoded = encode_prompt(prompt, self.tokenizer, vocabulary, None if window else longest)
        head: Any = model.get_output_embeddings()
        predicted = int(getattr(head, "out_features", vocabulary))
        response = encode_target(target, self.tokenizer, min(vocabulary, predicted))
        span = self._span(response, target_span)
        # What comes after the span cannot matter to it.
        check_length(len(encoded), span.stop, longest, window)
        device = check_in_memory(self.model)
        try:
            # Within inference mode autograd could not differentiate the activations; autocast
            # would change dtypes behind the model's back.
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(device.type, enabled=False),
                unchanged(self.model),
                using(self.config.kernels, device) as ran,
                _reporting(progress, self.config) as report,
            ):
                return self._run(encoded, response, span, embed, device, report, ran)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise HeatError(
                "out of memory even with one sequence at a time: expected room for the prompt's "
                "own run. Free memory, shorten the prompt, or load the model in a smaller dtype."
            ) from error

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

    def _run(
        self,
        encoded: EncodedPrompt,
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
        budget = None
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
        # The last window comes first: it may have to say what the model's own target is.
        for number in reversed(range(len(plan))):
            parts_found = []
            for chunk in chunks:
                rows = embeddings[[*plan.indices(number), *later[: chunk.stop - 1]]]
                targets = None if response is None else response[chunk.start : chunk.stop]
                with ledger.component("total", 1) as finish:
                    finding, budget = self._window(
                        decoder, rows, targets, chunk.start, vector, budget, ledger, worth[number]
                    )
                    finish(1)
                parts_found.append(finding)
            findings.insert(0, Finding.joined(parts_found))
            response = response or findings[0].targets
        for name in ("trunk", "total"):
            ledger.seconds[name] += choosing
        assert budget is not None
        found = accumulate(plan, findings, config)
        parts, screening = found.parts, found.screening
        likely = found.log_probs
        if whole is not None:
            index = torch.tensor(found.targets, device=whole.device)
            likely = whole.gather(-1, index[:, None])[:, 0].to(likely)
        score, envelope = combine(parts, config)
        metadata = self._metadata(decoder, embeddings, budget, ledger, ran)
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
            index = torch.tensor(response[span.start : span.stop], device=row.device)
            found.insert(0, row.gather(-1, index[:, None])[:, 0].cpu())
        assert response is not None and self.config.window_tolerance is not None
        return response, worth_sweeping(torch.stack(found), self.config.window_tolerance)

    def _window(
        self,
        decoder: Decoder,
        embeddings: Tensor,
        targets: tuple[int, ...] | None,
        lead: int,
        vector: Tensor,
        budget: Budget | None,
        ledger: Ledger,
        sweep: bool,
    ) -> tuple[Finding, Budget]:
        """One context from its trunk to its components; the whole prompt where there is one window.

        `lead`: tokens of the response before the targets. A budget that an earlier window had to
        halve is kept. Without `sweep` it ends with the gate.
        """
        config, first = self.config, decoder.first_of(self.config.layers)
        count = len(targets or (0,))
        work = Work(decoder, len(embeddings) - lead - count + 1, count, first, lead)
        # The model's own forward, that the trunk is checked against, is as much again.
        with ledger.component("trunk", 2 * work.trunk()) as step:
            trunk = run_trunk(
                decoder,
                embeddings,
                targets or (0,),
                step,
                keep_streams=config.branch_tolerance is not None,
                first=first,
                lead=lead,
            )
            if budget is None:
                check_hooks(self.model, trunk)
            check_faithful(self.model, trunk)
            step(work.trunk())
        if targets is None:  # the trunk of a single target does not depend on it
            trunk = replace(trunk, targets=(int(trunk.log_probs[0].argmax()),))
        budget = budget or token_budget(
            trunk.bytes,
            trunk.length,
            work.width,
            embeddings.device,
            config.token_budget,
            decoder.concurrent,
        )
        with ledger.component("gate", sum(work.gate(config.rollout))) as step:
            gates = gate(trunk, config.rollout, step).cpu()
        trim_heap()
        log_probs = trunk.target_log_probs.cpu()
        if not sweep:
            return Finding.of_gate(gates, trunk.targets, log_probs), budget
        parts, screening = self._information(trunk, vector, gates, budget, ledger)
        trim_heap(budget.workers)
        together = budget.workers
        budget.workers = 1 if runs_alone(trunk.length, work.width) else together
        ledger.workers = {"information": together, "curvature": budget.workers}
        parts, stderr, quality = self._curvature(trunk, parts, budget, ledger)
        budget.workers = together
        return Finding(parts, stderr, screening, trunk.targets, log_probs, quality), budget

    def _information(
        self, trunk: Trunk, vector: Tensor, gates: Tensor, budget: Budget, ledger: Ledger
    ) -> tuple[Components, Screening | None]:
        """The components with gate, I and drop filled in, and what screening left out."""
        config, work, screening = self.config, trunk.work, None
        expected = sum(work.branch(start) for start in range(work.tokens))
        expected += work.tokens * work.targets * work.logits
        with ledger.component("information", expected) as step:
            if config.coverage is None and config.branch_tolerance is None:
                tokens = range(trunk.prompt_length)
                exact = ExactBranches(trunk, vector)
                kl, drop = information(exact, tokens, budget, ledger, step)
            else:
                kl, drop, screening = screened_information(
                    trunk, vector, gates, config, budget, ledger, step
                )
        later = torch.zeros_like(kl)
        sums = None if screening is None else screening.sums
        return Components(gates, later, kl, drop, later, sums), screening

    def _curvature(
        self,
        trunk: Trunk,
        parts: Components,
        budget: Budget,
        ledger: Ledger,
    ) -> tuple[Components, Tensor | None, Quality | None]:
        """The components with S and `|grad g|_1` filled in as well, the standard error of S, and
        the quality of the low-rank approximation where there is one.

        Targets are taken in groups whose adjoints fit into memory together.
        """
        config, count = self.config, trunk.prompt_length
        hessian = config.curvature == "hessian"
        products = product_count(config, count, trunk.work.width) if hessian else 0
        # One long sequence at a time has no other in its batch to share them with.
        if products and (config.estimator == "block" or 2 * trunk.length <= budget.rows):
            trunk = trunk.with_derivatives()
        found: list[Curvature] = []
        norms: list[Tensor] = []
        groups = Budget(min(len(trunk.targets), targets_at_once(trunk.swept_bytes)))
        sizes = [part.stop - part.start for part in slices(len(trunk.targets), groups.rows)]
        done, counted, rows = 0, ledger.counts["hvp"], budget.rows

        def run(first: int, stop: int) -> tuple[Curvature, Tensor]:
            # A group too large for memory is begun anew, in two: its work comes on top, and the
            # batches that it shrank in vain are as before.
            step.skip(done - step.done)
            ledger.counts["hvp"], budget.rows = counted, rows
            adjoints = [run_adjoint(trunk, target, products, step) for target in range(first, stop)]
            trim_heap()
            gradients = [adjoint.gradient[:count] for adjoint in adjoints]
            wide_rows = [row.to(wide(row.dtype)) for row in gradients]
            sums = torch.stack([row.abs().sum(-1).cpu() for row in wide_rows])
            others = replace(parts.rows(slice(first, stop)), gradient_norm=sums)
            enough = partial(settled, others, config=config)
            return curvature(trunk, adjoints, config, budget, ledger, step, enough), sums

        def keep(first: int, stop: int, result: tuple[Curvature, Tensor]) -> None:
            nonlocal done, counted, rows
            found.append(result[0])
            norms.append(result[1])
            done, counted, rows = step.done, ledger.counts["hvp"], budget.rows

        with ledger.component("curvature", curvature_work(trunk.work, sizes, config)) as step:
            done = step.done  # of the windows before
            run_batches(len(trunk.targets), groups, lambda _: groups.rows, run, keep)
        budget.halvings += groups.halvings
        errors = [part.stderr for part in found if part.stderr is not None]
        values = torch.cat([part.values for part in found])
        parts = replace(parts, curvature=values, gradient_norm=torch.cat(norms))
        stderr = torch.cat(errors) if len(errors) == len(found) else None
        return parts, stderr, Quality.joined([part.quality for part in found])

    def _metadata(
        self, decoder: Decoder, embeddings: Tensor, budget: Budget, ledger: Ledger, ran: Record
    ) -> dict[str, Any]:
        blocks = len(decoder.blocks)
        return {
            "config": self.config.to_dict(),
            "seed": self.config.seed,
            **provenance(self.model, embeddings),
            "seconds": {
                name: round(ledger.seconds[name], 6)
                for name in ("trunk", "gate", "information", "curvature", "total")
            },
            "counts": ledger.counts,
            "layers": {"used": blocks - decoder.first_of(self.config.layers), "of": blocks},
            "token_budget": budget.rows,
            "workers": ledger.workers,
            "out_of_memory_retries": budget.halvings,
            "implementation": {"curvature": _SWEEPS[self.config.curvature], **_kernels(ran)},
        }


#: How each curvature is computed.
_SWEEPS = {
    "hessian": "tangent sweeps",
    "gauss_newton": "vector-Jacobian products",
    "grad_squared": "one gradient",
    "none": "none",
}


def _kernels(ran: Record) -> dict[str, Any]:
    """What ran each operation, and with what."""
    built = native.build_info() if any("native" in names for names in ran.values()) else {}
    return {
        "kernels": {name: sorted(names) for name, names in sorted(ran.items())},
        **{key: built[key] for key in ("instruction_set", "threads") if key in built},
    }


def _reporting(
    progress: Progress | bool | None, config: HeatConfig
) -> AbstractContextManager[Progress | None]:
    """The callback that was asked for: bars, the caller's own, or None."""
    if progress is True:
        sampled = "auto" in (config.probes, config.codes)
        screened = config.coverage is not None
        return bars(bounded=["curvature"] * sampled + ["information"] * screened)
    if progress is None or progress is False:
        return nullcontext()
    if not callable(progress):
        raise InputError(
            f"progress is {type(progress).__name__}: expected True, or a callable that takes "
            "(component, done, total). Pass one of them, or leave it out."
        )
    return nullcontext(progress)

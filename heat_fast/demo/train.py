"""Trains the embedded model: tokenizer, curriculum, held-out accuracy.

    python -m heat_fast.demo.train --output DIR --seed 0
    python -m heat_fast.demo.train --evaluate

A tiny Llama reads generated passages (:mod:`heat_fast.demo.corpus`). The look-up circuit (find the
fact that has both the entity and the relation of the question, copy its answer) appears quickly on
short passages with several questions each, so training starts there and lengthens the passages
once the answers are right.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from heat_fast.demo.corpus import (
    Difficulty,
    Example,
    Split,
    lexicon,
    make_document,
    make_example,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
MAX_POSITIONS = 512
IGNORED = -100


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum; it ends at ``accuracy`` on its own validation prompts."""

    difficulty: Difficulty
    restatements: int
    questions: int
    batch: int
    accuracy: float


CURRICULUM: tuple[Stage, ...] = (
    Stage(Difficulty(sentences=(0, 0), facts=(2, 3)), questions=3, batch=64, accuracy=0.90),
    Stage(Difficulty(sentences=(0, 2), facts=(2, 4)), questions=4, batch=64, accuracy=0.95),
    Stage(Difficulty(sentences=(1, 5), facts=(3, 5)), questions=5, batch=48, accuracy=0.97),
)
FINAL = Stage(Difficulty(), questions=3, batch=48, accuracy=0.995)

LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
FINAL_STEPS = 800
MAX_CURRICULUM_STEPS = 6000
CHECK_EVERY = 50
ANSWER_WEIGHT = 1.0
TEXT_WEIGHT = 0.25


def train_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges make one token of every generator word; saved to ``directory``.

    Any other text is still encodable, byte by byte if need be. ``<s>`` is put in front by a
    post-processor, so position 0 is always the beginning-of-sequence token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging stops when every word is whole
        min_frequency=1,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lexicon(), trainer)
    # A plain template, so that a token's offsets cover its leading space and every character of a
    # prompt belongs to a token.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(directory)
    return wrapped


def build_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of about a million parameters, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model


def training_batch(
    tokenizer: PreTrainedTokenizerFast, stage: Stage, seeds: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, next-token labels and an answer mask, each ``[B, N]``, padded on the right.

    Labels are ``IGNORED`` on padding. The mask is true where the label is an answer.
    """
    documents = [make_document(seed, stage.difficulty, stage.questions, stage.restatements) for seed in seeds]
    encodings = tokenizer.backend_tokenizer.encode_batch([item.text for item in documents])
    width = max(len(encoding.ids) for encoding in encodings)
    ids = torch.full((len(documents), width), 1)
    labels = torch.full((len(documents), width), IGNORED)
    answers = torch.zeros((len(documents), width), dtype=torch.bool)
    for row, (document, encoding) in enumerate(zip(documents, encodings, strict=True)):
        count = len(encoding.ids)
        ids[row, :count] = torch.tensor(encoding.ids)
        labels[row, : count - 1] = ids[row, 1:count]
        labels[row, count - 1] = 1
        starts = {start for start, _ in document.answers}
        for index, (start, end) in enumerate(encoding.offsets):
            if start in starts and end > start:
                answers[row, index - 1] = True
    return ids, labels, answers


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, answers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted language-model loss in nats, and the mean loss on answers alone."""
    logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    text = (labels.flatten() != IGNORED) & ~answers.flatten()
    on_answers = losses[answers.flatten()].mean()
    return ANSWER_WEIGHT * on_answers + TEXT_WEIGHT * losses[text].mean(), on_answers


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    batch: int = 64,
) -> float:
    """Share of the examples whose most likely next token is the answer's token.

    Prompts are sorted by length, padded on the right (causal attention never looks there) and
    read at their last real position.
    """
    encodings = tokenizer.backend_tokenizer.encode_batch([item.prompt for item in examples])
    wanted = [tokenizer.encode(item.answer, add_special_tokens=False)[0] for item in examples]
    order = sorted(range(len(examples)), key=lambda index: len(encodings[index].ids))
    right = 0
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        lengths = torch.tensor([len(encodings[index].ids) for index in chosen])
        ids = torch.full((len(chosen), int(lengths.max())), 1)
        for row, index in enumerate(chosen):
            ids[row, : lengths[row]] = torch.tensor(encodings[index].ids)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(chosen)), lengths - 1])
        right += int((logits.argmax(-1) == torch.tensor([wanted[i] for i in chosen])).sum())
    return right / len(examples)


def train(output: Path, seed: int = 0) -> None:
    """Train tokenizer and model and write both to ``output``; progress goes to standard output.

    Raises:
        RuntimeError: the curriculum or the final stage did not reach its accuracy.
    """
    began = time.perf_counter()
    torch.use_deterministic_algorithms(True)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(output)
    model = build_model(len(tokenizer), seed)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"vocabulary {len(tokenizer)}, parameters {parameters:,}", flush=True)
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    seeds = random.Random(seed)
    step = 0

    def advance(stage: Stage, rate: float) -> float:
        nonlocal step
        model.train()
        batch = [seeds.getrandbits(48) for _ in range(stage.batch)]
        loss, on_answers = loss_of(model, *training_batch(tokenizer, stage, batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        step += 1
        return float(on_answers.detach())

    def check(stage: Stage, count: int, loss: float) -> float:
        model.eval()
        examples = [make_example(i, "validation", stage.difficulty) for i in range(count)]
        value = accuracy(model, tokenizer, examples)
        seconds = time.perf_counter() - began
        print(
            f"step {step:5d}  {seconds:6.0f} s  answer loss {loss:.3f}  validation {value:.4f}",
            flush=True,
        )
        return value

    for number, stage in enumerate(CURRICULUM):
        print(f"stage {number}: {stage}", flush=True)
        while True:
            loss = advance(stage, LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS))
            if step % CHECK_EVERY == 0 and check(stage, 200, loss) >= stage.accuracy:
                break
            if step >= MAX_CURRICULUM_STEPS:
                raise RuntimeError(
                    f"stage {number} stayed under an accuracy of {stage.accuracy} after {step} "
                    "steps; try another --seed"
                )

    print(f"final stage: {FINAL}", flush=True)
    passed = 0
    for index in range(FINAL_STEPS):
        rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * index / FINAL_STEPS))
        loss = advance(FINAL, rate)
        if step % CHECK_EVERY == 0:
            passed = passed + 1 if check(FINAL, 1000, loss) >= 0.998 else 0
            if passed == 2:
                break
    else:
        if check(FINAL, 1000, loss) < FINAL.accuracy:
            raise RuntimeError("the final stage stayed under its accuracy; try another --seed")
    model.eval()
    model.save_pretrained(output)
    print(f"trained in {time.perf_counter() - began:.0f} s, {step} steps", flush=True)


def evaluate(directory: Path, count: int = 2000, split: Split = "held_out") -> float:
    """Accuracy of the trained files in ``directory`` on seeds 0 to ``count - 1`` of a split.

    Prints it with the prompt lengths in tokens and returns it.
    """
    from heat_fast.demo import load_demo_model

    model, tokenizer = load_demo_model(directory)
    examples = [make_example(seed, split) for seed in range(count)]
    lengths = sorted(len(tokenizer(example.prompt).input_ids) for example in examples)
    value = accuracy(model, tokenizer, examples)
    print(f"{split} seeds 0 to {count - 1}: accuracy {value:.4f} ({round(value * count)} right)")
    print(
        f"prompt tokens: min {lengths[0]}, median {lengths[len(lengths) // 2]}, max {lengths[-1]}"
    )
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: train to a folder, or reprint the accuracy of trained files."""
    parser = argparse.ArgumentParser(
        prog="python -m heat_fast.demo.train",
        description="Train the embedded model, or evaluate the trained files.",
    )
    parser.add_argument("--output", type=Path, help="folder to write the trained files to")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and training text")
    parser.add_argument("--evaluate", action="store_true", help="evaluate instead of training")
    parser.add_argument(
        "--weights", type=Path, default=Path(__file__).parent / "weights", help="to evaluate"
    )
    parser.add_argument("--count", type=int, default=2000, help="number of held-out prompts")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}; expected one or more")
    if options.evaluate:
        evaluate(options.weights, options.count)
        return 0
    if options.output is None:
        parser.error("expected --output DIR to train, or --evaluate")
    train(options.output, options.seed)
    evaluate(options.output, options.count)
    return 0


if __name__ == "__main__":
    sys.exit(main())

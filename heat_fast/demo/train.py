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
import json
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
    Stage(Difficulty((0, 0), (2, 4)), restatements=2, questions=4, batch=32, accuracy=0.90),
    Stage(Difficulty((0, 2), (3, 5)), restatements=1, questions=5, batch=32, accuracy=0.95),
    Stage(Difficulty((1, 5), (3, 5)), restatements=0, questions=5, batch=32, accuracy=0.97),
)
FINAL = Stage(Difficulty(), restatements=0, questions=3, batch=32, accuracy=0.995)

LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
FINAL_STEPS = 500
MAX_CURRICULUM_STEPS = 2000
CHECK_EVERY = 25
ANSWER_WEIGHT = 1.0
TEXT_WEIGHT = 0.25
TOPIC_WEIGHT = 0.5


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
    # The class name that every transformers 5 reads, whatever this one calls its backend.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
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
        initializer_range=0.088,  # 1 / sqrt(hidden_size)
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    _start_by_copying(model)
    return model


@torch.no_grad()
def _start_by_copying(model: LlamaForCausalLM) -> None:
    """Start every head as a copier and every second one as a matcher of like tokens.

    The output projection starts as the transposed value projection (what is read is written back)
    and the query of odd heads close to their key (like attends to like). Looking up and copying
    then form in a few hundred steps; everything is trained on from there.
    """
    config = model.config
    heads = config.num_attention_heads
    groups = config.num_key_value_heads or heads
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.35)  # small residual updates at the start
        attention = layer.self_attn
        width = attention.head_dim
        query = attention.q_proj.weight.view(heads, width, -1)
        key = attention.k_proj.weight.view(groups, width, -1)
        value = attention.v_proj.weight.view(groups, width, -1)
        output = attention.o_proj.weight.view(-1, heads, width)
        for head in range(heads):
            group = head * groups // heads
            output[:, head] = 0.3 * value[group].T
            if head % 2:
                query[head] = 0.7 * key[group] + 0.5 * query[head]


@dataclass(frozen=True)
class Batch:
    """Training text as tensors, padded on the right.

    ``ids``, ``labels`` (the next token, ``IGNORED`` on padding) and ``answers`` (true where the
    label is a looked-up answer) are ``[B, N]``. ``rows``, ``columns``, ``entities`` and
    ``relations`` are ``[M]``: places where the model should know which entity and relation are
    being spoken of, and the tokens of these two.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    answers: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    entities: torch.Tensor
    relations: torch.Tensor


def training_batch(tokenizer: PreTrainedTokenizerFast, stage: Stage, seeds: Sequence[int]) -> Batch:
    """The training documents of the given seeds."""
    documents = [
        make_document(seed, stage.difficulty, stage.questions, stage.restatements) for seed in seeds
    ]
    encodings = tokenizer.backend_tokenizer.encode_batch([item.text for item in documents])
    width = max(len(encoding.ids) for encoding in encodings)
    vocabulary = tokenizer.get_vocab()
    end_of_text = vocabulary[EOS]
    ids = torch.full((len(documents), width), end_of_text)
    labels = torch.full((len(documents), width), IGNORED)
    answers = torch.zeros((len(documents), width), dtype=torch.bool)
    places: list[tuple[int, int, int, int]] = []
    for row, (document, encoding) in enumerate(zip(documents, encodings, strict=True)):
        count = len(encoding.ids)
        ids[row, :count] = torch.tensor(encoding.ids)
        labels[row, : count - 1] = ids[row, 1:count]
        labels[row, count - 1] = end_of_text
        index_of = {span: index for index, span in enumerate(encoding.offsets)}
        for mentions, shift in ((document.stated, 0), (document.asked, 1)):
            for mention in mentions:
                column = index_of[mention.span] - shift
                entity = vocabulary[f"Ġ{mention.entity}"]  # Ġ: the leading space
                relation = vocabulary[f"Ġ{mention.relation}"]
                places.append((row, column, entity, relation))
                if shift:
                    answers[row, column] = True
    rows, columns, entities, relations = torch.tensor(places).unbind(1)
    return Batch(ids, labels, answers, rows, columns, entities, relations)


class TopicReadout(torch.nn.Module):
    """Auxiliary head, dropped after training: which entity and relation are being spoken of.

    Reads the residual stream half way up. It teaches the lower blocks to bring both words to the
    answer of a fact and to the end of a question; how the upper blocks compare the two and copy
    the answer is left to the language-model loss.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.entity = torch.nn.Linear(width, width, bias=False)
        self.relation = torch.nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats of both words at the batch's places."""
        state = F.rms_norm(hidden[batch.rows, batch.columns], hidden.shape[-1:])
        entity = F.cross_entropy(self.entity(state) @ embedding.T, batch.entities)
        relation = F.cross_entropy(self.relation(state) @ embedding.T, batch.relations)
        return entity + relation


def loss_of(
    model: LlamaForCausalLM, readout: TopicReadout, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted training loss in nats, with the mean losses on answers and of the readout."""
    outputs = model(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
    labels, answers = batch.labels.flatten(), batch.answers.flatten()
    losses = F.cross_entropy(outputs.logits.flatten(0, 1), labels, reduction="none")
    on_answers = losses[answers].mean()
    on_text = losses[(labels != IGNORED) & ~answers].mean()
    middle = outputs.hidden_states[model.config.num_hidden_layers // 2]
    topic = readout(middle, model.get_input_embeddings().weight, batch)
    total = ANSWER_WEIGHT * on_answers + TEXT_WEIGHT * on_text + TOPIC_WEIGHT * topic
    return total, on_answers, topic


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
        ids = torch.zeros((len(chosen), int(lengths.max())), dtype=torch.long)
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
    # One thread: sums are then added in the same order whatever the number of cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(output)
    model = build_model(len(tokenizer), seed)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"vocabulary {len(tokenizer)}, parameters {parameters:,}", flush=True)
    readout = TopicReadout(model.config.hidden_size)
    trained = [*model.parameters(), *readout.parameters()]
    decayed = [weight for weight in trained if weight.ndim > 1]
    others = [weight for weight in trained if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    seeds = random.Random(seed)
    step = 0

    def advance(stage: Stage, rate: float) -> str:
        nonlocal step
        model.train()
        batch = [seeds.getrandbits(48) for _ in range(stage.batch)]
        loss, on_answers, topic = loss_of(model, readout, training_batch(tokenizer, stage, batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        step += 1
        return f"answer loss {on_answers.detach():.3f}  topic loss {topic.detach():.3f}"

    def check(stage: Stage, count: int, loss: str) -> float:
        model.eval()
        examples = [make_example(i, "validation", stage.difficulty) for i in range(count)]
        value = accuracy(model, tokenizer, examples)
        seconds = time.perf_counter() - began
        print(
            f"step {step:5d}  {seconds:6.0f} s  {loss}  validation {value:.4f}",
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
    from heat_fast.demo import load_files

    model, tokenizer = load_files(directory)
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

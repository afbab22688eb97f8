"""The HEAT paper's runtimes beside the floor of what it states: arithmetic, nothing is run.

    python bench/paper_floor.py        # prints the rows and writes results/paper-floor.json

For every row of the paper's Tables 9, 10, 12 and 15 to 18: the paper's seconds per example; the
floating-point operations of the definition (`heat_fast.cost.flops` on the model's shape, without
weights), with one probe, the fewest there can be, and with every suffix run on a shared trunk, the
cheapest way known to mask each token; and the seconds that these take at an A100's 312 TFLOP/s, the
peak of its tensor cores in bfloat16, which no program reaches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, Phi3Config, Qwen2Config

from heat_fast import HeatConfig
from heat_fast.cost import flops
from heat_fast.decoder import view

RESULTS = Path(__file__).resolve().parent / "results"
A100 = 312e12  # FLOP/s, dense, bfloat16: NVIDIA's data sheet
LONG = 8192
MODELS = {
    "GPT-J-6B": GPTJConfig(n_positions=LONG),
    "Phi-3-medium": Phi3Config(
        hidden_size=5120,
        intermediate_size=17920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
        max_position_embeddings=LONG,
        original_max_position_embeddings=LONG,
    ),
    "Qwen2.5-3B": Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=LONG,
    ),
}
FULL: dict[str, Any] = {"variant": "full"}
LOW_RANK: dict[str, Any] = {"variant": "lr", "rank": 64}
WINDOWS: dict[str, Any] = {"variant": "win", "window": 512, "overlap": 0.5}
BOTH = {**LOW_RANK, **WINDOWS, "variant": "lr+win"}


def last(layers: int) -> dict[str, Any]:
    """Gate and curvature through the last blocks alone."""
    return {"variant": "ls", "layers": layers}


# Table, model, tokens, examples, and for each row its name, the paper's seconds and the settings.
TABLES: list[tuple[int, str, int, int, list[tuple[str, float, dict[str, Any]]]]] = [
    (
        9,
        "GPT-J-6B",
        512,
        1000,
        [
            ("Full", 455, FULL),
            ("LR", 330, LOW_RANK),
            ("LS, 6 layers", 305, last(6)),
            ("GS", 240, {"variant": "gs"}),
        ],
    ),
    (
        10,
        "GPT-J-6B",
        2048,
        1000,
        [
            ("Full", 1230, FULL),
            ("WIN", 690, WINDOWS),
            ("LR+WIN", 580, BOTH),
            ("LS+WIN", 525, {**WINDOWS, "variant": "ls+win", "layers": 6}),
        ],
    ),
    (
        12,
        "GPT-J-6B",
        2048,
        1000,
        [
            ("Full", 1280, FULL),
            ("LR", 850, LOW_RANK),
            ("WIN", 690, WINDOWS),
            ("LS, 6 layers", 760, last(6)),
            ("LR+WIN", 610, BOTH),
        ],
    ),
    *(
        (
            number,
            model,
            1024,
            1000,
            [
                ("Full", seconds[0], FULL),
                ("LR", seconds[1], LOW_RANK),
                ("LS, 4 layers", seconds[2], last(4)),
                ("WIN", seconds[3], WINDOWS),
                ("LR+WIN", seconds[4], BOTH),
            ],
        )
        for number, model, seconds in (
            (15, "GPT-J-6B", (455, 330, 305, 295, 245)),
            (16, "Phi-3-medium", (520, 375, 345, 325, 275)),
            (17, "Qwen2.5-3B", (310, 235, 220, 205, 180)),
        )
    ),
    (
        18,
        "Llama-3.1-70B",
        2048,
        500,
        [
            ("Full, 6 layers", 1180, last(6)),
            ("LR, 6 layers", 860, {**LOW_RANK, "layers": 6}),
            ("WIN, 6 layers", 720, {**WINDOWS, "layers": 6}),
            ("LR+WIN, 6 layers", 620, {**BOTH, "layers": 6}),
        ],
    ),
]


def rows() -> list[dict[str, Any]]:
    """All rows of all tables."""
    found = []
    for number, model, tokens, examples, lines in TABLES:
        with torch.device("meta"):
            decoder = view(AutoModelForCausalLM.from_config(MODELS[model]), tokens)
        for name, seconds, settings in lines:
            chosen = dict(settings)
            config = HeatConfig.preset(chosen.pop("variant"), probes=1, **chosen)
            cost = flops(decoder, tokens, 1, config)
            floor = sum(cost.values()) / A100
            information = cost["information"] / A100
            found.append(
                {
                    "table": number,
                    "model": model,
                    "tokens": tokens,
                    "variant": name,
                    "paper_seconds": seconds / examples,
                    "flops": cost,
                    "floor_seconds": floor,
                    "information_seconds": information,
                    "times_under_floor": floor / (seconds / examples),
                    "times_under_information": information / (seconds / examples),
                }
            )
    return found


def main() -> None:
    found = rows()
    for row in found:
        print(
            f"Table {row['table']}, {row['model']}, {row['tokens']}, {row['variant']}: paper "
            f"{row['paper_seconds']:.3f} s, floor {row['floor_seconds']:.1f} s, of which "
            f"information {row['information_seconds']:.1f} s: {row['times_under_floor']:.0f} and "
            f"{row['times_under_information']:.0f} times under"
        )
    report = {"flop_rate": A100, "rows": found}
    (RESULTS / "paper-floor.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

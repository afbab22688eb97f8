"""Attributions with the GPU kernels against torch alone.

On a GPU the model runs there, and torch alone on the CPU; without one, Triton's interpreter serves
on the CPU. Both in float32: components agree as two float32 runs of three tiny blocks do, whose
sums of some hundred terms are taken in another order (1e-4 of the largest entry).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import families
from assertions import assert_close
from heat_fast import Attributor, HeatConfig, gpu
from heat_fast.errors import ConfigError

LENGTH = 9
SETTINGS: dict[str, dict[str, Any]] = {
    "block": {"probes": 2},
    "coded": {"estimator": "coded", "probes": 2, "codes": 4, "rollout": "input_path"},
    "low_rank": {"estimator": "low_rank", "probes": 3, "rank": 4},
    "row": {"estimator": "row", "probes": 2},
}
ALWAYS = {"attention_flow", "value_output_norms", "masked_kl"}
OF_SETTING = {
    "block": {"block_probes", "row_norms"},
    "coded": {"dense_probes", "coded_sums", "coded_moments"},
    "low_rank": {"block_norms", "rademacher"},
    "row": {"dense_probes", "row_norms"},
}


@pytest.mark.parametrize(
    ("name", "setting"),
    [("llama", "block"), ("gemma2", "coded"), ("gptj", "low_rank"), ("mistral", "row")],
)
def test_attributions(
    name: str, setting: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.build(name, dtype=torch.float32)
    ids = families.prompt_ids(name, LENGTH)
    config = HeatConfig(kernels="reference", **SETTINGS[setting])
    plain = Attributor(model, None, config).attribute(ids, [5, 7])
    if gpu.interpreted():
        # What "triton" would choose on a GPU, here in the interpreter.
        serves = gpu.serves
        monkeypatch.setattr(gpu, "serves", lambda *tensors, asked: serves(*tensors, asked=True))
    choice = "auto" if gpu.interpreted() else "triton"
    attributor = Attributor(model.to(triton_device), None, config.replace(kernels=choice))
    found = attributor.attribute(ids, [5, 7])
    ran = found.metadata["implementation"]["kernels"]
    for operation in ALWAYS | OF_SETTING[setting]:
        assert "triton" in ran[operation], f"{operation} ran {ran[operation]}"
    for part in ("gate", "curvature", "information", "log_prob_drop"):
        assert_close(part, getattr(plain, part), getattr(found, part), rtol=1e-4)


def test_triton_asks_for_a_model_on_the_gpu() -> None:
    attributor = Attributor(families.build("llama"), None, HeatConfig(kernels="triton"))
    with pytest.raises(ConfigError, match="kernels='triton' cannot run"):
        attributor.attribute(families.prompt_ids("llama", LENGTH), 5)

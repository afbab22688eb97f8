"""Other packages on the same prompt and model in the same run: seconds, memory, what each returns.

Each is called as its documentation says; none is tuned. A package that is not installed, or that
refuses the model, is skipped with its reason (`pip install -e '.[bench]'` installs them). Peak
memory is that of a separate call in a process of its own.

    make bench JSON=peers-cpu PYTEST_ARGS="-k peers"
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from baselines.peers import PEERS, Peer, load, text_of
from sizes import SMALL, size

from conftest import MODELS

if TYPE_CHECKING:
    from conftest import Summary

HERE = Path(__file__).resolve().parent
STORIES = MODELS / "stories3M"
LENGTHS = {"embedded": size(128), "stories3M": size(256)}
HEAT = next(iter(PEERS))


@pytest.fixture(scope="session", params=LENGTHS)
def asked(request: pytest.FixtureRequest) -> tuple[str, str, Any, Any, str, str]:
    """Model's name, where it lies, model, tokenizer, prompt, target."""
    where = "embedded" if request.param == "embedded" else str(STORIES)
    if where != "embedded" and not (STORIES / "config.json").is_file():
        pytest.skip(f"no model at {STORIES} (HEAT_FAST_MODELS names the folder to look in)")
    model, tokenizer = load(where)
    return (
        request.param,
        where,
        model,
        tokenizer,
        *text_of(model, tokenizer, LENGTHS[request.param]),
    )


@pytest.fixture(scope="session")
def medians() -> dict[tuple[str, str], float]:
    """Median seconds by model and method, of this run."""
    return {}


@pytest.mark.parametrize("name", PEERS)
def test_peers(
    benchmark: Any,
    asked: tuple[str, str, Any, Any, str, str],
    name: str,
    medians: dict[tuple[str, str], float],
    summary: Summary,
) -> None:
    """One target token; the first method is what the others are told as a ratio to."""
    peer: Peer = PEERS[name]
    if peer.version is None:
        pytest.skip(f"{peer.package} is not installed: pip install -e '.[bench]'")
    label, where, model, tokenizer, prompt, target = asked
    if peer.package is not None:
        try:
            peer.run(model, tokenizer, prompt, target)
        except Exception as error:
            pytest.skip(f"{peer.package} {peer.version} does not run here: {error!r}"[:300])
    rounds = 1 if SMALL or "authors" in name else 3
    scores = benchmark.pedantic(lambda: peer.run(model, tokenizer, prompt, target), rounds=rounds)
    medians[label, name] = benchmark.stats.stats.median
    memory = None if SMALL else peak(name, where, LENGTHS[label])
    ratio = medians[label, name] / medians[label, HEAT] if (label, HEAT) in medians else None
    benchmark.extra_info.update(
        method=name,
        model=label,
        tokens=len(tokenizer(prompt).input_ids),
        scores=scores.numel(),
        package=peer.package,
        version=peer.version,
        returns=peer.returns,
        beyond_model=memory,
        ratio=ratio,
    )
    told = "unknown" if memory is None else f"{memory / 1e6:.0f} MB"
    times = "" if ratio is None else f", {ratio:.2f} times {HEAT}"
    summary.add(f"{label}: {name}", f"{medians[label, name]:.3f} s, {told}{times}")


def peak(name: str, where: str, tokens: int) -> int | None:
    """Bytes beyond what was held before, in a process of its own; None where it is not told."""
    command = [sys.executable, str(HERE / "baselines" / "peers.py"), name, where, str(tokens)]
    outcome = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: int | None = json.loads(outcome.stdout.splitlines()[-1])["beyond_model"]
    return told

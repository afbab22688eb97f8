"""What the GPU benchmarks of single operations time: each at the shapes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sizes import SMALL
from torch import Tensor

from heat_fast.kernels import masked_kl, rademacher, value_norm_rollout
from heat_fast.kernels.branch_attention import Masking
from heat_fast.kernels.low_rank import block_norms

#: Dense products at a time, and branches or probes that share a trunk.
PRODUCTS, SHARING = 8, 4
#: Entries of the vocabulary that a chunk of the head's logits has.
CHUNK = 1 << 15


@dataclass(frozen=True)
class Model:
    """The sizes that count: width, query heads, key-value heads, head width, vocabulary."""

    width: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int

    @property
    def group(self) -> int:
        """Query heads to a key-value head."""
        return self.heads // self.key_heads


MODELS = {
    "GPT-J-6B": Model(4096, 16, 16, 256, 50400),
    "Qwen2.5-3B": Model(2048, 16, 2, 128, 151936),
    "Phi-3-medium": Model(5120, 40, 10, 128, 32064),
    "Llama-3.1-70B": Model(8192, 64, 8, 128, 128256),
}
#: The longest first: it fills the device best, and a run may be cut off.
LENGTHS = (2048, 1024, 512)
HALF = "bfloat16"
if SMALL:  # Triton's interpreter multiplies bfloat16 wrongly
    MODELS, LENGTHS, HALF = {"tiny": Model(64, 4, 2, 16, 500)}, (16,), "float16"


@dataclass(frozen=True)
class Case:
    """One operation at one shape: the kernel, torch's counterpart, and what has to be done.

    `bytes` and `flops` are counted as in the operation's README. Where `eager` makes the first part
    of the result alone, it costs `share` times its time and its memory. `rtol` bounds the largest
    difference, as a share of the largest entry.
    """

    kernel: Callable[[], Any]
    eager: Callable[[], Any]
    bytes: float
    flops: float
    rtol: float
    share: int = 1


@dataclass(frozen=True)
class Inputs:
    """Where a case makes its tensors, and of what dtype."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        return torch.randn(size, device=self.device).to(dtype or self.dtype)

    def count(self, end: int) -> Tensor:
        """`0 .. end - 1`."""
        return torch.arange(end, device=self.device)


def value_norms(model: Model, length: int, inputs: Inputs) -> Case:
    """`|V W_O|_1`: eager takes one product per head, as a plain implementation would."""
    value = inputs.normal(model.key_heads, length, model.head)
    weight = inputs.normal(model.width, model.heads * model.head)

    def eager() -> Tensor:
        parts = weight.unflatten(1, (model.key_heads, model.group, model.head))
        norms = [
            (value[head] @ parts[:, head, member].t()).float().abs().sum(-1)
            for head in range(model.key_heads)
            for member in range(model.group)
        ]
        return torch.stack(norms).view(model.key_heads, model.group, length)

    def kernel() -> Tensor:
        return value_norm_rollout.value_output_norms(value, weight, torch.float32, impl="triton")

    moved = value.nbytes + weight.nbytes + 4 * model.heads * length
    flops = 2.0 * length * model.width * model.heads * model.head
    return Case(kernel, eager, moved, flops, 1e-2)


def flow(model: Model, length: int, inputs: Inputs) -> Case:
    """The column sweep of one target, over a block whose every row counts."""
    query = inputs.normal(model.key_heads, model.group, length, model.head)
    key = inputs.normal(model.key_heads, length, model.head)
    rho = torch.rand(1, length, device=inputs.device)
    masking = Masking(model.head**-0.5)
    hidden = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)

    def scores() -> Tensor:
        raw = (query.flatten(1, 2) @ key.mT).float() * masking.scale
        raw = raw.view(model.key_heads, model.group, length, length)
        return raw.masked_fill(hidden, float("-inf"))

    normaliser = scores().logsumexp(-1)

    def eager() -> Tensor:
        return rho @ (scores() - normaliser[..., None]).exp()

    def kernel() -> Tensor:
        return value_norm_rollout.attention_flow(
            query, key, normaliser, rho, masking, impl="triton"
        )

    moved = query.nbytes + key.nbytes + 4 * length * (2 * model.heads + 1)
    flops = float(model.heads * model.head * length * (length + 1))
    return Case(kernel, eager, moved, flops, 2e-2)


def divergence(model: Model, length: int, inputs: Inputs) -> Case:
    """As many branches as tokens, from final hidden states."""
    hidden = inputs.normal(length, model.width) / model.width**0.5
    weight = inputs.normal(model.vocabulary, model.width)
    trunk = (hidden[:1] @ weight.t()).float()
    log_probs, normaliser = trunk.log_softmax(-1), trunk.logsumexp(-1)
    target = torch.tensor([7], device=inputs.device)

    def eager() -> tuple[Tensor, Tensor]:
        log_q = (hidden @ weight.t()).float().log_softmax(-1)
        drop = log_probs[:, target] - log_q[:, target]
        return (log_probs.exp() * (log_probs - log_q)).sum(-1, keepdim=True), drop

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        for low in range(0, model.vocabulary, CHUNK):
            part = slice(low, min(low + CHUNK, model.vocabulary))
            yield part, (hidden @ weight[part].t())[:, None]

    def kernel() -> tuple[Tensor, Tensor]:
        return masked_kl.masked_kl_streamed(log_probs, normaliser, chunks(), target, impl="triton")

    logits = inputs.dtype.itemsize * length * model.vocabulary
    moved = weight.nbytes + hidden.nbytes + 2 * logits + log_probs.nbytes
    flops = 2.0 * length * model.vocabulary * model.width
    return Case(kernel, eager, moved, flops, 2e-2)


def dense_probes(model: Model, length: int, inputs: Inputs) -> Case:
    """Coded probes written into the tangent buffer."""
    samples = torch.zeros(1, dtype=torch.int64, device=inputs.device)
    arguments = length, length, model.width, inputs.dtype, inputs.count(PRODUCTS)

    def call(impl: str) -> Tensor:
        return rademacher.dense_probes(0, samples, *arguments, impl=impl)

    moved = PRODUCTS * length * model.width * inputs.dtype.itemsize
    return Case(lambda: call("triton"), lambda: call("reference"), moved, 0, 0)


def coded(model: Model, length: int, inputs: Inputs) -> Case:
    """Un-signing and the moments of the codes' products."""
    rows, codes = inputs.normal(PRODUCTS, length, model.width), inputs.count(PRODUCTS)

    def call(impl: str) -> tuple[Tensor, Tensor, Tensor]:
        sums = rademacher.coded_sums(rows, codes, length, impl=impl)
        return rademacher.coded_moments(*sums, PRODUCTS, 4096, impl=impl)

    moved = rows.nbytes + 4 * 4 * length * model.width
    return Case(lambda: call("triton"), lambda: call("reference"), moved, 0, 1e-3)


def norms_of_rows(model: Model, length: int, inputs: Inputs) -> Case:
    """`|x|_1` of the rows of dense products."""
    rows = inputs.normal(PRODUCTS, length, model.width)

    def call(impl: str) -> Tensor:
        return rademacher.row_norms(rows, impl=impl)

    moved = rows.nbytes + 4 * PRODUCTS * length
    return Case(lambda: call("triton"), lambda: call("reference"), moved, 0, 1e-3)


def low_rank_norms(model: Model, length: int, inputs: Inputs) -> Case:
    """Block norms of 10 probes from factors of rank 64, in float32 whatever the model's dtype."""
    vectors = inputs.normal(length, model.width, 64, dtype=torch.float32)
    vectors /= (length * model.width) ** 0.5
    values, samples = inputs.normal(1, 64, dtype=torch.float32), inputs.count(10)

    def call(impl: str) -> Tensor:
        return block_norms(vectors, values, 0, samples, impl=impl)

    moved = vectors.nbytes + 4 * 10 * length
    flops = 4.0 * 10 * 64 * length * model.width
    return Case(lambda: call("triton"), lambda: call("reference"), moved, flops, 1e-3)

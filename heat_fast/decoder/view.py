"""The uniform view of a decoder-only language model, and the registry of families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heat_fast.decoder.block import Block
from heat_fast.decoder.head import Head
from heat_fast.decoder.linear import Linear, is_hooked
from heat_fast.errors import UnsupportedModelError


@dataclass(frozen=True)
class Decoder:
    """A causal LM as its input, its blocks and its head, over the model's own submodules.

    The residual stream starts as `x = s X + positions`: `X [T, d]` are the input embeddings (what
    Hugging Face calls `inputs_embeds`), `s` a factor of the model's (Granite; else 1), `positions
    [T, d]` the learned position embeddings or None.
    A view is made for a context of `length` tokens, because rotary tables may depend on it.
    """

    model: nn.Module
    length: int
    blocks: tuple[Block, ...]
    head: Head
    positions: Tensor | None
    embedding_scale: float = 1.0

    @property
    def embeddings_weight(self) -> Tensor:
        """The embedding matrix, `[vocabulary, d]`."""
        model: Any = self.model
        weight: Tensor = model.get_input_embeddings().weight
        return weight

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, d."""
        return int(self.embeddings_weight.shape[-1])

    def first_of(self, layers: int | None) -> int:
        """Index of the first of the last `layers` blocks; 0 for None, or where there are fewer."""
        return 0 if layers is None else max(0, len(self.blocks) - layers)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The affine submodules of all blocks and of the head."""
        blocks = (linear for block in self.blocks for linear in block.linears)
        return (*blocks, self.head.projection)

    @property
    def plain(self) -> bool:
        """Whether all affine submodules are matrices and nothing else."""
        return all(linear.weight is not None for linear in self.linears)

    @property
    def concurrent(self) -> bool:
        """Whether several threads may run the blocks at once.

        Plain layers keep no state. Of anything else (hooks that fetch weights, adapters,
        quantised kernels) nothing is known.
        """
        activations = [each for block in self.blocks for each in block.mlp.activations]
        return self.plain and all(
            not isinstance(activation, nn.Module) or not is_hooked(activation)
            for activation in activations
        )

    def scale(self, x: Tensor) -> Tensor:
        """`s x`: embeddings as the stream takes them; also the tangent and the adjoint of that."""
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale

    def enter(self, embeddings: Tensor, at: int | Tensor) -> Tensor:
        """The residual stream `[.., S, d]` of embeddings.

        `at`: the position of their first row, or the positions `[S]` of all.
        """
        embeddings = self.scale(embeddings)
        if self.positions is None:
            return embeddings
        rows = at if isinstance(at, Tensor) else slice(at, at + embeddings.shape[-2])
        return embeddings + self.positions[rows]


Builder = Callable[[nn.Module, int], Decoder]
_FAMILIES: dict[str, Builder] = {}


def family(*class_names: str) -> Callable[[Builder], Builder]:
    """Register a builder for the Hugging Face classes of these names."""

    def register(builder: Builder) -> Builder:
        for name in class_names:
            _FAMILIES[name] = builder
        return builder

    return register


def supported_classes() -> tuple[str, ...]:
    """Names of the model classes that have a view, sorted."""
    import heat_fast.decoder.families  # noqa: F401  (fills the registry)

    return tuple(sorted(_FAMILIES))


def _base_model(model: nn.Module) -> nn.Module:
    """Look through an adapter wrapper (PEFT) at the causal LM inside."""
    inner = getattr(model, "get_base_model", None)
    base = inner() if callable(inner) else model
    assert isinstance(base, nn.Module)
    return base


def _active_adapter(model: nn.Module) -> Any:
    """The settings of the adapter (PEFT) in use; None where there is none, or several."""
    known, name = getattr(model, "peft_config", None), getattr(model, "active_adapter", None)
    return known.get(name) if isinstance(known, dict) and isinstance(name, str) else None


# Wrappers that stand in front of a model, and where they keep it.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
}


# How the class with a head is named after the bare model's `<name>Model`.
_HEADS = ("ForCausalLM", "LMHeadModel")


def check_supported(model: nn.Module) -> str:
    """The registered class name that serves `model`, or a clear error."""
    known = supported_classes()
    for ancestor in type(model).__mro__:
        if ancestor.__name__ in _WRAPPERS:
            raise UnsupportedModelError(
                f"{type(model).__name__} wraps a model: expected the model itself, whose "
                f"submodules are run one by one. Pass the inner one, model."
                f"{_WRAPPERS[ancestor.__name__]}."
            )
    learned = _active_adapter(model)
    if getattr(learned, "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter that learns a prompt "
            f"({type(learned).__name__}): expected a model that reads the prompt's tokens alone. "
            "Pass the model inside, model.get_base_model(), to explain it without the adapter."
        )
    base = _base_model(model)
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(base).__name__} is an encoder-decoder; attribution is defined for decoder-only "
            "language models. Load a causal language model (AutoModelForCausalLM)."
        )
    for ancestor in type(base).__mro__:
        if ancestor.__name__ in known:
            return ancestor.__name__
    for ancestor in type(base).__mro__:
        stem = ancestor.__name__.removesuffix("Model").removesuffix("Text")
        sibling = next((f"{stem}{head}" for head in _HEADS if f"{stem}{head}" in known), None)
        if ancestor.__name__.endswith("Model") and sibling is not None:
            raise UnsupportedModelError(
                f"{type(base).__name__} has no language-modelling head: expected {sibling}, which "
                "gives the probabilities to explain. Load it with "
                "AutoModelForCausalLM.from_pretrained(...)."
            )
    raise UnsupportedModelError(
        f"{type(base).__name__} is not supported: expected one of {', '.join(known)}. Choose one "
        "of these models, or add the family in heat_fast/decoder/families/ (CONTRIBUTING.md tells "
        "how)."
    )


def view(model: nn.Module, length: int) -> Decoder:
    """View a Hugging Face causal LM for contexts of `length` tokens.

    Raises `UnsupportedModelError` naming the model's class if no family knows it, or if the family
    cannot serve a setting of its config.

    Example:
        >>> from heat_fast import load_demo_model
        >>> len(view(load_demo_model().model, 16).blocks) > 0
        True
    """
    name = check_supported(model)
    try:
        with torch.no_grad():
            return _FAMILIES[name](_base_model(model), length)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"this {type(model).__name__} is not made of transformers' own submodules ({error}): "
            "expected those of its class, whose derivatives are written out. Put a submodule that "
            "was replaced back, or use a version of transformers from 5.0 on."
        ) from error


def module_device(module: nn.Module) -> torch.device | None:
    """Where a submodule computes: its hook's execution device, else its first parameter's."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    return None


__all__ = [
    "Decoder",
    "check_supported",
    "family",
    "module_device",
    "supported_classes",
    "view",
]

"""Loading the model that a command was given."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from heat_fast.cli.common import LoadError, UsageError, note
from heat_fast.errors import InputError, UnsupportedModelError
from heat_fast.files import check_model_folder


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the prompt that the embedded model explains by default."""

    model: Any
    tokenizer: Any
    example: str | None = None


def load_model(name: str | None, device: str, dtype: str, *, debug: bool) -> Loaded:
    """The named model, or the embedded one, on a device; libraries' logs are for `debug`."""
    place = _device(device)
    if not debug:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        # The hub's client reports every attempt to reach it; the error at the end says it once.
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    return _load_embedded(place, dtype) if name is None else _load(name, place, dtype)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {name} cannot be used ({reason}): expected a device of this machine. "
            "Choose cpu, or auto."
        ) from error
    if device.type == "meta":
        raise UsageError("--device meta holds no numbers: expected a real device. Choose cpu.")
    return device


def _load_embedded(device: Any, dtype: str) -> Loaded:
    import torch

    from heat_fast.demo import load_demo_model

    try:
        embedded = load_demo_model(1)
    except FileNotFoundError as error:
        raise LoadError(str(error)) from error
    model: Any = embedded.model
    model = model.to(device) if dtype == "auto" else model.to(device, getattr(torch, dtype))
    return Loaded(model, embedded.tokenizer, embedded.examples[0].prompt)


def _load(name: str, device: Any, dtype: str) -> Loaded:
    """A causal language model and its tokenizer, from a folder or the hub.

    Where it is an adapter alone, what the adapter does not bring is its base model's.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    local = os.path.isdir(name)
    try:
        check_model_folder(name)
    except InputError as error:
        raise LoadError(str(error)) from error
    options: dict[str, Any] = {"local_files_only": local}
    if not local and sys.stderr.isatty():
        note(f"there is no folder {name!r} here; asking the hub for it", False)
    with _loading(name, "configuration"):
        base = _base_of_adapter(name, **options) or name
        config = AutoConfig.from_pretrained(base, **options)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name!r} is an encoder-decoder model ({config.model_type}): expected a decoder-only "
            "language model. Choose one such as Llama, Qwen2 or GPT-2."
        )
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind: Any = AutoModelForCausalLM
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = AutoModelForImageTextToText  # its text part, where it is known
    else:
        raise UnsupportedModelError(
            f"{name!r} is a {config.model_type} model, which is not a causal language model: "
            "expected a decoder-only one. Choose one such as Llama, Qwen2 or GPT-2."
        )
    with _loading(name, "tokenizer"):
        own = base == name or os.path.isfile(os.path.join(name, "tokenizer_config.json"))
        tokenizer = AutoTokenizer.from_pretrained(name if own else base, **options)
    with _loading(name, "weights"):
        model: Any = kind.from_pretrained(name, dtype=dtype, **options)
        return Loaded(model.to(device).eval(), tokenizer)


def _base_of_adapter(name: str, **options: Any) -> str | None:
    """The model that a PEFT adapter changes; None where `name` is no adapter."""
    from transformers.utils.peft_utils import find_adapter_config_file

    found = find_adapter_config_file(name, **options)
    if found is None:
        return None
    if importlib.util.find_spec("peft") is None:
        raise ImportError("it is an adapter, and peft is not installed (pip install peft)")
    with open(found, encoding="utf-8") as file:
        return str(json.load(file)["base_model_name_or_path"])


@contextlib.contextmanager
def _loading(name: str, part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # loaders raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not os.path.isdir(name):
            there = (
                "the hub could not be reached (nor is it in the hub's cache on this machine)"
                if _is_unreachable(error)
                else f"the hub's client says: {reason}"
            )
            reason = f"there is no folder of that name here, and {there}"
        raise LoadError(
            f"cannot load the {part} of {name!r}: {_sentence(reason)} Expected a folder written by "
            "save_pretrained() or a hub id that can be reached. Check the name; --debug shows all."
        ) from error


def _is_unreachable(error: BaseException) -> bool:
    """Whether the hub's client gave up for want of a connection, somewhere behind this error."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _sentence(text: str) -> str:
    """A text that another sentence can follow."""
    text = text.rstrip().rstrip(":,;")
    return text if text.endswith((".", "!", "?")) else f"{text}."

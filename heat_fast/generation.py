"""Let the model answer, and explain the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final

import torch

from heat_fast.attributor import Attributor
from heat_fast.checks import is_whole
from heat_fast.config import HeatConfig, Settings
from heat_fast.errors import ConfigError, InputError
from heat_fast.forward import check_in_memory, context_length, unchanged, vocabularies
from heat_fast.locate import Range, TargetSpan
from heat_fast.progress import Progress
from heat_fast.prompt import encode_prompt
from heat_fast.result import Attribution

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["generate", "generate_and_attribute"]

#: Settings under which the model's own distribution decides, whatever its generation_config says;
#: those of the second only where a token is drawn.
PLAIN: Final[dict[str, Any]] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
PLAIN_SAMPLING: Final[dict[str, Any]] = {
    **PLAIN,
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "min_p": 0.0,
}

# What would change the input, or make something else than one response of it.
_TAKEN = frozenset(
    {"input_ids", "inputs", "inputs_embeds", "attention_mask", "max_new_tokens", "streamer"}
    | {"num_return_sequences", "return_dict_in_generate"}
)


def generate_and_attribute(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    *,
    variant: str = "full",
    max_new_tokens: int = 64,
    generation: Mapping[str, Any] | None = None,
    target_span: TargetSpan = None,
    score_response: bool = False,
    segments: Mapping[str, str | Range] | None = None,
    progress: Progress | bool | None = None,
    **overrides: Unpack[Settings],
) -> Attribution:
    """Generate a response to a prompt and attribute it, or a part of it, to the prompt's tokens.

    model, tokenizer, prompt, target_span, score_response, segments, progress: as for
    :func:`heat_fast.attribute`.
    max_new_tokens, generation: for the model's `generate`; `generation` holds its other arguments
    (``{"do_sample": True, "temperature": 0.7}``), which is greedy search without them. `variant`
    names a preset of `HeatConfig`; `overrides` are its fields; `seed` is that of sampling too. For
    a long response ``response_chunk=32``, say, saves memory.

    The special token that ends a response is not part of it, unless it is all there is. The
    response is in `target_tokens`, what it was generated with in ``metadata["generation"]``. The
    model, its generation settings and torch's random state are left as they were found.

    The whole prompt and `max_new_tokens - 1` tokens of the response have to fit into the model's
    context, with windows too. Where they do not, nothing is generated, though the response might
    have ended earlier: the error says the largest `max_new_tokens` that fits.

    Raises what `attribute` raises, and InputError for generation arguments that cannot be used.

    >>> import heat_fast
    >>> demo = heat_fast.load_demo_model()
    >>> prompt = demo.examples[0].prompt
    >>> result = generate_and_attribute(
    ...     demo.model, demo.tokenizer, prompt, max_new_tokens=1, variant="gs"
    ... )
    >>> result.target_tokens
    (' Fenston',)
    """
    try:
        settings = HeatConfig.preset(variant, **overrides)
    except ConfigError as error:
        if str(error).startswith("unknown setting"):
            raise ConfigError(
                f"{error} Arguments of the generation go into generation={{...}}."
            ) from error
        raise
    attributor = Attributor(model, tokenizer, settings)
    if not isinstance(generation, Mapping | None):
        raise InputError(
            f"generation is {type(generation).__name__}: expected a mapping of arguments of the "
            "model's generate(). Write generation={'temperature': 0.7}, say."
        )
    arguments = dict(generation or {})
    if segments:  # a wrong one is not to cost a response
        encode_prompt(prompt, tokenizer, vocabularies(model)[0]).named(segments)
    response = generate(
        attributor, prompt, max_new_tokens=max_new_tokens, arguments=arguments, seed=settings.seed
    )
    result = attributor.attribute(
        prompt,
        response,
        target_span=target_span,
        score_response=score_response,
        segments=segments,
        progress=progress,
    )
    told = {"max_new_tokens": int(max_new_tokens), "seed": settings.seed}
    told |= {name: _plain(value) for name, value in arguments.items()}
    return dataclasses.replace(result, metadata={**result.metadata, "generation": told})


def generate(
    attributor: Attributor,
    prompt: Any,
    *,
    max_new_tokens: int,
    arguments: Mapping[str, Any],
    seed: int,
) -> list[int]:
    """The ids of one response of the model, without the special token that ends it."""
    model: Any = attributor.model
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise InputError(
            f"max_new_tokens={max_new_tokens!r}: expected a whole number of at least 1."
        )
    taken = sorted(_TAKEN.intersection(arguments))
    if taken:
        raise InputError(
            f"generation holds {taken[0]!r}: expected arguments that choose the words of one "
            "response (do_sample, temperature, num_beams, ...). Leave it out."
        )
    device = check_in_memory(model)
    encoded = encode_prompt(prompt, attributor.tokenizer, vocabularies(model)[0])
    _check_room(len(encoded), max_new_tokens, context_length(model))
    ids = torch.tensor([encoded.token_ids], device=device)
    # The model's own generation config may ask for a record of the run in place of the ids.
    given = {"do_sample": False, "return_dict_in_generate": False, **arguments}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), unchanged(model), torch.no_grad():
        torch.manual_seed(seed)
        try:
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(max_new_tokens),
                **given,
            )
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the model cannot generate with {given}: {error}. Expected arguments of its "
                "generate(). Correct them."
            ) from error
    response: list[int] = output[0, len(encoded) :].tolist()
    return without_end(response, model, attributor.tokenizer)


def without_end(response: list[int], model: Any, tokenizer: Any) -> list[int]:
    """Without the tokens that end a response, and what pads it; all of it where that is all."""
    ends: set[Any] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(source, name, None)
            ends.update(value if isinstance(value, (list, tuple)) else [value])
    kept = list(response)
    while kept and kept[-1] in ends:
        kept.pop()
    return kept or response[:1]


def _check_room(prompt_tokens: int, max_new_tokens: int, longest: int | None) -> None:
    """Raise InputError where the longest response would not fit into the model's context.

    The prompt is read whole, also where the attribution cuts it into windows. The response may end
    earlier, but whether it does is only known once it has been generated.
    """
    needed = prompt_tokens + max_new_tokens - 1
    if longest is None or needed <= longest:
        return
    if prompt_tokens > longest:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens: expected at most {longest}, the length of the "
            "model's context, for a response is generated from the whole prompt, also where it is "
            f"explained in windows. Shorten the prompt by {prompt_tokens - longest} tokens, or "
            "pass a response that you have to attribute()."
        )
    raise InputError(
        f"max_new_tokens={max_new_tokens} behind a prompt of {prompt_tokens} tokens needs {needed} "
        f"positions (the last new token is not read): expected at most {longest}, the length of "
        f"the model's context. Pass max_new_tokens={longest - prompt_tokens + 1} or less, or "
        "shorten the prompt."
    )


def _plain(value: Any) -> Any:
    """A value as the metadata can hold it."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, Real):  # NumPy's
        return int(value) if isinstance(value, Integral) else float(value)
    return str(value)

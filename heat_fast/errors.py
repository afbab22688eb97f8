"""The errors this package raises on purpose.

Every one of them is a :class:`HeatError`, and also the built-in exception a caller would expect
(``ValueError`` for a bad argument, ``TypeError`` for a model of the wrong kind, ...), so that both
``except HeatError`` and the ordinary idiom work. Each message says what was wrong, what was
expected and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "HeatError",
    "InputError",
    "MissingPackageError",
    "NumericalError",
    "OutputError",
    "UnsupportedModelError",
]


class HeatError(Exception):
    """Base of every error raised on purpose by this package."""


class InputError(HeatError, ValueError):
    """A prompt, a target, token ids or a saved file that cannot be used."""


class ConfigError(HeatError, ValueError):
    """A setting with a wrong name, type or value, or settings that contradict each other."""


class UnsupportedModelError(HeatError, TypeError):
    """A model whose architecture this package has no decoder view for."""

    @classmethod
    def of_meta(cls, what: str) -> UnsupportedModelError:
        """The error about weights that have no values here, as where they are offloaded."""
        return cls(
            f"weights of {what} are on the meta device, without values: expected a model in "
            "memory. Load it with from_pretrained, without offloading."
        )


class NumericalError(HeatError, ArithmeticError):
    """A computation gave a value that is not finite; the message names where it came from."""


class OutputError(HeatError, OSError):
    """A result cannot be written to the place it was asked to go to."""


class MissingPackageError(HeatError, ImportError):
    """An optional package that was asked for is not installed; the message says how to get it."""

    @classmethod
    def of(cls, package: str, error: ImportError, use: str, remedy: str) -> MissingPackageError:
        """The error about `package`, which is there for `use`.

        Example:
            >>> error = MissingPackageError.of("scipy", ImportError("no scipy"), "for p", "Get it.")
            >>> str(error)
            'scipy is not installed (no scipy): expected it for p. Get it.'
        """
        return cls(f"{package} is not installed ({error}): expected it {use}. {remedy}")

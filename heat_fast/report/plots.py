"""Figures of a result: its highest tokens with their components, and targets against tokens.

They are made without pyplot, so that nothing is registered or shown by itself: save a figure, or
leave it at the end of a notebook's cell. Needs matplotlib, the optional extra ``plot``.
"""

from __future__ import annotations

import io
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from heat_fast.errors import InputError, MissingPackageError
from heat_fast.readable import text_of
from heat_fast.reading import shorten, visible
from heat_fast.report import palette
from heat_fast.result import Attribution, TopToken

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_targets", "plot_top"]

_LABEL_LENGTH = 18
_COMPONENTS = ("gate", "curvature", "information")
_MUTED = "#6a6257"


def plot_top(result: Attribution, k: int = 15, *, special: bool = True) -> Figure:
    """The k highest tokens: their scores as bars, and each component on a scale of its own.

    Components that were not measured are left out. Negative scores are blue.
    Raises InputError where k is no whole number of at least 1, MissingPackageError without
    matplotlib.
    """
    top = _top(result, k, special)
    components = [name for name in _COMPONENTS if name in result.measured]
    figure = _figure(width=4.5 + 1.5 * len(components), height=1.3 + 0.27 * len(top))
    widths = (2, *(1 for _ in components))
    (axes,) = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)
    labels = [_label(row.token, row.index) for row in top]
    for axis, name in zip(axes, ("score", *components), strict=True):
        values = [getattr(row, name) for row in top]
        step = 5 if name == "score" else 3
        axis.barh(
            range(len(top)),
            values,
            color=[(palette.COOL if each < 0 else palette.HEAT)["light"][step] for each in values],
            height=0.7,
        )
        _plain(axis)
        axis.set_title(name, fontsize=10, loc="left")
        axis.locator_params(axis="x", nbins=5 if name == "score" else 3)
        if min(values) >= 0:
            axis.set_xlim(left=0)
    axes[0].set_yticks(range(len(top)), labels=labels)
    axes[0].invert_yaxis()
    figure.suptitle(f"What led to {_targets(result)}", x=0.01, ha="left", fontsize=11)
    return figure


def plot_targets(result: Attribution, k: int = 40, *, special: bool = True) -> Figure:
    """The score of prompt tokens (columns) for every target token (rows), as colours.

    Of a longer prompt, the k tokens with the highest aggregated scores, in their order in the
    prompt. The square root of the score is coloured, as on the page, of negative scores in blue;
    the colour bar tells scores.
    Raises InputError where k is no whole number of at least 1, MissingPackageError without
    matplotlib.
    """
    columns = sorted(row.index for row in _top(result, k, special))
    scores = result.target_scores[:, torch.tensor(columns)].numpy()
    n_targets = len(result.target_ids)
    figure = _figure(width=2.6 + 0.24 * len(columns), height=1.9 + 0.24 * n_targets)
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap

    # Both arms reach as far, so that a colour's strength means the same in either.
    signed = bool((scores < 0).any())
    highest = max(float(abs(scores).max()), torch.finfo(torch.float32).tiny)
    negative = reversed(palette.COOL["light"]) if signed else ()
    axis: Any = figure.subplots()
    image = axis.imshow(
        scores,
        cmap=LinearSegmentedColormap.from_list(
            "heat", [*negative, "#ffffff", *palette.HEAT["light"]]
        ),
        norm=FuncNorm((_root, _square), vmin=-highest if signed else 0, vmax=highest),
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_xticks(
        range(len(columns)),
        labels=[_label(result.tokens[index], index) for index in columns],
        rotation=90,
    )
    axis.set_yticks(
        range(n_targets),
        labels=[_label(token, number) for number, token in enumerate(result.target_tokens)],
    )
    _plain(axis)
    whole = len(columns) == len(result)
    rank = "strongest" if signed else "highest"
    axis.set_xlabel("prompt token" if whole else f"the {len(columns)} {rank} prompt tokens")
    axis.set_ylabel("target token")
    figure.colorbar(image, ax=axis, label="score", shrink=0.9).outline.set_visible(False)
    return figure


def _top(result: Attribution, k: int, special: bool) -> list[TopToken]:
    top = result.top(k, special=special)
    if not top:
        raise InputError(
            "the prompt has special and template tokens alone: expected others to be drawn. Leave "
            "special=False out."
        )
    return top


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError.of(
            "matplotlib", error, "for figures", "Install it with pip install 'heat-fast[plot]'."
        ) from error

    class Plot(Figure):
        """A figure that notebooks show although pyplot does not know of it."""

        def _repr_png_(self) -> bytes:
            data = io.BytesIO()
            self.savefig(data, format="png", dpi=110)
            return data.getvalue()

    return Plot(figsize=(width, height), layout="constrained")


def _root(values: Any) -> Any:
    """The square root of the magnitude, with the sign of the value."""
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Any) -> Any:
    """The inverse of `_root`."""
    return np.sign(values) * np.square(values)


def _plain(axis: Axes) -> None:
    """Quiet axes: no frame, small labels."""
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=9, labelcolor=_MUTED)


def _label(token: str, index: int) -> str:
    """A token and its position, as a label that matplotlib takes literally.

    A dollar sign would begin a formula; characters without a shape of their own would be boxes.
    """
    shown = "".join(
        f"\\u{ord(character):04x}"
        if unicodedata.category(character) in ("Cf", "Co", "Cn")
        else character
        for character in visible(token)
    )
    return f"{shorten(shown, _LABEL_LENGTH)}  {index}".replace("$", r"\$")


def _targets(result: Attribution) -> str:
    text = text_of(result.target_tokens)
    return shorten(visible(text.strip(" ") or text), 60).replace("$", r"\$")

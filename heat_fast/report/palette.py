"""The colours of scores: steps of equal perceived lightness, each with the ink that reads on it.

Lightness alone orders the steps, so that no form of colour blindness confuses them. Every ramp has
one for light paper, pale to dark, and one for dark paper, dark to bright: the strongest value
always stands out most. `HEAT` is for what is present, `COOL` for negative values beside it.
"""

from __future__ import annotations

from typing import Final

__all__ = ["COOL", "HEAT", "INKS", "STEPS", "Ramp", "classes", "contrast", "ink"]

#: Of one ramp: its steps on light paper and on dark paper, weakest first.
Ramp = dict[str, tuple[str, ...]]

#: The two inks of each theme, dark and bright.
INKS: Final = {"light": ("#1d1a16", "#ffffff"), "dark": ("#17140f", "#f4f1ea")}

# OKLCH lightness 0.955 to 0.42 on light paper, 0.30 to 0.90 on dark paper.
HEAT: Final[Ramp] = {
    "light": tuple(
        "#faf1cb #f0d89f #e9bd72 #e3a042 #d7851e #c16f24 #aa5a27 #924727 #7a3525".split()
    ),
    "dark": tuple(
        "#3b2921 #593824 #784820 #975a0f #b17000 #c48a25 #d6a53f #e8c158 #f9dd73".split()
    ),
}
COOL: Final[Ramp] = {
    "light": tuple(
        "#e3f3fd #bfdff6 #9ccbef #7bb6e8 #60a0dd #4e8aca #3e74b8 #2f5ea5 #234993".split()
    ),
    "dark": tuple(
        "#232e42 #2b4262 #315783 #316ea5 #3887c0 #539fd0 #70b8e0 #8dd0f0 #b1e8fe".split()
    ),
}

#: Number of steps; 0 stands for no colour.
STEPS: Final = len(HEAT["light"])


def ink(paper: str, theme: str) -> str:
    """The ink of a theme that reads better on a colour.

    >>> ink("#faf1cb", "light")
    '#1d1a16'
    """
    return max(INKS[theme], key=lambda colour: contrast(paper, colour))


def contrast(one: str, other: str) -> float:
    """Contrast of two colours by WCAG 2, from 1 to 21.

    >>> round(contrast("#000000", "#ffffff"))
    21
    """
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def classes() -> list[tuple[str, str, str, str, str]]:
    """Of every step: its CSS class, and paper and ink on light and on dark paper.

    ``h1`` to ``h9`` are heat, ``c1`` to ``c9`` cool.
    """
    return [
        (
            f"{letter}{step + 1}",
            ramp["light"][step],
            ink(ramp["light"][step], "light"),
            ramp["dark"][step],
            ink(ramp["dark"][step], "dark"),
        )
        for letter, ramp in (("h", HEAT), ("c", COOL))
        for step in range(STEPS)
    ]

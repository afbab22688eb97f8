"""Pictures of the report page, as the documentation shows them: ``make screenshots``.

The embedded model answers one of its examples (a single target), writes question and answer
(several targets), and reads several passages (long). Needs Chromium and its driver.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

import browser as browsers
import heat_fast

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDE = (1200, 800)
PHONE = (390, 780)
#: Dots per pixel: sharp on a good screen, and still small files.
SCALE = 1.5


def main() -> None:
    """Write all pictures; ``--out FOLDER`` elsewhere than into docs/images/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    out: Path = parser.parse_args().out
    if browsers.missing():
        sys.exit(f"screenshots: {browsers.missing()}. Install it and run again.")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pages = {name: Path(folder, f"{name}.html") for name in ("answer", "several", "long")}
        for name, result in results().items():
            result.to_html(pages[name])
        with browsers.open_browser(Path(folder, "profile")) as driver:
            for name, picture in pictures(driver, pages).items():
                (out / name).write_bytes(picture)
                print(out / name)


def results() -> dict[str, Any]:
    """The attributions that are pictured."""
    demo = heat_fast.load_demo_model()
    model, tokenizer = demo.model, demo.tokenizer
    first = demo.examples[0]
    passage, question, rest = first.prompt.partition("\nQuestion:")
    others = [example.prompt.partition("\nQuestion:")[0] for example in demo.examples[1:4]]
    long = "\n".join((others[0], passage, *others[1:])) + question + rest
    return {
        "answer": heat_fast.attribute(model, tokenizer, first.prompt),
        "several": heat_fast.attribute(
            model,
            tokenizer,
            passage + question,
            target=rest + first.answer,
            variant="gs",
        ),
        "long": heat_fast.attribute(model, tokenizer, long, variant="gs"),
    }


def pictures(driver: Any, pages: dict[str, Path]) -> dict[str, bytes]:
    """Each picture as PNG, by the name of its file."""
    last_target = "Array.from(document.querySelectorAll('.target')).pop().click()"
    # A span over the sentence with the evidence, and the slider a little up.
    span = """
        const cells = Array.from(document.querySelectorAll(".t"));
        const last = cells.findIndex((cell) => cell.textContent === "Fenston");
        const fire = (cell, kind) => cell.dispatchEvent(
          new PointerEvent(kind, {bubbles: true, button: 0, pointerType: "mouse"}));
        fire(cells[last - 5], "pointerdown");
        fire(cells[last], "pointerover");
        window.dispatchEvent(new PointerEvent("pointerup"));
    """
    return {
        "report-light.png": picture(driver, pages["answer"], WIDE),
        "report-dark.png": picture(driver, pages["several"], WIDE, scheme="dark", act=last_target),
        "report-mobile.png": picture(driver, pages["answer"], PHONE, mobile=True),
        "report-long.png": picture(driver, pages["long"], WIDE, component="gate", act=span),
    }


def picture(
    driver: Any,
    page: Path,
    size: tuple[int, int],
    *,
    scheme: str = "light",
    mobile: bool = False,
    component: str = "score",
    act: str = "",
) -> bytes:
    """The upper part of a page, coloured by a component, after a script has acted on it."""
    browsers.set_screen(driver, *size, scale=SCALE, mobile=mobile)
    browsers.set_media(driver, scheme=scheme)
    driver.get(page.as_uri())
    driver.execute_script(
        "document.querySelector(`input[value=${arguments[0]}]`).click()", component
    )
    driver.execute_script(act)
    return smaller(driver.get_screenshot_as_png())


def smaller(png: bytes) -> bytes:
    """The same picture in 200 colours, which is all that a page of flat colours needs."""
    data = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    # By coverage: the steps of the legend are small, and must stay apart.
    image = image.quantize(200, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(data, format="PNG", optimize=True)
    return data.getvalue()


if __name__ == "__main__":
    main()

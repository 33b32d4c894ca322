"""Draw the documentation's figures, each for light and for dark pages.

python tools/draw_figures.py            # writes docs/figures/*.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "docs" / "figures"

THEMES = {
    "light": {
        "ink": "#1f2d2c",
        "faint": "#6d7f7d",
        "line": "#c3cfcd",
        "empty": "#f1f5f4",
        "prefix": "#8a97a3",
        "c1": "#00897b",
        "c2": "#3f7fbf",
        "c3": "#7a5fb5",
        "query": "#d9772b",
        "paper": "#ffffff",
    },
    "dark": {
        "ink": "#e3ecea",
        "faint": "#9db0ad",
        "line": "#4a5759",
        "empty": "#2b3236",
        "prefix": "#97a5b1",
        "c1": "#26b3a3",
        "c2": "#64a3e0",
        "c3": "#a58be0",
        "query": "#f0954a",
        "paper": "#1e2129",
    },
}

#: Name, label and tokens of the parts of the prompt that is drawn.
PARTS = (
    ("prefix", "prefix", 2),
    ("c1", "context 1", 4),
    ("c2", "context 2", 3),
    ("c3", "context 3", 5),
    ("query", "query", 3),
)


class Drawing:
    """Elements of one SVG file.

    Parameters
    ----------
    width, height : int
        Size in pixels.
    theme : dict
        Colours by name.
    title : str
        What it shows, for those who cannot see it.
    """

    def __init__(self, width: int, height: int, theme: dict[str, str], title: str) -> None:
        self.theme = theme
        self.items = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, '
            f'sans-serif" font-size="14">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{theme["faint"]}"/>'
            "</marker></defs>",
        ]

    def box(self, x: float, y: float, w: float, h: float, fill: str, **more: object) -> None:
        """Draw a rectangle; ``fill`` and ``stroke`` are colours of the theme."""
        stroke = more.pop("stroke", None)
        attributes = {"rx": 3, **more}
        if stroke is not None:
            attributes["stroke"] = self.theme[str(stroke)]
        self._add(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" '
            f'fill="{self.theme.get(fill, fill)}"',
            attributes,
        )

    def text(self, x: float, y: float, words: str, fill: str = "ink", **more: object) -> None:
        """Write words; the position is their left end on the base line."""
        self._add(f'<text x="{x:g}" y="{y:g}" fill="{self.theme[fill]}"', more, escape(words))

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through points, with a tip at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._add(
            f'<polyline points="{path}" fill="none" stroke="{self.theme["faint"]}" '
            'stroke-width="1.5" marker-end="url(#tip)"',
            {},
        )

    def _add(self, head: str, attributes: dict[str, object], content: str | None = None) -> None:
        rest = "".join(f' {name.replace("_", "-")}="{v}"' for name, v in attributes.items())
        end = "/>" if content is None else f">{content}</text>"
        self.items.append(f"{head}{rest}{end}")

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([*self.items, "</svg>\n"]), encoding="utf-8")


def attention(theme: dict[str, str]) -> Drawing:
    """Return the figure of who reads whom, sequentially and with APE."""
    drawing = Drawing(
        760, 530, theme, "Which tokens read which, sequentially and with APE, and their positions."
    )
    for left, title, subtitle, parallel in (
        (20, "Sequential", "every token reads all tokens before it", False),
        (400, "APE", "contexts read the prefix and themselves", True),
    ):
        drawing.text(left, 22, title, font_size=17, font_weight=600)
        drawing.text(left, 42, subtitle, "faint")
        _matrix(drawing, left, 58, parallel)
        _positions(drawing, left, 452, parallel)
    drawing.box(624, 464, 16, 16, "c1", opacity=0.38)
    drawing.text(648, 477, "read once, kept", font_size=13)
    drawing.box(624, 488, 16, 16, "c1")
    drawing.text(648, 501, "read for this", font_size=13)
    drawing.text(648, 517, "question", font_size=13)
    return drawing


def _matrix(drawing: Drawing, left: float, top: float, parallel: bool) -> None:
    """Draw a square per pair of reading token (row) and token read (column)."""
    cell, names = 20, [name for name, _, length in PARTS for _ in range(length)]
    for row, reader in enumerate(names):
        for column, source in enumerate(names):
            x, y = left + column * cell, top + row * cell
            drawing.box(x + 1, y + 1, cell - 2, cell - 2, "empty")
            apart = reader not in ("query", source) and source != "prefix"
            if column > row or (parallel and apart):
                continue
            computed = reader == "query" or not parallel
            opacity = 1.0 if computed else 0.38
            drawing.box(x + 1, y + 1, cell - 2, cell - 2, source, opacity=opacity)
    bottom = top + len(names) * cell
    x = left
    for name, _, length in PARTS:
        drawing.text(
            x + length * cell / 2,
            bottom + 15,
            _short(name),
            name,
            text_anchor="middle",
            font_weight=600,
        )
        x += length * cell


def _short(name: str) -> str:
    return {"prefix": "P", "query": "Q"}.get(name, name.upper())


def _positions(drawing: Drawing, left: float, top: float, parallel: bool) -> None:
    """Draw at which positions the parts stand."""
    cell, height, gap = 20, 18, 4
    longest = max(length for name, _, length in PARTS if name.startswith("c"))
    drawing.text(left, top, "positions", "faint", font_size=13)
    x = float(left)
    for index, (name, _, length) in enumerate(PARTS):
        context = name.startswith("c")
        y = top + 12 + ((index - 1) * (height + gap) if parallel and context else 0)
        if name == "query" and parallel:
            x += longest * cell
        drawing.box(x, y, length * cell - 2, height, name)
        drawing.text(
            x + length * cell / 2 - 1,
            y + 13.5,
            _short(name),
            "paper",
            text_anchor="middle",
            font_size=12,
            font_weight=600,
        )
        if not (parallel and context):
            x += length * cell


def request(theme: dict[str, str]) -> Drawing:
    """Return the figure of the way of a request."""
    drawing = Drawing(
        760,
        400,
        theme,
        "The way of a request: the prompt is split, states are looked up, "
        "missing ones are encoded, and the query reads all of them.",
    )
    drawing.text(20, 24, "1  The framework builds its prompt as always", font_weight=600)
    x, lefts = 20.0, {}
    for name, label, width in (
        ("prefix", "prefix", 110),
        ("c1", "context 1", 150),
        ("c2", "context 2", 150),
        ("c3", "context 3", 150),
        ("query", "query", 150),
    ):
        drawing.box(x, 38, width - 4, 34, name)
        _centred(drawing, x + width / 2 - 2, 60, label, "paper")
        lefts[name] = x + width / 2 - 2
        x += width
    drawing.text(
        20, 112, "2  Each context is looked up: hash of model, prefix and text", font_weight=600
    )
    for name, found in (("c1", True), ("c2", False), ("c3", True)):
        centre = lefts[name]
        drawing.arrow((centre, 74), (centre, 92))
        drawing.arrow((centre, 122), (centre, 146))
        kind = {"stroke": name, "stroke_width": 2}
        if not found:
            kind["stroke_dasharray"] = "5 4"
        drawing.box(centre - 66, 150, 132, 52, "empty", **kind)
        _centred(drawing, centre, 172, "hit" if found else "miss", name)
        words = "read from the store" if found else "encode, then store"
        drawing.text(centre, 191, words, text_anchor="middle", font_size=12)
    drawing.box(20, 150, 102, 52, "empty", stroke="prefix", stroke_width=2)
    _centred(drawing, 71, 172, "kept", "prefix")
    drawing.text(71, 191, "once for all", text_anchor="middle", font_size=12)
    drawing.arrow((71, 74), (71, 92))
    drawing.arrow((71, 122), (71, 146))
    drawing.text(
        20, 242, "3  Key/value states side by side; no context sees another", font_weight=600
    )
    for name in ("prefix", "c1", "c2", "c3"):
        drawing.arrow((lefts[name], 204), (lefts[name], 222))
        drawing.arrow((lefts[name], 252), (lefts[name], 268))
        width = 102 if name == "prefix" else 132
        drawing.box(lefts[name] - width / 2, 272, width, 26, name, opacity=0.45)
    drawing.arrow((lefts["query"], 74), (lefts["query"], 328))
    drawing.text(20, 334, "4  The query is read behind all of them; tokens follow", font_weight=600)
    drawing.box(20, 346, 576, 34, "empty", stroke="line", stroke_width=1.5)
    _centred(drawing, 308, 368, "attention to contexts: temperature T, scaling factor S", "ink")
    drawing.arrow((596, 363), (618, 363))
    drawing.box(620, 332, 126, 48, "query")
    _centred(drawing, 683, 361, "answer", "paper")
    return drawing


def _centred(drawing: Drawing, x: float, y: float, words: str, fill: str) -> None:
    drawing.text(x, y, words, fill, text_anchor="middle", font_weight=600)


def main(argv: Sequence[str] | None = None) -> None:
    """Write every figure in every theme."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in (("attention", attention), ("request", request)):
        for theme, colours in THEMES.items():
            path = FOLDER / f"ape-{name}-{theme}.svg"
            draw(colours).save(path)
            print(path.relative_to(FOLDER.parents[1]), file=sys.stderr)


if __name__ == "__main__":
    main()

"""Draws the diagrams of the pages, as SVG that needs no script and no network: part of `make pictures`.

    a diagram -> boxes (x, y, width, lines) and arrows (points, label) -> docs/NAME.svg

All are 440 units wide, so that a phone of 360 px shows them whole and readable. A test in a browser checks that every text is
inside its box, and every box inside the picture.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
WIDTH, LINE, PAD = 440, 17, 8
STYLE = """
  svg { background: #fff }
  .box { fill: #e6f4f2; stroke: #00796b }
  .plain { fill: #f6f6f6; stroke: #9e9e9e }
  text { font: 12.5px system-ui, 'DejaVu Sans', sans-serif; fill: #222 }
  .mono { font-family: ui-monospace, 'DejaVu Sans Mono', monospace; font-size: 11.5px }
  .label { fill: #00594f }
  .arrow { fill: none; stroke: #555; marker-end: url(#tip) }
  @media (prefers-color-scheme: dark) {
    svg { background: #1e2129 } .box { fill: #173e3a; stroke: #4db6ac } .plain { fill: #2a2e38; stroke: #777 }
    text { fill: #ddd } .label { fill: #80cbc4 } .arrow { stroke: #aaa } #tip path { fill: #aaa }
  }"""
Points = list[tuple[int, int]]


class Drawing:
    """Shapes of one diagram, from the top down."""

    def __init__(self, title: str) -> None:
        self.title, self.shapes, self.height = title, list[str](), 0

    def box(self, x: int, y: int, width: int, *lines: str, kind: str = "box", mono: bool = False) -> None:
        height = len(lines) * LINE + PAD
        self.shapes.append(f'<g><rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>')
        for number, line in enumerate(lines):
            self.text(x + PAD, y + (number + 1) * LINE, line, "mono" if mono else "")
        self.shapes.append("</g>")
        self.height = max(self.height, y + height)

    def text(self, x: int, y: int, words: str, kind: str = "label") -> None:
        self.shapes.append(f'<text class="{kind}" x="{x}" y="{y}" xml:space="preserve">{escape(words)}</text>')
        self.height = max(self.height, y + 4)

    def arrow(self, points: Points, label: str = "", at: tuple[int, int] = (0, 0)) -> None:
        self.shapes.append(f'<polyline class="arrow" points="{" ".join(f"{x},{y}" for x, y in points)}"/>')
        if label:
            self.text(*at, label)

    def svg(self) -> str:
        height = self.height + PAD
        size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        tip += '<path d="M0,0 L8,4 L0,8 Z" fill="#555"/></marker>'
        shapes = "\n".join(self.shapes)
        return f"{head}\n<title>{escape(self.title)}</title>\n<style>{STYLE}\n</style>\n<defs>{tip}</defs>\n{shapes}\n</svg>\n"


def flow() -> Drawing:
    """From what there is to training."""
    drawing = Drawing("How data flows: input, convert, encode, and what reads the shards")
    drawing.box(10, 10, 200, "images and captions", "images and conversations", "images between texts", kind="plain")
    drawing.box(230, 10, 200, "documents", "codes made elsewhere", kind="plain")
    drawing.arrow([(80, 69), (80, 98)], "convert pairs,", (88, 82))
    drawing.text(88, 98, "conversations, interleaved")
    drawing.box(10, 102, 150, "shards with images")
    drawing.arrow([(80, 127), (80, 158)], "encode", (88, 147))
    drawing.arrow([(418, 52), (418, 158)], "convert documents,", (283, 82))
    drawing.text(314, 98, "convert coded")
    drawing.box(10, 162, 420, "shards with codes, texts or both")
    for y, command, result in (
        (198, "loaders", "training"),
        (233, "pack", "shards of token rows, for loaders too"),
        (268, "select, relabel", "shards with codes again"),
        (303, "export", "load_from_disk, Parquet"),
        (338, "verify, stats, view", "what is in it, and whether it is whole"),
    ):
        drawing.arrow([(30, 187), (30, y + 12), (165, y + 12)])
        drawing.text(40, y + 8, command)
        drawing.box(169, y, 261, result, kind="plain")
    drawing.box(10, 385, 150, "third-party tars", kind="plain")
    drawing.arrow([(160, 397), (226, 397)], "index", (172, 393))
    drawing.box(230, 385, 200, "the same tars, with indices", "and a manifest")
    drawing.arrow([(330, 427), (330, 448)])
    drawing.box(169, 452, 261, "loaders, select, verify, view", kind="plain")
    return drawing


def loader() -> Drawing:
    """From a config to a batch."""
    drawing = Drawing("The loader: order, reading, batches, result")
    drawing.box(10, 10, 150, "config", "manifests", kind="plain")
    drawing.arrow([(160, 31), (206, 31)])
    drawing.box(210, 10, 220, "order: which sample stands", "at which position")
    drawing.box(10, 82, 150, "step request", kind="plain")
    drawing.arrow([(320, 52), (320, 78)])
    drawing.arrow([(160, 103), (206, 103)])
    drawing.box(210, 82, 220, "reading: plan, join requests,", "fetch ahead, cache")
    drawing.arrow([(320, 124), (320, 150)])
    drawing.box(210, 154, 220, "batches, tokens: bytes to", "columns, to rows of token ids")
    drawing.arrow([(210, 175), (164, 175)])
    drawing.box(10, 154, 150, "step result", kind="plain")
    drawing.arrow([(85, 179), (85, 222)], "in a worker process, or here", (93, 214))
    drawing.box(10, 226, 150, "loader: batches", kind="plain")
    drawing.arrow([(160, 239), (206, 239)])
    drawing.box(210, 226, 220, "proof: state, receipt")
    return drawing


def order() -> Drawing:
    """Twelve samples of two shards, in batches of 2 with 2 lanes each."""
    drawing = Drawing("From shards to the order: chunks are permuted, cut into lanes, and read side by side")
    y = 10
    for label, *lines in (
        ("Shards", "a0 a1 a2 a3 a4 a5 | b0 b1 b2 b3 b4 b5"),
        ("Chunks: fetched together", "[a0 a1 a2][a3 a4 a5][b0 b1 b2][b3 b4 b5]"),
        ("Shuffled chunks: permuted by (seed, epoch)", "[b0 b1 b2][a3 a4 a5][b3 b4 b5][a0 a1 a2]"),
        ("Stretches: as many as lanes; here B = 2 and k = 2, so 4", "b0 b1 b2 | a3 a4 a5 | b3 b4 b5 | a0 a1 a2"),
        ("Lanes: stretches dealt crosswise", "0: b0 b1 b2    2: a3 a4 a5", "1: b3 b4 b5    3: a0 a1 a2"),
        ("Shuffle blocks: each permuted by itself", "0: b1 b0 | b2  2: a4 a3 | a5", "1: b3 b4 | b5  3: a0 a1 | a2"),
        ("Order: position p is sample p div 4 of lane p mod 4", "b1 b3  a4 a0   b0 b4  a3 a1   b2 b5  a5 a2"),
    ):
        drawing.text(10, y + 12, label)
        drawing.box(10, y + 18, 420, *lines, mono=True)
        y = drawing.height + 10
    return drawing


if __name__ == "__main__":
    for draw in (flow, loader, order):
        (DOCS / f"{draw.__name__}.svg").write_text(draw().svg())

"""Samples of a batch as one page that needs nothing else: texts, and pictures decoded from codes as the viewer does.

    Pages of each dataset, numbers -> look -> what the viewer says of a sample, as JSON values -> page -> HTML

Everything that comes from data is escaped here, once, where it is put in.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

import orjson

from wds_tools.check.stats.report import page_head
from wds_tools.errors import WdsToolsError
from wds_tools.view.pages import Pages, Request

MAX_PICTURES = 256
"""Samples that are shown with their pictures: the first ones."""


def look(pages: Pages, number: int) -> dict[str, Any]:
    """What the viewer says of a sample; see browse.sample. `intact` is False if its bytes are damaged."""
    shown: dict[str, Any] = orjson.loads(_get(pages, f"/api/sample/{number}"))
    return shown


def text_of(shown: Mapping[str, Any]) -> str:
    """The text of a sample, its turns, or what a row of tokens says."""
    if "segments" in shown:
        runs = (run for segment in shown["segments"] for run in segment["runs"])
        return "".join("<image>" if "image" in run else run.get("text", str(run.get("ids"))) for run in runs)
    return shown["text"] or "\n".join(f"{turn['from']}: {turn['value']}" for turn in shown.get("turns", ()))


def page(title: str, samples: Iterable[tuple[str, Pages, Mapping[str, Any]]]) -> Iterator[str]:
    """The page, in pieces.

    Args:
        title: its heading.
        samples: of each a heading, where it is from, and what `look` says.
    """
    yield f'{page_head(title)}<main class="report"><h1>{escape(title)}</h1>'
    for place, (heading, pages, shown) in enumerate(samples):
        pictures = "".join(_pictures(pages, shown)) if place < MAX_PICTURES else ""
        text = f'<p style="white-space: pre-wrap">{escape(text_of(shown))}</p>'
        yield f"<section><h2>{escape(heading)}</h2>{pictures}{text}</section>"
    yield "</main></body></html>"


def _pictures(pages: Pages, shown: Mapping[str, Any]) -> Iterator[str]:
    """Decoded; where that can't be, a pixel a code, and why."""
    for grid in shown.get("grids", ()):
        path, image, why = f"{shown['number']}/{grid['column']}.png", str(grid["image"]), ""
        try:
            png = _get(pages, f"/picture/{path}", image=image, small="1")
        except WdsToolsError as error:
            why = escape(str(error))
            png = b"" if "problem" in grid else _get(pages, f"/codes/{path}", image=image)
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        yield f'<figure><img alt="{escape(grid["column"])}" src="{source}"><figcaption>{why}</figcaption></figure>'


def _get(pages: Pages, path: str, **query: str) -> bytes:
    answer = pages.answer(path, Request(query=query))
    assert answer is not None, path
    return b"".join([answer.body] if isinstance(answer.body, bytes) else answer.body)

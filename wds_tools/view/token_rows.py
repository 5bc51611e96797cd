"""A row of tokens as the page shows it: segments, and in each what is text and what an image, what is trained and what is not.

    ids, loss, segments -> runs, all text or all of one image, all trained or none -> texts (of a tokenizer), grids of codes

A row does not say how an image lies. Codes that single tokens part into lines of one length (emu3) are rows and columns; others
are a square, or else, which is a guess, the sides that are nearest to one, the height the shorter.
Cost: some passes over a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_tools.check.token_rows import check_row
from wds_tools.dataset.samples import PartialSample
from wds_tools.format.schema import TOKEN_MEMBERS
from wds_tools.format.shard import parse_npy
from wds_tools.sequences.tokenizer import TextTokenizer

COLUMN = "tokens"
"""What the codes in a row are called, where those of samples have their column's name."""
MAX_RUNS = 2000
_MAX_IDS = 24
_NO_CODE = -1


class Run(NamedTuple):
    """Tokens of a row that are one image, or text."""

    begin: int
    end: int
    width: int
    """Codes of a line of the image; 0: it is text."""


class TokenRows:
    """Reads the rows of a dataset.

    Args:
        rows: `source.rows` of its manifest.
        tokenizer: turns ids into text; None: ids are shown.
    """

    def __init__(self, rows: Mapping[str, Any], tokenizer: TextTokenizer | None) -> None:
        self._rows, self._tokenizer = rows, tokenizer
        spans = rows.get("code_ids") or [(rows["text_size"], rows["vocabulary_size"] - rows["text_size"])]
        firsts, counts = np.array(spans, np.int64).T
        order = np.argsort(firsts)
        self._firsts, self._counts, self._codes = firsts[order], counts[order], (np.cumsum(counts) - counts)[order]

    def card(self, partial: PartialSample) -> dict[str, Any]:
        """What a list shows of a row, as browse.card. Raises FormatError."""
        ids, loss, segments, _ = self._read(partial)
        grids = self.grids(partial)
        return {
            "type": "token row",
            "text": f"segments: {len(segments)}; trained tokens: {int(loss.sum()):,}",
            "row_tokens": len(ids),
            "codes": sum(codes.size for codes, _ in grids),
            "columns": {COLUMN: grids[0][0].shape} if grids else {},
        }

    def shown(self, partial: PartialSample) -> dict[str, Any]:
        """What a row holds, as JSON values: segments, each of tokens and runs; how many tokens are padding, and trained.

        Raises:
            FormatError: it is no row of this length and vocabulary.
        """
        ids, loss, segments, _ = self._read(partial)
        shown: list[dict[str, Any]] = []
        image = num_runs = 0
        for segment in segments:
            runs: list[dict[str, Any]] = []
            for low, high, width in segment:
                changes = [] if width else (np.flatnonzero(np.diff(loss[low:high])) + low + 1).tolist()
                for first, last in pairwise([low, *changes, high]):
                    what = {"image": image} if width else self._text(ids[first:last])
                    runs.append({"tokens": last - first, "trained": bool(loss[first]), **what})
                image += bool(width)
            num_runs += len(runs)
            shown.append({"tokens": segment[-1].end - segment[0].begin, "runs": runs if num_runs <= MAX_RUNS else []})
        return {"segments": shown, "padding": len(ids) - sum(one["tokens"] for one in shown), "trained": int(loss.sum())}

    def grids(self, partial: PartialSample) -> list[tuple[NDArray[Any], bool]]:
        """The codes of each image in a row, (h, w), and whether their shape is a guess. Raises FormatError."""
        *_, segments, codes = self._read(partial)
        found = []
        for begin, end, width in (run for segment in segments for run in segment if run.width):
            own = codes[begin:end][codes[begin:end] != _NO_CODE]
            is_line, height = len(own) == width, len(own) // width
            if is_line:
                height = next(side for side in range(math.isqrt(width), 0, -1) if width % side == 0)
            found.append((own.reshape(height, -1), is_line and height**2 != width))
        return found

    def _read(self, partial: PartialSample) -> tuple[NDArray[Any], NDArray[np.bool_], list[list[Run]], NDArray[np.int64]]:
        """Ids, which of them are trained, the runs of each segment, and the code of each id, or _NO_CODE."""
        check_row(partial.key, partial.payloads, self._rows)
        ids, bits, sizes = (parse_npy(partial.payloads[name], name) for name in TOKEN_MEMBERS)
        span = np.maximum(np.searchsorted(self._firsts, ids.astype(np.int64), "right") - 1, 0)
        offsets = ids.astype(np.int64) - self._firsts[span]
        codes = np.where((offsets >= 0) & (offsets < self._counts[span]), self._codes[span] + offsets, _NO_CODE)
        segments = [_runs(codes, *bounds) for bounds in pairwise([0, *np.cumsum(sizes, dtype=np.int64).tolist()])]
        return ids, np.unpackbits(bits, count=len(ids)).view(np.bool_), segments, codes

    def _text(self, ids: NDArray[Any]) -> dict[str, Any]:
        if self._tokenizer is None:
            return {"ids": ids[:_MAX_IDS].tolist()}
        return {"text": self._tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False)}


def _runs(codes: NDArray[np.int64], begin: int, end: int) -> list[Run]:
    """The texts and images of a segment. Codes in runs of one length, with one token between them, are lines of an image."""
    is_code = codes[begin:end] != _NO_CODE
    runs: list[Run] = []
    for low, high in pairwise([begin, *(np.flatnonzero(np.diff(is_code)) + begin + 1).tolist(), end]):
        run = Run(low, high, high - low if is_code[low - begin] else 0)
        if run.width and len(runs) > 1 and runs[-1].end - runs[-1].begin == 1 and runs[-2].width == run.width:
            runs[-2:] = [runs[-2]._replace(end=high)]
        else:
            runs.append(run)
    return runs

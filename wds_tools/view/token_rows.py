"""A row of tokens as the page shows it: segments, and in each what is text and what an image, what is trained and what is not.

    ids, loss, segments -> runs, all text or all of one image, all trained or none -> texts (of a tokenizer), grids of codes

A row does not say how an image lies. Codes that single tokens part into lines of one length (emu3) are rows and columns; others
are a square, or else, which is a guess, the sides that are nearest to one, the height the shorter.
Cost: some passes over a row; memory: a number for each id of the vocabulary.
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


class _Run(NamedTuple):
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
        spans = rows.get("code_ids") or [[rows["text_size"], rows["vocabulary_size"] - rows["text_size"]]]
        self._codes = np.full(rows["vocabulary_size"], _NO_CODE, np.int64)
        ids = np.concatenate([np.arange(first, first + count) for first, count in spans])
        self._codes[ids] = np.arange(len(ids))

    def card(self, partial: PartialSample) -> dict[str, Any]:
        """What a list shows of a row, as browse.card. Raises FormatError."""
        ids, loss, segments = self._arrays(partial)
        grids = self.grids(partial)
        text = f"{len(segments)} segments, {int(loss.sum()):,} of {len(ids):,} tokens are trained"
        return {
            "type": "token row",
            "text": text,
            "chars": len(text),
            "codes": sum(codes.size for codes, _ in grids),
            "columns": {COLUMN: grids[0][0].shape} if grids else {},
        }

    def shown(self, partial: PartialSample) -> dict[str, Any]:
        """What a row holds, as JSON values: segments, each of tokens and runs; how many tokens are padding, and trained.

        Raises:
            FormatError: it is no row of this length and vocabulary.
        """
        ids, loss, segments = self._arrays(partial)
        shown: list[dict[str, Any]] = []
        image = num_runs = 0
        for begin, end in segments:
            runs: list[dict[str, Any]] = []
            for low, high, width in self._runs(ids, begin, end):
                changes = [] if width else (np.flatnonzero(np.diff(loss[low:high])) + low + 1).tolist()
                for first, last in pairwise([low, *changes, high]):
                    what = {"image": image} if width else self._text(ids[first:last])
                    runs.append({"tokens": last - first, "trained": bool(loss[first]), **what})
                image += bool(width)
            num_runs += len(runs)
            shown.append({"tokens": end - begin, "runs": runs if num_runs <= MAX_RUNS else []})
        return {"segments": shown, "padding": len(ids) - sum(one["tokens"] for one in shown), "trained": int(loss.sum())}

    def grids(self, partial: PartialSample) -> list[tuple[NDArray[Any], bool]]:
        """The codes of each image in a row, (h, w), and whether their shape is a guess. Raises FormatError."""
        ids, _, segments = self._arrays(partial)
        found = []
        for bounds in segments:
            for run in self._runs(ids, *bounds):
                if run.width:
                    codes = self._codes[ids[run.begin : run.end]]
                    codes = codes[codes != _NO_CODE]
                    is_line = len(codes) == run.width
                    height = len(codes) // run.width
                    if is_line:
                        height = next(side for side in range(math.isqrt(run.width), 0, -1) if run.width % side == 0)
                    found.append((codes.reshape(height, -1), is_line and height**2 != run.width))
        return found

    def _arrays(self, partial: PartialSample) -> tuple[NDArray[Any], NDArray[np.bool_], list[tuple[int, int]]]:
        check_row(partial.key, partial.payloads, self._rows)
        ids, bits, sizes = (parse_npy(partial.payloads[name], name) for name in TOKEN_MEMBERS)
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
        return ids, np.unpackbits(bits, count=len(ids)).view(np.bool_), [*pairwise([0, *ends])]

    def _runs(self, ids: NDArray[Any], begin: int, end: int) -> list[_Run]:
        """The texts and images of a segment. Codes in runs of one length, with one token between them, are lines of an image."""
        is_code = self._codes[ids[begin:end]] != _NO_CODE
        borders = [begin, *(np.flatnonzero(np.diff(is_code)) + begin + 1).tolist(), end]
        runs: list[_Run] = []
        for low, high in pairwise(borders):
            run = _Run(low, high, high - low if is_code[low - begin] else 0)
            if run.width and len(runs) > 1 and runs[-1].end - runs[-1].begin == 1 and runs[-2].width == run.width:
                runs[-2:] = [runs[-2]._replace(end=high)]
            else:
                runs.append(run)
        return runs

    def _text(self, ids: NDArray[Any]) -> dict[str, Any]:
        if self._tokenizer is None:
            return {"ids": ids[:_MAX_IDS].tolist()}
        return {"text": self._tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False)}

"""Examples -> rows of exactly max_length tokens: best fit over a bounded window.

    add(number, example) while `wants_more`; then row()

A row begins with the example that has waited longest, then takes the longest that still fits, again and again. What is left
is filled by the beginning of a document, whose rest waits on; so are documents longer than a row. A gap of fewer than
MIN_CUT tokens, or without a document to fill it, is padding. Of an interleaved document one piece waits after the other.
Invariant: rows are a function of the examples in order. All of every example is in the rows, once; only documents are cut.
State: the numbers of those that wait, and how much of each is used up. Cost: about 2 us an example.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from wds_tools.errors import UsageError
from wds_tools.sequences.build import Example, Flags
from wds_tools.sequences.tokenizer import Ids

MIN_CUT = 16
"""A document is not cut for fewer tokens."""
WINDOW_ROWS = 8
"""So many rows' tokens wait before a row is made."""


class Row(NamedTuple):
    """A row."""

    ids: Ids
    """(L,) int32; EOS in the padding at its end."""
    loss: Flags
    """(L,)"""
    segments: list[int]
    """Tokens of each example, or piece of a document, in order; the padding is what is left of L."""
    keys: list[str]
    """Of the sample of each segment."""
    numbers: list[int]
    """Of the example of each."""
    ended: list[int]
    """Numbers of the examples whose last token is here."""

    @property
    def num_padding(self) -> int:
        """Tokens that are padding."""
        return len(self.ids) - sum(self.segments)


class Waiting(NamedTuple):
    """An example that waits."""

    example: Example
    used: int
    """Its tokens that earlier rows have."""

    @property
    def left(self) -> int:
        """Its tokens that are not in a row yet."""
        return len(self.example.ids) - self.used

    @property
    def next(self) -> int:
        """Those that go into a row together, unless it is a document: of pieces the first that is left, else all."""
        pieces = self.example.pieces
        return next(end - self.used for end in accumulate(pieces) if end > self.used) if pieces else self.left


class Packer:
    """Packs one stream of examples.

    >>> packer = Packer(max_length=8, pad_id=0)
    >>> for number, (key, length) in enumerate([("a", 5), ("b", 4), ("c", 3), ("d", 3)], 1):
    ...     packer.add(number, Example(key, np.full(length, number, np.int32), np.ones(length, bool), is_document=False))
    >>> for row in packer.rest():
    ...     print(row.ids.tolist(), row.segments, row.keys, row.num_padding)
    [1, 1, 1, 1, 1, 3, 3, 3] [5, 3] ['a', 'c'] 0
    [2, 2, 2, 2, 4, 4, 4, 0] [4, 3] ['b', 'd'] 1

    Args:
        max_length: tokens of a row.
        pad_id: what padding is made of.
    """

    def __init__(self, max_length: int, pad_id: int) -> None:
        self._max_length = max_length
        self._padding = np.full(max_length, pad_id, np.int32)
        self._untrained = np.zeros(max_length, np.bool_)
        self._waiting: dict[int, Waiting] = {}
        self._by_length: list[tuple[int, int]] = []
        """(`Waiting.next`, -number) of those that wait: of equals, the oldest is last."""
        self._num_tokens = self._num_documents = 0

    @property
    def wants_more(self) -> bool:
        """Whether the window has room: then a row must wait for further examples, if there are any."""
        return self._num_tokens < WINDOW_ROWS * self._max_length

    @property
    def waiting(self) -> list[tuple[int, int]]:
        """(number, used tokens) of those that wait, the oldest first: with their examples, all that the packer is."""
        return [(number, used) for number, (_, used) in self._waiting.items()]

    def add(self, number: int, example: Example, used: int = 0) -> None:
        """Let an example wait.

        Args:
            number: above all earlier ones.
            example: at most max_length tokens, unless a document or in pieces.
            used: tokens that earlier rows have, where a packer is made again.

        Raises:
            UsageError: it is longer than a row.
        """
        if max(example.pieces or (len(example.ids),)) > self._max_length and not example.is_document:
            raise UsageError(f"{example.key} has {len(example.ids)} tokens, a row {self._max_length}, and it can't be cut")
        self._put(number, Waiting(example, used))

    def row(self) -> Row:
        """The next row. There must be something that waits."""
        pieces: list[tuple[int, Waiting, int]] = []
        number = next(iter(self._waiting))
        room = self._max_length
        while True:
            waiting = self._take(number)
            length = min(waiting.next, room)
            pieces.append((number, waiting, length))
            room -= length
            if waiting.left > length:
                self._put(number, waiting._replace(used=waiting.used + length))
            at = bisect_right(self._by_length, (room, 1))
            if at and room:
                number = -self._by_length[at - 1][1]
            elif room >= MIN_CUT and (longest := self._longest_document()) is not None:
                number = longest
            else:
                break
        return self._joined(pieces)

    def rest(self) -> Iterator[Row]:
        """Rows of all that waits, when nothing follows."""
        while self._waiting:
            yield self.row()

    def _joined(self, pieces: list[tuple[int, Waiting, int]]) -> Row:
        lengths = [length for _, _, length in pieces]
        taken = [(waiting.example, waiting.used, waiting.used + length) for _, waiting, length in pieces]
        used = sum(lengths)
        return Row(
            np.concatenate([*[example.ids[begin:end] for example, begin, end in taken], self._padding[used:]]),
            np.concatenate([*[example.loss[begin:end] for example, begin, end in taken], self._untrained[used:]]),
            lengths,
            [waiting.example.key for _, waiting, _ in pieces],
            [number for number, _, _ in pieces],
            [number for number, waiting, length in pieces if waiting.left == length],
        )

    def _longest_document(self) -> int | None:
        """None fits the room, so each can be cut for it."""
        if not self._num_documents:
            return None
        return next(-number for _, number in reversed(self._by_length) if self._waiting[-number].example.is_document)

    def _put(self, number: int, waiting: Waiting) -> None:
        is_oldest = bool(self._waiting) and number < next(reversed(self._waiting))
        self._waiting[number] = waiting
        if is_oldest:  # the rest of a document keeps its age
            self._waiting = dict(sorted(self._waiting.items()))
        insort(self._by_length, (waiting.next, -number))
        self._num_tokens += waiting.left
        self._num_documents += waiting.example.is_document

    def _take(self, number: int) -> Waiting:
        """What waits no longer."""
        waiting = self._waiting.pop(number)
        self._by_length.pop(bisect_right(self._by_length, (waiting.next, -number)) - 1)
        self._num_tokens -= waiting.left
        self._num_documents -= waiting.example.is_document
        return waiting

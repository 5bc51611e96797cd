"""Samples in memory -> columns, and what to do about a sample that can't be read.

An unreadable sample stops the run, or its position is filled by the next readable sample of its shard, so that no rank ever
takes a different number of steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import numpy as np
import orjson

from loaders.batches.collate import check_crc
from loaders.order.mask import EXCLUDED, UNUSED, Mask, Substitution
from loaders.order.samples import Located, SampleOrder
from loaders.reading.source import LoadedSamples, SampleBytes, bytes_of
from wds_tools.errors import DataError, FormatError, Reject

_MOST_TRIED = 64
_T = TypeVar("_T")
Parse = Callable[[Sequence[LoadedSamples], Sequence[int], SampleBytes], _T]
"""Makes something of samples, as collate.read_columns does."""
_EXCLUDED = Reject(EXCLUDED, "the sample is no longer to be handed over")
_READING_ERRORS = (DataError, KeyError, IndexError, ValueError, TypeError)


class Decoder:
    """Turns samples in memory into columns.

    Args:
        check_crc: compare every sample's bytes with the index.
        substitute: replace a sample that can't be read; else it is a FormatError.
        order: of the samples; those that are excluded are replaced in any case.
    """

    def __init__(self, order: SampleOrder, *, check_crc: bool, substitute: bool) -> None:
        self._check_crc = check_crc
        self._substitute = substitute
        self._order = order
        self.num_bytes = 0
        """Of the samples decoded so far, in their tars."""

    def decode(self, located: Located, loaded: list[LoadedSamples], parse: Parse[_T]) -> tuple[_T, dict[int, Substitution]]:
        """Parse samples, all at once; if that fails, one by one.

        Args:
            located: where the positions lead.
            loaded: what holds the sample of each; changed where it is replaced.
            parse: what is made of them, such as collate.read_columns.

        Returns:
            What `parse` makes of them, and what was substituted, by its place in `loaded`.

        Raises:
            FormatError: a sample can't be read, and was not to be replaced or none of the next 64 of its shard can be read.
        """
        sample_indices = located.sample_index.tolist()
        with _paused_gc():
            excluded = np.flatnonzero(self._order.is_excluded(located)).tolist()
            replaced = self._replace(excluded, located, loaded, sample_indices, parse, are_excluded=True)
            try:
                parsed = self._parsed(loaded, sample_indices, parse)
            except _READING_ERRORS:
                replaced |= self._replace(range(len(loaded)), located, loaded, sample_indices, parse)
                parsed = self._parsed(loaded, sample_indices, parse)
            return parsed, replaced

    def _parsed(self, loaded: Sequence[LoadedSamples], sample_indices: Sequence[int], parse: Parse[_T]) -> _T:
        data = bytes_of(loaded, sample_indices)
        self.num_bytes += int((data.spans[:, 1] - data.spans[:, 0]).sum())
        if self._check_crc:
            check_crc(loaded, sample_indices, data)
        return parse(loaded, sample_indices, data)

    def _replace(
        self,
        numbers: Iterable[int],
        located: Located,
        loaded: list[LoadedSamples],
        sample_indices: list[int],
        parse: Parse[object],
        *,
        are_excluded: bool = False,
    ) -> dict[int, Substitution]:
        """Put another sample in place of each that is excluded or can't be read; stop at the first unless that was asked for."""
        substitutions: dict[int, Substitution] = {}
        for number in numbers:
            samples, sample_index, source = loaded[number], sample_indices[number], int(located.source[number])
            error = _EXCLUDED if are_excluded else self._problem(samples, sample_index, parse)
            if error is None:
                continue
            candidate, index = self.stand_in(samples, sample_index, source, error, parse)
            loaded[number], sample_indices[number] = candidate, index
            if (candidate.shard, index) != (samples.shard, sample_index):
                substitutions[number] = Substitution(
                    source=source,
                    shard=samples.shard,
                    sample_index=sample_index,
                    reason=_reason(error),
                    substitute_shard=candidate.shard,
                    substitute_index=index,
                )
        return substitutions

    def stand_in(
        self, samples: LoadedSamples, sample_index: int, source: int, error: Exception, parse: Parse[object]
    ) -> tuple[LoadedSamples, int]:
        """The sample that stands in for one: what holds it, and its number in its shard.

        Args:
            samples, sample_index: what holds the one, and its number in its shard.
            source: number of its source.
            error: why it is not handed over. If it was left out on purpose, what stands in has to be readable unless others are
                replaced too.
            parse: raises what is wrong with another.

        Raises:
            FormatError: it is not to be replaced, or none of the next 64 of its shard can stand in.
        """
        for candidate, index in self._candidates(samples, sample_index, error, self._order.sources[source].mask):
            problem = self._problem(candidate, index, parse)
            if problem is None:
                return candidate, index
            if _is_left_out(error) and not _is_left_out(problem) and not self._substitute:
                samples, sample_index, error = candidate, index, problem
                break
        num_tried = min(int(samples.reader.opened.manifest.shards.num_samples[samples.shard]) - 1, _MOST_TRIED)
        advice = f"; nor can any of the next {num_tried} of its shard be taken"
        if not self._substitute and not _is_left_out(error):
            advice = ". on_error='substitute' goes on without it"
        raise FormatError(f"{samples.where(sample_index)}: {error}{advice}") from error

    def _candidates(
        self, samples: LoadedSamples, sample_index: int, error: Exception, mask: Mask
    ) -> Iterator[tuple[LoadedSamples, int]]:
        """What may stand in for a sample: what the storage has now, if a cache may have kept it damaged, and the next samples."""
        reader, shard = samples.reader, samples.shard
        if reader.is_cached and not isinstance(error, Reject):
            for again in False, True:  # another sample of its region may have had it fetched
                yield reader.load(shard, sample_index, sample_index + 1, again=again), sample_index
        num_samples = int(reader.opened.manifest.shards.num_samples[shard])
        following = ((shard, (sample_index + step) % num_samples) for step in range(1, num_samples))
        most = _MOST_TRIED if self._substitute or _is_left_out(error) else 0
        for number, index in islice(mask.after(shard, sample_index) if mask.ids else following, most):
            is_loaded = number == shard and samples.first <= index < samples.last
            yield samples if is_loaded else reader.load(number, index, index + 1), index

    def _problem(self, samples: LoadedSamples, sample_index: int, parse: Parse[object]) -> Exception | None:
        try:
            self._parsed([samples], [sample_index], parse)
        except _READING_ERRORS as error:
            return error
        return None


def _is_left_out(error: Exception) -> bool:
    """Whether a sample that could be read is left out all the same."""
    return isinstance(error, Reject) and (error.reason == EXCLUDED or error.reason.startswith(UNUSED))


def _reason(error: Exception) -> str:
    """A short word for a count."""
    if isinstance(error, Reject):
        return error.reason
    return "crc32" if "CRC-32" in str(error) else "json" if isinstance(error, orjson.JSONDecodeError) else "format"


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Thousands of views live for a moment here; letting the cycle collector look at them costs a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

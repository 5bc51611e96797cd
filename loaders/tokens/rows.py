"""Token rows: samples built into them in the process that reads, or rows of `wds-tools pack` as they are stored.

    rows in memory -> Sample -> ExampleBuilder -> padded_batch        RowMaker: a padded batch of a step's samples
    rows in memory -> ids, loss, segments -> packed_batch             read_token_rows: rows that were packed ahead

Legend: B rows, L tokens, N tokens of all rows. Cost: the tokenizer's, all of a step in one call; packed ahead 13 us a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from loaders.batches.collate import NAME_BYTES, Columns, Data, TokenTensors, read_keys, read_records, stack_npy
from loaders.order.plan import Ints
from loaders.order.samples import OpenSource
from loaders.reading.source import LoadedRows
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.codes import Codes, join_grids
from wds_tools.format.schema import TOKEN_MEMBERS, Sample
from wds_tools.format.shard import parse_npy
from wds_tools.sequences.build import Example, ExampleBuilder
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.rows import SEGMENTS, cut, packed_batch, padded_batch
from wds_tools.sequences.sources import codebook_size_of


class RowMaker:
    """Makes token rows of samples; loads the tokenizer once a process.

    Args:
        config: how.
        seed: of the choices.
        sources: what is read.

    Raises:
        UsageError: the tokenizer lacks tokens, or the sources were encoded with different image tokenizers.
    """

    def __init__(self, config: SequenceConfig, seed: int, sources: Sequence[OpenSource]) -> None:
        manifests, urls = [opened.manifest for opened in sources], [opened.store.url for opened in sources]
        if any(not opened.has_schema for opened in sources):
            raise UsageError(
                "sequences are made of samples of this project's schema: leave them out for other tars and packed rows"
            )
        names = [opened.source.codes for opened in sources]
        self._make = config, seed, codebook_size_of(manifests, urls, config.codebook_size, names)
        self._builder: ExampleBuilder | None = ExampleBuilder(*self._make)
        self.counts: Counter[str] = Counter()
        """tokens, padding, rows, shortened: since the process started."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_builder": None}  # a process that is not forked loads its own

    @property
    def builder(self) -> ExampleBuilder:
        """Of this process."""
        if self._builder is None:
            self._builder = ExampleBuilder(*self._make)
        return self._builder

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """See ExampleBuilder.recipe."""
        return self.builder.recipe

    def read(self, rows: Sequence[LoadedRows], numbers: Sequence[int], data: Data) -> list[Sample]:
        """Parse rows as samples of which examples can be made. Raises as collate.read_records, and Reject."""
        keys, records, codes = read_records(rows, numbers, data)
        grids: Sequence[Sequence[Codes]] = codes.arrays() if codes is not None else [()] * len(keys)
        samples = [sample_of(key, record, own) for key, record, own in zip(keys, records, grids, strict=True)]
        for sample in samples:
            self.builder.check(sample)
        return samples

    def examples(self, samples: Sequence[Sample], epochs: Ints) -> list[Example]:
        """Their examples, in the epochs of their sources."""
        examples = self.builder.build(samples, epochs.tolist())
        self.counts["shortened"] += sum(example.is_shortened for example in examples)
        return examples

    def padded(self, samples: Sequence[Sample], epochs: Ints, names: Sequence[str]) -> Columns:
        """A batch of at least a row for each sample; a long document goes on in the rows behind.

        Args:
            samples, epochs: what it is made of.
            names: of their sources.
        """
        examples = self.examples(samples, epochs)
        pieces = [
            (piece, name)
            for example, name in zip(examples, names, strict=True)
            for piece in cut(example, self.builder.config.max_length)
        ]
        batch = padded_batch([piece for piece, _ in pieces], self.builder.vocabulary.eos)
        lists: dict[str, list[Any]] = {
            "__key__": [piece.key for piece, _ in pieces],
            "__source__": [name for _, name in pieces],
        }
        tokens = sum(len(piece.ids) for piece, _ in pieces)
        self.count(len(pieces), tokens, batch.numbers[0].size - tokens)
        return Columns(lists, None, TokenTensors.of(batch))

    def count(self, rows: int, tokens: int, padding: int) -> None:
        """Add to the counts."""
        self.counts.update({"rows": rows, "tokens": tokens, "padding": padding})


def sample_of(key: str, record: Mapping[str, Any], grids: Sequence[Codes]) -> Sample:
    """What examples are made of."""
    fields: dict[str, Any] = {name: record[name] for name in ("data_type", "text", "width", "height")}
    if len(grids) == 1:
        fields["codes"] = {"codes": grids[0]}
    elif grids:
        codes, shapes = join_grids(grids, grids[0].dtype)
        fields |= {"codes": {"codes": codes}, "grids": {"codes": shapes}}
    return Sample(key=key, conversations=record.get("conversations"), **fields)


def read_token_rows(rows: Sequence[LoadedRows], numbers: Sequence[int], data: Data) -> Columns:
    """A batch of rows that were packed ahead.

    Raises:
        FormatError: they are no rows, or of different lengths.
    """
    headers: list[memoryview] = []
    ids: list[memoryview] = []
    bits: list[memoryview] = []
    lengths: list[memoryview] = []
    for held, row, sample in zip(rows, numbers, data, strict=True):
        if held.index.members != TOKEN_MEMBERS:
            raise FormatError(
                f"{held.where(row)} has members {', '.join(held.index.members)}, expected {', '.join(TOKEN_MEMBERS)}"
            )
        number = row - held.first
        headers.append(sample[:NAME_BYTES])
        at, ids_end, loss, loss_end, begin, end = held.places
        ids.append(sample[at[number] : ids_end[number]])
        bits.append(sample[loss[number] : loss_end[number]])
        lengths.append(sample[begin[number] : end[number]])
    ids_BL, bits_BM, segments = stack_npy(ids), stack_npy(bits), _lists(lengths)
    if ids_BL is None or bits_BM is None or bits_BM.shape[1] != -(-ids_BL.shape[1] // 8):
        raise FormatError(f"{rows[0].where(numbers[0])} and the others of its batch are not rows of one length")
    if max(map(sum, segments)) > ids_BL.shape[1]:
        raise FormatError(f"{rows[0].where(numbers[0])}, or another of its batch, has segments beyond its end")
    loss_BL = np.unpackbits(bits_BM, axis=1, count=ids_BL.shape[1]).view(np.bool_)
    return Columns({"__key__": read_keys(headers)}, None, TokenTensors.of(packed_batch(ids_BL, loss_BL, segments)))


def _lists(members: Sequence[memoryview]) -> list[list[int]]:
    """The numbers of npy members of one dimension; members of one length are read together."""
    by_length: dict[int, list[int]] = {}
    for number, member in enumerate(members):
        by_length.setdefault(len(member), []).append(number)
    lists: list[list[int]] = [[]] * len(members)
    for numbers in by_length.values():
        own = [members[number] for number in numbers]
        stacked = stack_npy(own)
        found = [parse_npy(member, SEGMENTS).tolist() for member in own] if stacked is None else stacked.tolist()
        for number, values in zip(numbers, found, strict=True):
            lists[number] = values
    return lists


def check_packed_ahead(sources: Sequence[OpenSource]) -> bool:
    """Whether the sources are rows of `wds-tools pack`.

    Raises:
        UsageError: some are and some are not, or they differ in version, length or vocabulary.
    """
    made = [opened.manifest.token_rows for opened in sources]
    if made and any(one != made[0] for one in made):
        told = "; ".join(f"{opened.store.url}: {one or 'samples'}" for opened, one in zip(sources, made, strict=True))
        raise UsageError(f"sources of rows must have one version, length and vocabulary, and can't be mixed with samples: {told}")
    return bool(made and made[0])


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a causal language model of transformers takes of a batch: ids, labels, and what keeps tokens apart."""
    return {name: batch[name] for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in batch}


def flatten(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of packed rows in the form of transformers' DataCollatorWithFlattening(return_flash_attn_kwargs=True).

    Returns:
        input_ids, labels, position_ids (1, N); cu_seq_lens_q and _k int32; max_length_q and _k int. Views, no copies.
    """
    cu_seqlens = batch["cu_seqlens"]
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return {
        **{name: batch[name].reshape(1, -1) for name in ("input_ids", "labels", "position_ids")},
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }

"""Token rows: samples built into them in the process that reads, or rows of `wds-tools pack` as they are stored.

    samples in memory -> Sample -> ExampleBuilder -> padded_batch        RowMaker: a padded batch of a step's samples
    samples in memory -> ids, loss, segments -> packed_batch             read_token_rows: rows that were packed ahead

Legend: B rows, L tokens, N tokens of all rows. Cost: the tokenizer's, all of a step in one call; packed ahead 13 us a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from loaders.batches.collate import (
    NAME_BYTES,
    Columns,
    TokenTensors,
    chosen_texts,
    read_keys,
    read_records,
    stack_npy,
)
from loaders.order.plan import Ints
from loaders.order.samples import OpenSource
from loaders.reading.source import LoadedSamples, SampleBytes
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.codes import Codes, join_grids
from wds_tools.format.schema import TOKEN_MEMBERS, Sample
from wds_tools.format.shard import parse_npy
from wds_tools.sequences.build import Example, ExampleBuilder
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.rows import NOT_TRAINED, SEGMENTS, cut, packed_batch, padded_batch
from wds_tools.sequences.sources import codebook_size_of


class RowMaker:
    """Makes token rows of samples; loads the tokenizer once a process.

    Args:
        config: how samples become token sequences.
        seed: seed of the choices that are left to chance.
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
        names = [opened.source.code_set for opened in sources]
        self._make = config, seed, codebook_size_of(manifests, urls, config, names)
        self._seed, self._texts = seed, [opened.texts for opened in sources]
        self.counts: Counter[str] = Counter()
        """Number of tokens, padding, rows, shortened (examples), split (interleaved documents), since the process started."""
        self.builder  # noqa: B018  # what is wrong with it is known before a worker starts

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "builder"}  # a process that is not forked loads it

    @cached_property
    def builder(self) -> ExampleBuilder:
        """The builder of this process."""
        return ExampleBuilder(*self._make)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """See ExampleBuilder.spec; kept, since it takes a hash of the tokenizer."""
        return self.builder.spec

    def read(self, loaded: Sequence[LoadedSamples], sample_indices: Sequence[int], data: SampleBytes) -> list[Sample]:
        """Parse samples of which examples can be made. Args and Raises as collate.read_records, and Reject."""
        keys, records, codes = read_records(loaded, sample_indices, data)
        grids: Sequence[Sequence[Codes]] = codes.to_arrays() if codes is not None else [()] * len(keys)
        samples = list(map(sample_of, keys, records, grids))
        for sample in samples:
            self.builder.check(sample)
        return samples

    def examples(self, samples: Sequence[Sample], epochs: Ints, sources: Sequence[int]) -> list[Example]:
        """The example of each sample, in the epoch of its source that is given for it; `sources` as for `chosen_texts`."""
        if any(self._texts):
            texts = chosen_texts(self._texts, self._seed, epochs, sources, [(one.key, one.text, one.texts) for one in samples])
            samples = [sample._replace(text=text) for sample, text in zip(samples, texts, strict=True)]
        examples = self.builder.build(samples, epochs.tolist())
        self.counts["shortened"] += sum(example.is_shortened for example in examples)
        self.counts["split"] += sum(map(bool, (example.pieces for example in examples)))
        return examples

    def padded(self, samples: Sequence[Sample], epochs: Ints, names: Sequence[str], numbers: Sequence[int] = ()) -> Columns:
        """A batch of at least a row for each sample; a long document goes on in the rows that follow.

        Args:
            samples: the samples.
            epochs: the epoch that each is in of its source.
            names: the name of the source of each.
            numbers: the number of the source of each, if they are of this maker's.
        """
        rows: list[Example] = []
        sources: list[str] = []
        for example, name in zip(self.examples(samples, epochs, numbers), names, strict=True):
            rows_of_example = cut(example, self.builder.config.max_length)
            rows += rows_of_example
            sources += [name] * len(rows_of_example)
        batch = padded_batch(rows, self.builder.vocabulary.eos)
        num_tokens = sum(len(row.ids) for row in rows)
        self.count(len(rows), num_tokens, batch.numbers[0].size - num_tokens)
        return Columns({"__key__": [row.key for row in rows], "__source__": sources}, None, TokenTensors.of(batch))

    def count(self, num_rows: int, num_tokens: int, num_padding: int) -> None:
        """Add to the counts."""
        self.counts.update({"rows": num_rows, "tokens": num_tokens, "padding": num_padding})


def sample_of(key: str, record: Mapping[str, Any], grids: Sequence[Codes]) -> Sample:
    """The sample that an example is made of.

    Args:
        key: its key.
        record: its parsed json.
        grids: its (h, w) grids of codes: none, one, or one an image of a conversation or an interleaved document.
    """
    fields: dict[str, Any] = {name: record[name] for name in ("data_type", "text", "width", "height")}
    if len(grids) == 1:
        fields["codes"] = {"codes": grids[0]}
    elif grids:
        codes, shapes = join_grids(grids, grids[0].dtype)
        fields |= {"codes": {"codes": codes}, "grids": {"codes": shapes}}
    return Sample(key=key, conversations=record.get("conversations"), texts=record.get("texts"), **fields)


def read_token_rows(loaded: Sequence[LoadedSamples], sample_indices: Sequence[int], data: SampleBytes) -> Columns:
    """A batch of rows that were packed ahead; each is a sample of its shard. Args as collate.read_columns.

    Raises:
        FormatError: they are not token rows, or have different lengths.
    """
    for samples, sample_index in zip(loaded, sample_indices, strict=True):
        if samples.members != TOKEN_MEMBERS:
            raise FormatError(
                f"{samples.where(sample_index)} has members {', '.join(samples.members)}, expected {', '.join(TOKEN_MEMBERS)}"
            )
    ids_BL, bits_BM, segments = stack_npy(data.members(0)), stack_npy(data.members(1)), _lists(data.members(2))
    if ids_BL is None or bits_BM is None or bits_BM.shape[1] != -(-ids_BL.shape[1] // 8):
        raise FormatError(f"{loaded[0].where(sample_indices[0])} and the others of its batch are not rows of one length")
    if max(map(sum, segments)) > ids_BL.shape[1]:
        raise FormatError(f"{loaded[0].where(sample_indices[0])}, or another of its batch, has segments beyond its end")
    keys = read_keys(data.cut(data.spans[:, 0], data.spans[:, 0] + NAME_BYTES))
    loss_BL = np.unpackbits(bits_BM, axis=1, count=ids_BL.shape[1]).view(np.bool_)
    return Columns({"__key__": keys}, None, TokenTensors.of(packed_batch(ids_BL, loss_BL, segments)))


def _lists(members: Sequence[memoryview]) -> list[list[int]]:
    """The numbers of npy members of one dimension; members of one length are read together."""
    by_length: dict[int, list[int]] = {}
    for number, member in enumerate(members):
        by_length.setdefault(len(member), []).append(number)
    lists: list[list[int]] = [[]] * len(members)
    for numbers in by_length.values():
        alike = [members[number] for number in numbers]
        stacked = stack_npy(alike)
        values = [parse_npy(member, SEGMENTS).tolist() for member in alike] if stacked is None else stacked.tolist()
        for number, value in zip(numbers, values, strict=True):
            lists[number] = value
    return lists


def check_packed_ahead(sources: Sequence[OpenSource]) -> bool:
    """Whether the sources are rows of `wds-tools pack`.

    Raises:
        UsageError: some are and some are not, or they differ in version, length or vocabulary.
    """
    kinds = [opened.manifest.token_rows for opened in sources]
    if kinds and any(kind != kinds[0] for kind in kinds):
        listing = "; ".join(f"{opened.store.url}: {kind or 'samples'}" for opened, kind in zip(sources, kinds, strict=True))
        raise UsageError(
            f"sources of rows must have one version, length and vocabulary, and can't be mixed with samples: {listing}"
        )
    return bool(kinds and kinds[0])


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a causal language model of transformers takes of a batch: ids, labels, and what keeps tokens apart.

    Args:
        batch: of token rows.

    Returns:
        Arguments of the model's `forward`: int64 tensors (B, L).
    """
    return {name: batch[name] for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in batch}


def flatten(batch: dict[str, Any], pad_multiple: int = 1, num_segments: int | None = None) -> dict[str, Any]:
    """A batch of packed rows in the form of transformers' DataCollatorWithFlattening(return_flash_attn_kwargs=True).

    Args:
        batch: of packed rows.
        pad_multiple: each segment is padded to a multiple of it: 2 * cp for context parallelism over cp ranks, each of which
            takes two equal parts of every segment. The rows are the same for any number of ranks.
        num_segments: pad cu_seq_lens to that many segments, of which the last are empty, so that shapes stay the same for
            torch.compile and CUDA graphs; max_length is then that of any row.

    Returns:
        input_ids, labels, position_ids (1, N); cu_seq_lens_q and _k int32; max_length_q and _k int. Views, no copies,
        but with pad_multiple: N is larger, padding has label -100, and cu_seq_lens_q_padded and _k_padded say where segments
        begin, while cu_seq_lens_q and _k count their own tokens, as Transformer Engine takes them.

    Raises:
        UsageError: the batch has more segments than num_segments.
    """
    begins = padded = batch["cu_seqlens"]
    columns = {name: batch[name].reshape(1, -1) for name in ("input_ids", "labels", "position_ids")}
    if pad_multiple > 1:
        rooms = -(-begins.diff() // pad_multiple) * pad_multiple
        padded = torch.cat([begins[:1], rooms.cumsum(0, dtype=torch.int32)])
        total = int(padded[-1])
        columns["position_ids"] = (torch.arange(total, device=begins.device) - padded[:-1].repeat_interleave(rooms))[None]
        is_token = columns["position_ids"][0] < begins.diff().repeat_interleave(rooms)
        for name, filler in ("input_ids", 0), ("labels", NOT_TRAINED):
            columns[name] = columns[name].new_full((1, total), filler).masked_scatter_(is_token, columns[name])
    longest = int(padded.diff().max())
    if num_segments is not None:
        if (room := num_segments + 1 - len(begins)) < 0:
            raise UsageError(f"the batch has {len(begins) - 1} segments, num_segments={num_segments}: give at least as many")
        begins, padded = (torch.cat([each, each[-1:].expand(room)]) for each in (begins, padded))
        longest = -(-batch["input_ids"].shape[1] // pad_multiple) * pad_multiple
    found = {**columns, "max_length_q": longest, "max_length_k": longest, "cu_seq_lens_q": begins, "cu_seq_lens_k": begins}
    return found if pad_multiple == 1 else {**found, "cu_seq_lens_q_padded": padded, "cu_seq_lens_k_padded": padded}

"""Pack datasets into shards of token rows: then training tokenizes nothing, and its state is a position.

    samples of all inputs, interleaved in proportion -> examples, 256 at a time -> Packer -> rows -> output shards

Every task has its share of every input, so that documents fill the rows that images leave open, and its last rows are padded.
Invariant: of every sample, all tokens are in the rows of its task, or it is a reject. Memory: 256 samples and the window.
Cost: the tokenizer's (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np

from wds_tools.dataset.reader import read_manifest, read_stored
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.codes import chosen_codes
from wds_tools.format.manifest import Manifest, check_one_code_set, shard_info_from_json
from wds_tools.format.schema import ANY_MEMBERS, PAIR_TYPES, Sample
from wds_tools.format.shard import sample_from_members
from wds_tools.jobs import Advance, Job, JobOptions, Report, TaskWriter, run_job
from wds_tools.sequences.build import ROWS_VERSION, ExampleBuilder
from wds_tools.sequences.choices import Weights, check_texts, choose_text, text_weights
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.pack import Packer, Row
from wds_tools.sequences.rows import ids_dtype, row_members
from wds_tools.sequences.sources import codebook_size_of
from wds_tools.storage import open_store

_AT_ONCE = 256
_PACKED_ALREADY = "train on the rows as they are, or pack those datasets again into another output"


@dataclass(frozen=True, kw_only=True)
class PackConfig(SequenceConfig, JobOptions):
    """Pack datasets into shards of token rows of one length, so that training does not tokenize."""

    help_group = "token rows"

    input: tuple[str, ...]
    """The datasets: directories or URLs. Every sample is used once."""
    seed: int = 42
    """Seed for the choice of form, wording, dropped texts, text, and trained images of interleaved documents."""
    epoch: int = 0
    """Epoch for the same choice: another epoch makes other examples from the same samples."""
    code_set: str | None = None
    """Code set to pack, where samples have several (`wds-tools encode --code-set`); by default the first they have."""
    texts: tuple[str, ...] = ()
    """Of samples with several texts, NAME=WEIGHT of those that are used: recap=0.9 alt=0.1; one that is null leaves its weight
    to the others. By default the text that is stored as such."""
    task_samples: int = 20_000
    """Samples of a task, the unit of work for a worker and a resumed run."""

    def __post_init__(self) -> None:
        SequenceConfig.__post_init__(self)
        JobOptions.__post_init__(self)
        if self.task_samples < 1 or self.epoch < 0:
            raise UsageError(f"--task-samples {self.task_samples}, --epoch {self.epoch}: at least 1 and 0")
        self.text_weights  # noqa: B018  # checks them

    @property
    def text_weights(self) -> Weights:
        """Those of `texts`."""
        pairs = [text.rpartition("=") for text in self.texts]
        try:
            weights = {name: float(weight) for name, _, weight in pairs}
        except ValueError:
            weights = {}
        if len(weights) < len(pairs) or "" in weights:
            raise UsageError(f"--texts {' '.join(self.texts)}: expected NAME=WEIGHT of different names: recap=0.9 alt=0.1")
        return text_weights("--texts", weights)

    @property
    def sequences(self) -> SequenceConfig:
        """How samples become sequences."""
        return SequenceConfig(**{field.name: getattr(self, field.name) for field in fields(SequenceConfig)})


def pack(config: PackConfig) -> Manifest:
    """Pack datasets into shards of token rows.

    Args:
        config: what is packed, into what rows, and where they go.

    Returns:
        The manifest of the rows; its `source` has "rows" (length, vocabulary) and "counts" (samples, tokens, padding ...).

    Raises:
        UsageError: the tokenizer does not fit, or see run_job.
    """
    manifests = [read_manifest(open_store(url), instead_of_rows=_PACKED_ALREADY) for url in config.input]
    for url, manifest in zip(config.input, manifests, strict=True):
        if manifest.codes and not chosen_codes(manifest.codes, config.code_set):
            known = ", ".join(manifest.codes)
            raise UsageError(f"{url} has no codes named {config.code_set!r}, but {known}: choose with --code-set")
        if config.code_set is None:
            kinds = ([name.removesuffix(".npy") for name in members] for members, _ in manifest.shards.kinds)
            check_one_code_set(url, kinds, manifest.codes, [*chosen_codes(manifest.codes, None)], "choose with --code-set")
    _check_names(config.text_weights, config.input, manifests)
    size = codebook_size_of(manifests, config.input, config.sequences, [config.code_set] * len(manifests))
    made = {column: provenance for manifest in manifests for column, provenance in manifest.codes.items()}
    builder = ExampleBuilder(config.sequences, config.seed, size)
    total = sum(manifest.samples for manifest in manifests)
    num_tasks = -(-total // config.task_samples)
    settings = builder.spec | {"seed": config.seed, "epoch": config.epoch, "codes": config.code_set}
    settings |= {"texts": dict(config.text_weights)} if config.texts else {}
    rows = {"version": ROWS_VERSION, "length": config.max_length, **builder.vocabulary.rows_spec}
    job = Job(
        command="pack",
        settings=settings,
        tasks=[_share(config.input, manifests, number, num_tasks) for number in range(num_tasks)],
        total=total,
        source={
            "rows": rows,
            "codes": next(iter(chosen_codes(made, config.code_set).values()), {}),
            "tokenizers": version("tokenizers"),
            "inputs": [
                {"url": url, "fingerprint": manifest.fingerprint(), "samples": manifest.samples}
                for url, manifest in zip(config.input, manifests, strict=True)
            ],
        },
        schema_version=ANY_MEMBERS,
        work=_PackSamples(config.sequences, config.seed, config.epoch, size, config.code_set, config.text_weights, made),
    )
    return run_job(job, config)


def _check_names(weights: Weights, urls: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise UsageError for the name of a text that the first pair of no input has: a misspelling would reject all of them."""
    known: set[str] | None = None
    for url, manifest in zip(urls, manifests, strict=True) if weights else ():
        for row in [row for row in manifest.shards if not row.data_types.keys().isdisjoint(PAIR_TYPES)][:1]:
            samples = (sample for _, sample in _read(url, [[asdict(row), 0, row.samples]]))
            pair = next(sample for sample in samples if sample.data_type in PAIR_TYPES)
            known = (known or set()) | {*(pair.texts or ())}
    if known is not None and (missing := [name for name, _ in weights if name not in known]):
        names = ", ".join(sorted(known)) or "none"
        raise UsageError(f"--texts {missing[0]}: no input's first pair has a text of that name; their texts are: {names}")


def _share(urls: Sequence[str], manifests: Sequence[Manifest], number: int, num_tasks: int) -> list[list[Any]]:
    """What a task reads of each input: [url, [[shard row, first sample, behind the last], ...]]."""
    parts = []
    for url, manifest in zip(urls, manifests, strict=True):
        low, high = (manifest.samples * bound // num_tasks for bound in (number, number + 1))
        begin, ranges = 0, []
        for row in manifest.shards:
            first, last = max(low - begin, 0), min(high - begin, row.samples)
            if first < last:
                ranges.append([asdict(row), first, last])
            begin += row.samples
        parts.append([url, ranges])
    return parts


@dataclass(frozen=True)
class _PackSamples:
    """The work on one task; loads the tokenizer once a process."""

    config: SequenceConfig
    seed: int
    epoch: int
    codebook_size: int
    code_set: str | None
    texts: Weights
    made: Mapping[str, Mapping[str, Any]]
    """Provenance of the code columns; those that are chosen have one tokenizer."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the builder: a worker loads its own tokenizer."""
        return _PackSamples, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def builder(self) -> ExampleBuilder:
        return ExampleBuilder(self.config, self.seed, self.codebook_size)

    def __call__(self, task: Sequence[Sequence[Any]], writer: TaskWriter, report: Report) -> int:
        vocabulary = self.builder.vocabulary
        packer = Packer(self.config.max_length, vocabulary.eos)
        dtype, num_ended = ids_dtype(vocabulary.size), 0

        def write(row: Row) -> None:
            nonlocal num_ended
            writer.add_members(writer.key(writer.num_samples), row_members(row, dtype))
            writer.count("padding", row.num_padding)
            num_ended += len(row.ended)

        samples = ((shard, self._chosen(sample)) for shard, sample in _interleaved(task))
        number = 0
        while chunk := list(islice(samples, _AT_ONCE)):
            good = [self._with_text(sample) for shard, sample in chunk if self._is_good(sample, shard, writer)]
            for example in self.builder.build(good, [self.epoch] * len(good)):
                writer.count("samples")
                writer.count("tokens", len(example.ids))
                writer.count("shortened", example.is_shortened)
                if example.pieces:
                    writer.count("split")
                packer.add(number, example)
                number += 1
                while not packer.wants_more:
                    write(packer.row())
            report(Advance(units=len(chunk)))
        for row in packer.rest():
            write(row)
        if num_ended != number:
            raise FormatError(f"task {writer.task}: {number} examples were packed, {num_ended} came out: this is a bug")
        return writer.num_samples + writer.num_rejects

    def _chosen(self, sample: Sample) -> Sample:
        """The sample with the first of the columns that were chosen, as the loaders read it."""
        return sample.with_codes(list(chosen_codes(sample.codes, self.code_set))[:1], self.made)

    def _with_text(self, sample: Sample) -> Sample:
        """The sample with the one of its texts that was drawn."""
        text = choose_text(self.seed, self.epoch, sample.key, sample.text, sample.texts, self.texts)
        return sample._replace(text=text)

    def _is_good(self, sample: Sample, shard: str, writer: TaskWriter) -> bool:
        try:
            self.builder.check(sample)
            check_texts(sample.key, sample.data_type, sample.texts, self.texts)
        except Reject as cause:
            writer.reject(cause, source=shard, key=sample.key)
            return False
        return True


def _interleaved(task: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Sample]]:
    """(shard, sample) of all inputs of a task: each in its own order, spread evenly over the task."""
    counts = [sum(last - first for _, first, last in ranges) for _, ranges in task]
    at = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count] or [np.zeros(0)])
    order = np.repeat(np.arange(len(task)), counts)[np.argsort(at, kind="stable")]
    readers = [_read(url, ranges) for url, ranges in task]
    for number in order.tolist():
        yield next(readers[number])


def _read(url: str, ranges: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Sample]]:
    store = open_store(url)
    for record, first, last in ranges:
        row = shard_info_from_json(record)
        for number, stored in enumerate(read_stored(store, row)):  # to its end, where its hash is compared
            if first <= number < last:
                yield row.name, sample_from_members(stored.key, stored.payloads)

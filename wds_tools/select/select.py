"""Choose samples of datasets: plain tars again, every member byte for byte, keys kept.

    fields -> choose -> which samples of which shards -> tasks of about an output shard each -> their bytes -> output shards

A split is a job an output. Invariant: a sample's bytes are those of the input, whose CRC-32 is compared; order and keys are the
inputs'. Cost: the fields (once), the choice (about 3 us a sample), the bytes of what is chosen; memory is a piece of 8 MiB.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64decode, b64encode
from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from wds_tools.dataset.layout import MANIFEST, PLAN
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import SampleReader
from wds_tools.errors import Reject, UsageError
from wds_tools.format.index import ABSENT
from wds_tools.format.manifest import Manifest, check_one_tokenizer, shard_info_from_json
from wds_tools.format.schema import ANY_MEMBERS, check_key
from wds_tools.format.shard import sample_from_members, split_name
from wds_tools.format.shards import ShardInfo, Shards
from wds_tools.format.tar import first_name
from wds_tools.jobs import Advance, Job, JobOptions, Report, TaskWriter, run_job
from wds_tools.records.where import Where
from wds_tools.select.choose import FATES, NOT_CHOSEN, Judge, KeyList, choose, prefixed
from wds_tools.select.fields import Fields
from wds_tools.sources.record import group_to_limits
from wds_tools.storage import join, open_store
from wds_tools.storage.place import check_apart

SPLIT = "{split}"


@dataclass(frozen=True, kw_only=True)
class SelectConfig(JobOptions):
    """Choose samples of datasets: by conditions, keys or shares; without duplicates; in splits."""

    help_group = "choice"

    input: tuple[str, ...]
    """The datasets: directories or URLs. The samples of several datasets follow one another."""
    where: str | None = None
    """Take only samples for which this is true: 'aesthetic >= 5.5 and not watermark'. See docs/choose.md."""
    keys: str | None = None
    """Take only samples whose keys are in this file: KEY, or DATASET<tab>KEY, a line."""
    exclude: str | None = None
    """Leave out the samples whose keys are in this file."""
    unique: Literal["text", "codes"] | None = None
    """Of samples with equal text (including turns), or equal codes, take only the first, in the order of the inputs."""
    fraction: float | None = None
    """Take this share, drawn by a hash of the key."""
    split: str | None = None
    """Make several datasets, such as train=0.99,valid=0.01; --output has {split} where the name goes."""
    by: str | None = None
    """Draw --fraction and --split by a hash of this field, so that samples with the same value stay together."""
    seed: int = 0
    """Seed of that hash: another seed makes another draw."""
    key_prefix: tuple[str, ...] = ()
    """One prefix for each input: keys become PREFIX-KEY. Needed if several inputs have the same keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.split is None) != (SPLIT not in self.output):
            raise UsageError(f"--output {self.output}: has {SPLIT} in it exactly with --split, and one dataset a name is made")
        self.condition, self.sides  # noqa: B018  # checks them
        if (self.by is not None or self.seed) and self.fraction is None and self.split is None:
            raise UsageError("--by and --seed are for --fraction and --split")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed {self.seed}: expected 0 to 2**64 - 1")
        if self.key_prefix and len(self.key_prefix) != len(self.input):
            raise UsageError(f"--key-prefix: {len(self.key_prefix)} for {len(self.input)} inputs: give one for each")

    @property
    def condition(self) -> Where | None:
        """That of `where`."""
        return None if self.where is None else Where(self.where)

    @property
    def sides(self) -> dict[str, float]:
        """Output -> where its share ends, from 0 to 1."""
        if self.split is None:
            share = 1.0 if self.fraction is None else self.fraction
            if not 0 < share <= 1:
                raise UsageError(f"--fraction {share}: expected more than 0, and 1 at most")
            return {self.output: share}
        parts = re.findall(r"(?:^|,)\s*([\w-]+)=(0?\.\d+)(?=\s*(?:,|$))", self.split, re.ASCII)
        ends = {
            self.output.replace(SPLIT, name): sum(float(share) for _, share in parts[: n + 1])
            for n, (name, _) in enumerate(parts)
        }
        if len(ends) != self.split.count(",") + 1 or abs([*ends.values()][-1] - 1) > 1e-9 or self.fraction is not None:
            what = "expected NAME=SHARE,... of different names, shares that add up to 1, and no --fraction"
            raise UsageError(f"--split {self.split!r}: {what}, such as train=0.99,valid=0.01")
        return ends


def select(config: SelectConfig) -> dict[str, Manifest]:
    """Choose samples of datasets.

    Args:
        config: of which datasets, by what, and where they go.

    Returns:
        The manifest of each output, by its URL; of a part as run_job.

    Raises:
        UsageError: the inputs don't go together; one lacks a field, or has a key of another; or see run_job.
        FormatError: a shard is damaged.
        MissingPackage: pyarrow is not installed.
    """
    stores = [open_store(url) for url in config.input]
    manifests = [read_manifest(store, any_members=True) for store in stores]
    common = of_parents(config.input, manifests)
    outputs = list(config.sides)
    for url in outputs:
        check_apart(config.input, url)
        check_output(config, url)
    spare = open_store(outputs[0])
    given = {"--keys": config.keys, "--exclude": config.exclude}
    judge = Judge(
        fields=tuple(
            Fields.make(store, manifest, spare=spare, workers=config.workers, quiet=config.quiet)
            for store, manifest in zip(stores, manifests, strict=True)
        ),
        where=config.condition,
        lists={option: KeyList.read(url, config.input, option) for option, url in given.items() if url},
        unique=config.unique,
        draw="split" if config.split else "fraction",
        edges=tuple(config.sides.values()) if config.fraction else tuple(config.sides.values())[:-1],
        by=config.by,
        seed=config.seed,
        prefixes=config.key_prefix or ([""] * len(stores) if len(stores) > 1 or manifests[0].is_indexed else None),
    )
    fates, sides = choose(judge, config.input, manifests, workers=config.workers, quiet=config.quiet)
    names = ("where", "keys", "exclude", "unique", "fraction", "split", "by", "seed", "key_prefix")
    settings = {name: value for name in names if (value := getattr(config, name))}
    made = {}
    for side, url in enumerate(outputs):
        rows = np.where((fates == 0) & (sides != side), np.uint8(NOT_CHOSEN), fates)
        job = Job(
            command="select",
            settings={"input": [manifest.fingerprint() for manifest in manifests], **settings},
            tasks=list(_tasks(manifests, rows, config)),
            total=len(rows),
            work=CopySamples(config.input, config.key_prefix),
            **common,
        )
        made[url] = run_job(job, replace(config, output=url, split=None, by=None, seed=0, fraction=None))
    return made


def check_output(options: JobOptions, url: str) -> None:
    """Look whether an output is in the way before the work that the tasks depend on; `run_job` looks again, at everything."""
    store = open_store(url)
    if not ((options.resume or options.part) and (store.exists(MANIFEST) or store.exists(PLAN))):
        Output(store, OutputSpec(num_tasks=0, source={}), overwrite=options.overwrite).look()


def of_parents(urls: Sequence[str], manifests: Sequence[Manifest], **more: Any) -> dict[str, Any]:
    """What travels from datasets to one made of their samples: codes, source (with `more`), schema_version, as Job has them.

    Raises:
        UsageError: their samples don't go together.
    """
    kinds = [(manifest.schema_version == ANY_MEMBERS, manifest.token_rows) for manifest in manifests]
    for url, kind in zip(urls, kinds, strict=True):
        if kind != kinds[0]:
            raise UsageError(f"{urls[0]} and {url} hold samples of different kinds, which don't go into one dataset")
    check_one_tokenizer((url, made, made.code_columns) for url, made in zip(urls, manifests, strict=True))
    codes = dict(ChainMap(*(dict(manifest.codes) for manifest in manifests)))
    facts = ("samples", "inputs", "rejects", "source")
    parents = [
        {"url": url, "fingerprint": manifest.fingerprint(), **{name: getattr(manifest, name) for name in facts}}
        for url, manifest in zip(urls, manifests, strict=True)
    ]
    source: dict[str, Any] = {"input": parents[0]} if len(parents) == 1 else {"inputs": parents}
    rows = {"rows": kinds[0][1]} if kinds[0][1] else {}
    newest = max(manifest.schema_version for manifest in manifests)
    return {"codes": codes, "source": {**source, **rows, **more}, "schema_version": newest}


def _tasks(manifests: Sequence[Manifest], fates: np.ndarray[Any, Any], config: SelectConfig) -> Iterator[list[list[Any]]]:
    """Runs of shards whose chosen samples fill an output shard: [dataset, shard row, fates of its samples] each."""
    items: list[tuple[list[Any], tuple[int, int]]] = []
    first = 0
    for number, manifest in enumerate(manifests):
        for shard in manifest.shards:
            part = fates[first : first + shard.samples]
            first += shard.samples
            num_chosen = int((part == 0).sum())
            size = (num_chosen, shard.bytes * num_chosen // max(shard.samples, 1))
            items.append(([number, asdict(shard), b64encode(zlib.compress(part.tobytes())).decode()], size))
    for group in group_to_limits(items, lambda item: item[1], (config.shard_samples, config.shard_bytes)):
        yield [item for item, _ in group]


@dataclass(frozen=True)
class CopySamples:
    """The work on a run of shards."""

    urls: tuple[str, ...]
    prefixes: tuple[str, ...]

    def __call__(self, task: Sequence[Sequence[Any]], writer: TaskWriter, report: Report) -> int:
        """Copy what is chosen; returns how many samples there were."""
        num_samples = 0
        for dataset, record, packed in task:
            shard = shard_info_from_json(record)
            fates = np.frombuffer(zlib.decompress(b64decode(packed)), np.uint8)
            self._copy(dataset, shard, np.flatnonzero(fates == 0), writer, report)
            for row in np.flatnonzero(fates).tolist():
                cause = Reject(
                    FATES[fates[row]], "--where can't compare values of these types; float(FIELD) is the number in a text"
                )
                writer.reject(cause, source=join(self.urls[dataset], shard.name), element=row)
            report(Advance(units=int((fates != 0).sum())))
            num_samples += shard.samples
        return num_samples

    def _copy(self, dataset: int, shard: ShardInfo, rows: np.ndarray[Any, Any], writer: TaskWriter, report: Report) -> None:
        reader = SampleReader(open_store(self.urls[dataset]), Manifest(shards=Shards.of([shard]), inputs=shard.samples))
        is_whole = not self.prefixes and len(shard.data_types) < 2
        try:
            for index, samples in reader.stored(0, rows) if len(rows) else ():
                if is_whole:
                    writer.add_stored(samples, index, [*shard.data_types] * len(samples))
                for row, data in () if is_whole else enumerate(samples):
                    spans = zip(index.offsets[row].tolist(), index.lengths[row].tolist(), index.members, strict=True)
                    members = sorted(span for span in spans if span[1] != ABSENT)
                    name = first_name(data[: members[0][0]], shard.name, int(index.start[row]))
                    key = prefixed(self.prefixes[dataset] if self.prefixes else "", split_name(name, shard.name)[0])
                    payloads = {suffix: data[begin : begin + length] for begin, length, suffix in members}
                    sample = sample_from_members(key, payloads) if shard.data_types else None
                    if sample is not None:
                        check_key(key)
                    writer.add_members(key, payloads.items(), sample)
                report(Advance(units=len(samples)))
        finally:
            reader.close()

"""What all conversions share beside the options of any job: a `ConvertOptions` says what is read, by which source and converter.

Converters of other packages are entry points of the group `wds_tools.converters`: subclasses of ConvertOptions, whose fields are
the options of `wds-tools convert NAME`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from wds_tools.errors import FormatError, UsageError
from wds_tools.format.schema import MAX_KEY_BYTES, Sample, check_key
from wds_tools.jobs import JobOptions
from wds_tools.records.field_map import Pairs, parse_pairs
from wds_tools.records.where import FACTS, RECORD, Where
from wds_tools.sources.composite import Containers
from wds_tools.sources.record import InputFile, Source

_MAX_PREFIX = MAX_KEY_BYTES - len("-TTTTTTTTT-NNNNNNNN")
_TASK_SIZES = ("task_lines", "task_records", "task_bytes")


class Converter(Protocol):
    """Turns records into samples. A value that is pickled to workers."""

    @property
    def num_ahead(self) -> int:
        """Records that are converted at the same time, in threads, for what waits for files; 0: one after the other."""
        ...

    def roles(self, fields: Mapping[str, Any], /) -> Mapping[str, str]:
        """What is read of a record: role, such as "text" or "image" -> name of the field that has it.

        Args:
            fields: of the record.

        Raises:
            Reject: as `convert`, where the fields alone show it: "unused_image" (two images, or one that is not used) and
                "ambiguous_fields" in the first records stop the run, so their detail names the options to choose from.
        """
        ...

    def convert(self, key: str, fields: Mapping[str, Any], source: str, /) -> Sample:
        """The sample of a record.

        Args:
            key: the sample's.
            fields: of the record.
            source: URL of its file.

        Raises:
            Reject: it can't be used; reasons are in docs/flow.md. Errors of other types end the job.
        """
        ...


class ImageFacts(Protocol):
    """What is known of a sample's image: FACTS by name, pickled to workers as a function is."""

    def __call__(self, sample: Sample, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(JobOptions):
    """How any conversion finds its files, and what its samples are called."""

    help_group = "input"

    input: tuple[str, ...]
    """Files, folders or brace patterns; paths or URLs."""
    keep: tuple[str, ...] = ()
    """Fields of the record to keep as provenance: FIELD, or NAME=FIELD to rename it; a.b for a field inside another."""
    drop: tuple[str, ...] = ()
    """Fields with images to leave out."""
    where: str | None = None
    """Take only records for which this is true, such as 'similarity >= 0.28 and not nsfw'. See docs/fields.md."""
    key_prefix: str = ""
    """NAME makes keys NAME-TTTTTT-NNNNNNNN, so that samples of two datasets can lie in one folder. Letters, digits, _ and -."""
    strict_links: bool = False
    """Follow no symlink that leads out of a folder (--input, --image-root): for archives from strangers."""
    source: str | None = None
    """Source of an installed package that reads the input. Default: each file is recognised by its content."""
    task_lines: int = 2000
    """Lines of a .jsonl file that a worker takes at a time; a shard holds no more."""
    task_records: int = 10_000
    """Records that a worker takes at a time: of a JSON list, or of whole files or row groups that state their number of
    records."""
    task_bytes: int = 256 << 20
    """A worker takes no further file or row group once it has this many bytes of input."""

    command = ""
    """Name of the command, written into the manifest."""
    field_options: ClassVar[tuple[str, ...]] = ()
    """Those of its options that name fields of records."""
    image_facts = cast("ImageFacts | None", None)
    """What --where and --keep may ask of a sample's image: FACTS by name. None: there are no images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_prefix:
            try:
                check_key(self.key_prefix)
            except FormatError as error:
                raise UsageError(f"--key-prefix: {error}") from error
        if len(self.key_prefix) > _MAX_PREFIX:
            raise UsageError(f"--key-prefix {self.key_prefix}: {len(self.key_prefix)} characters, at most {_MAX_PREFIX}")
        condition = self.condition
        facts = {*FACTS} & {field for _, field in self.kept} | (condition.facts if condition else set())
        if self.image_facts is None and facts:
            raise UsageError(f"{', '.join(sorted(facts))}: {self.command} reads no images; a field of the record is record.NAME")
        for name in _TASK_SIZES:
            option, size = f"--{name.replace('_', '-')}", getattr(self, name)
            if size < 1:
                raise UsageError(f"{option} {size}: at least 1")
            if self.source is not None and size != getattr(type(self), name):
                raise UsageError(f"{option} has no effect with --source {self.source}, which cuts the input itself")

    @property
    def kept(self) -> Pairs:
        """(name, field) of `keep`."""
        return parse_pairs("--keep", self.keep)

    @property
    def condition(self) -> Where | None:
        """That of `where`."""
        return None if self.where is None else Where(self.where)

    @property
    def spared(self) -> frozenset[str]:
        """Fields that are kept or dropped: an image in one of them is no fault."""
        return frozenset((*(field.removeprefix(RECORD) for _, field in self.kept), *self.drop))

    @property
    def named_fields(self) -> Mapping[str, Iterable[str]]:
        """Option -> fields that it names, which have to be in the first records; those of --keep are asked for only."""
        kept = [field.removeprefix(RECORD) for _, field in self.kept if field not in FACTS]
        named: dict[str, Any] = {f"--{name}": value for name, value in self.said_fields.items()}
        named |= {"--drop": self.drop, "--keep": kept, "--where": condition.names if (condition := self.condition) else ()}
        return {option: (value,) if isinstance(value, str) else value for option, value in named.items()}

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Columns of tables that are read, beside those that may hold images; None: all."""
        return None

    def make_source(self) -> Source:
        """What reads the input, unless `source` names another."""
        return Containers(self.task_lines, self.task_records, self.task_bytes, self.quiet)

    def make_converter(self) -> Converter:
        """What makes samples of the records."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What decides on a byte of the output, beside the input and the options of any job; JSON values."""
        return {"keep": self.keep, **self.said_fields}

    @property
    def said_fields(self) -> dict[str, Any]:
        """The options of `field_options` that are given."""
        return {name: value for name in self.field_options if (value := getattr(self, name))}

    @property
    def modes(self) -> Mapping[str, str]:
        """Of samples with images, which an encoder can fill: data type -> mode, such as "cc512"."""
        return {}

    def code_columns(self, files: Sequence[InputFile]) -> Mapping[str, Mapping[str, Any]]:  # noqa: ARG002  of these
        """Column -> provenance of the codes that the records of these files bring.

        Args:
            files: the input, as `Source.choose` chose it.

        Returns:
            What the manifest's `codes` will have; {} where records bring none.
        """
        return {}

"""What all conversions share beside the options of any job: a `ConvertOptions` says what is read, by which source and converter.

Converters of other packages are entry points of the group `wds_tools.converters`: subclasses of ConvertOptions, whose fields are
the options of `wds-tools convert NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from wds_tools.errors import FormatError, UsageError
from wds_tools.format.schema import MAX_KEY_BYTES, Sample, check_key, taken_names
from wds_tools.jobs import JobOptions
from wds_tools.sources.record import Source

_MAX_PREFIX = MAX_KEY_BYTES - len("-TTTTTTTTT-NNNNNNNN")
_TASK_SIZES = ("task_lines", "task_records", "task_bytes")


class Converter(Protocol):
    """Turns records into samples. A value that is pickled to workers."""

    num_ahead: int
    """Records that are converted at the same time, in threads, for what waits for files; 0: one after the other."""

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


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(JobOptions):
    """How any conversion finds its files, and what its samples are called."""

    input: tuple[str, ...]
    """Files, folders or brace patterns; paths or URLs."""
    source: str | None = None
    """Source of an installed package that reads the input. Default: what this command reads."""
    keep: tuple[str, ...] = ()
    """Fields of the record to keep as provenance, such as url."""
    strict_links: bool = False
    """Of folders (--input, --image-root), follow no symlink that leads out: for what was unpacked from archives of strangers."""
    key_prefix: str = ""
    """NAME makes keys NAME-TTTTTT-NNNNNNNN, so that samples of two datasets can lie in one folder. Letters, digits, _ and -."""

    command = ""
    """Name of the command, written into the manifest."""
    takes_images = False
    """Whether these are ImageOptions: asked where Pillow need not be imported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_prefix:
            try:
                check_key(self.key_prefix)
            except FormatError as error:
                raise UsageError(f"--key-prefix: {error}") from error
        if len(self.key_prefix) > _MAX_PREFIX:
            raise UsageError(f"--key-prefix {self.key_prefix}: {len(self.key_prefix)} characters, at most {_MAX_PREFIX}")
        if taken := taken_names(self.keep):
            raise UsageError(f"--keep {', '.join(sorted(taken))}: these names are the schema's own, or not safe for readers")
        for field in fields(self):
            if field.name in _TASK_SIZES:
                option, size = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
                if size < 1:
                    raise UsageError(f"{option} {size}: at least 1")
                if self.source is not None and size != field.default:
                    raise UsageError(f"{option} has no effect with --source {self.source}, which cuts the input itself")

    def make_source(self) -> Source:
        """What reads the input, unless `source` names another."""
        raise NotImplementedError

    def make_converter(self) -> Converter:
        """What makes samples of the records."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What decides on a byte of the output, beside the input and the options of any job; JSON values."""
        return {"keep": self.keep}

    @property
    def modes(self) -> Mapping[str, str]:
        """Of samples with images, which an encoder can fill: data type -> mode, such as "cc512"."""
        return {}

    @property
    def code_columns(self) -> Mapping[str, Mapping[str, Any]]:
        """Column -> provenance of the codes that the records bring."""
        return {}


def kept_fields(record: Mapping[str, Any], keep: Sequence[str]) -> dict[str, Any]:
    """The fields of a record that are kept."""
    return {name: record[name] for name in keep if name in record}

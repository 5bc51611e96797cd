"""What an export is told, and what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from wds_tools.errors import UsageError
from wds_tools.export.rows import Format
from wds_tools.run.local import OnWorkers
from wds_tools.storage import LocalStore, open_store
from wds_tools.storage.place import check_apart

MAX_FILES = 99_999
NAMES: Mapping[Format, str] = {
    "arrow": "data-{:05d}-of-{:05d}.arrow",
    "parquet": "data/train-{:05d}-of-{:05d}.parquet",
}
"""Of the files, by their number and how many there are."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(OnWorkers):
    """What any export is told."""

    help_group = "output"

    input: tuple[str, ...]
    """One or more datasets: folders or URLs. A dataset that is named twice is exported twice."""
    output: str
    """Where the result goes: a directory or an object-store prefix, empty or absent."""
    num_shards: int | None = None
    """Files to write, at most one per sample. Default: one for each 256 MiB of the datasets' tars."""
    license: str | None = None
    """Licence of the rows, for the dataset card, by its name on the Hub: cc-by-4.0, apache-2.0, other ..."""
    push_to_hub: str | None = None
    """Upload the finished export (Parquet, in a local folder) to this dataset repository of the Hugging Face Hub (OWNER/NAME),
    which is made if it does not exist. Uses the token of Hugging Face's own tools: HF_TOKEN, or `hf auth login`."""
    private: bool = False
    """With --push-to-hub: make the repository private."""
    resume: bool = False
    """Continue after an interruption: a finished export of the same command is kept, an unfinished one starts again, and the Hub
    gets the files that it does not have yet."""
    verify: bool = False
    """With --resume: also compare the hashes of a finished export's files, which reads them. Default: only their sizes."""
    overwrite: bool = False
    """First remove the export at the output, finished or not. Other files are never removed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.input:
            raise UsageError("--input: name at least one dataset")
        if self.num_shards is not None and not 1 <= self.num_shards <= MAX_FILES:
            raise UsageError(f"--num-shards {self.num_shards}: expected 1 to {MAX_FILES}")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite exclude each other: keep what is there, or remove it")
        if self.verify and not self.resume:
            raise UsageError("--verify is for --resume: it looks at what an earlier run finished")
        check_apart(self.input, self.output)
        if self.push_to_hub is None and self.private:
            raise UsageError("--private is for the repository of --push-to-hub")
        if self.push_to_hub is not None and (self.writes != "parquet" or not isinstance(open_store(self.output), LocalStore)):
            raise UsageError("--push-to-hub uploads Parquet files from a folder here: --format parquet, and a local --output")
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise UsageError(f"--push-to-hub {self.push_to_hub!r}: expected OWNER/NAME")

    @property
    def writes(self) -> Format:
        """What kind of files."""
        return "parquet"


@dataclass(frozen=True, kw_only=True)
class ParquetConfig(ExportOptions):
    """Write datasets as typed Parquet with all of their content, in their order; `convert coded` reads it back."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions):
    """Shuffle datasets together and write them as a Hugging Face dataset of Liquid's seven columns."""

    help_group = "output"

    format: Format = "arrow"
    """arrow: for datasets.load_from_disk. parquet: for load_dataset("parquet", ...), pandas and the hub."""
    code_set: str = ""
    """Code set to export, if datasets have several (see `wds-tools encode --code-set`), or the column."""
    seed: int = 42
    """Seed of the shuffle, 0 to 2**64 - 1. The order depends on the seed and the inputs, not on format or num_shards."""
    reader: Literal["any", "liquid"] = "any"
    """liquid: leave out and count samples that Liquid's own trainer would treat as plain text: image_text_multi, visual_sft."""

    def __post_init__(self) -> None:
        if self.format not in NAMES:
            raise UsageError(f"--format {self.format!r}: expected {' or '.join(NAMES)}")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed {self.seed}: expected 0 to 2**64 - 1")
        super().__post_init__()

    @property
    def writes(self) -> Format:
        """What kind of files."""
        return self.format


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export wrote."""

    rows: int
    """Rows of all files."""
    files: int
    """Arrow or Parquet files, all of about the same number of rows, none empty."""
    data_types: Mapping[str, int]
    """Rows by data type."""
    left_out: Mapping[str, int]
    """Samples by data type that the reader would take for something else."""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    """Samples that have something for which there is no column: texts, image, provenance, or a column of other codes. Counted
    while they are read, so empty where a finished export was kept."""
    pushed: int | None = None
    """Files sent to the Hub, if that was asked for; those that it had are not sent."""

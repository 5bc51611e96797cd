"""Table rows of Liquid's Hugging Face data, and of our own exports, back into shards: nothing is encoded again.

    files, or ranges of lines -> table rows -> Sample(text, codes, conversations) -> shards

`sources.coded` says what a table row holds. Which tokenizer made the codes, the rows don't say: it is an argument. Rows
with other numbers of codes than their grid has, or with codes beyond the codebook, are rejects. Memory: see tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wds_tools.convert.options import ConvertOptions
from wds_tools.errors import UsageError
from wds_tools.format.codes import CODE_COLUMNS
from wds_tools.format.schema import Sample
from wds_tools.records.coded import SIDE_512, CodedRows, codes_in
from wds_tools.sources.tables import Tables


@dataclass(frozen=True, kw_only=True)
class CodedConfig(ConvertOptions):
    """Convert Hugging Face datasets that hold codes, Liquid's or those of `export hf`, to shards."""

    input: tuple[str, ...]
    """Folders written by save_to_disk, .parquet or .jsonl files of the same seven fields, or folders of any; paths or URLs."""
    tokenizer: str = "chameleon"
    """Name of the tokenizer that made the codes. The rows don't say; it is written into the manifest."""
    codebook_size: int = 8192
    """Entries of its codebook; a row with a code beyond is rejected."""
    stride: int = 16
    """Pixels of an image on a side for each code."""
    weights_hash: str | None = None
    """Hash of its weights, as the manifest of a set that was encoded here has it: only then can the two be exported together."""
    task_lines: int = 10_000
    """Of a jsonl, a worker, and a resumed run, takes this many lines at a time; of a Hugging Face folder one file."""

    command = "convert coded"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.codebook_size <= 1 << 32:
            raise UsageError(f"--codebook-size {self.codebook_size}: expected 1 to 2**32")
        if self.stride < 1 or SIDE_512 % self.stride:
            raise UsageError(f"--stride {self.stride}: expected a divisor of {SIDE_512}")

    def make_source(self) -> Tables:
        """Arrow, Parquet and jsonl files."""
        return Tables(self.task_lines, self.quiet)

    def make_converter(self) -> Coded:
        """The codes, text and turns of a record."""
        return Coded(CodedRows(self.codebook_size, self.stride))

    @property
    def _tokenizer_settings(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer,
            "codebook_size": self.codebook_size,
            "stride": self.stride,
            "weights_hash": self.weights_hash,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """See ConvertOptions."""
        return {**self._tokenizer_settings, **super().settings}

    @property
    def code_columns(self) -> Mapping[str, Mapping[str, Any]]:
        """See ConvertOptions."""
        provenance = {**self._tokenizer_settings, "precision": "unknown", "imported": True}
        return dict.fromkeys(CODE_COLUMNS, provenance)


@dataclass(frozen=True)
class Coded:
    """Records of Liquid's seven fields -> samples with codes."""

    rows: CodedRows
    num_ahead = 0

    def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See Converter."""
        return {name: name for name in ("text", *CODE_COLUMNS) if codes_in(fields, name) is not None}

    def convert(self, key: str, fields: Mapping[str, Any], _source: str) -> Sample:
        """See Converter."""
        return self.rows.sample(key, fields)

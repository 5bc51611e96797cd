"""Rows that hold codes already, back into shards: nothing is encoded again.

    row of Liquid's seven columns, or of our exports       -> Sample(text, codes, conversations) as it says itself
    row with codes in any other field, or in an npy file   -> Sample(text, codes)
    row of `export parquet`                                -> the Sample that it was made of, images and all

Which tokenizer made the codes, files of `export parquet` say, others don't: it is an argument. Rows with other numbers of codes
than their grid has, or with codes beyond the codebook, are rejects (`records.coded`, `records.arrays`). Images beside codes of
others are not read: the codes are what the row has of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from wds_tools.convert.options import ConvertOptions
from wds_tools.errors import Reject, UsageError
from wds_tools.format.codes import CODE_COLUMNS, HW, CodeGrid
from wds_tools.format.manifest import code_layouts
from wds_tools.format.schema import Sample
from wds_tools.images import Mode, parse_mode
from wds_tools.records.arrays import PICKLED
from wds_tools.records.coded import ABSENT, IMAGE_TYPES, SIDE_512, TYPED_FIELDS, CodedRows
from wds_tools.records.field_map import FieldMap
from wds_tools.records.fields import lacks, value_of
from wds_tools.records.images import ImageSource
from wds_tools.sources.record import InputFile
from wds_tools.sources.tables import PARQUET, exported_codes

_LIQUIDS = "chameleon"
"""What made the codes of Liquid's datasets."""
CODE_NAMES = ("vq_code", "vq_codes", "codes", "npy")
"""Fields in which codes are looked for, beside Liquid's columns."""
_SUFFIXES = (".npy", *PICKLED)
"""Of files with codes: the field has the path. Pickles are refused when they are looked at."""
_MAX_FILE_BYTES = 64 << 20
_NUM_AHEAD = 16


@dataclass(frozen=True, kw_only=True)
class CodedConfig(ConvertOptions):
    """Convert datasets with codes to shards: Liquid's, exports of this project, or others with a field or npy file of codes."""

    help_group = "codes and texts"

    input: tuple[str, ...]
    """Folders written by save_to_disk, .parquet or .jsonl files of the same seven fields, or folders of these; paths or URLs."""
    tokenizer: str | None = None
    """Name of the tokenizer that made the codes, for the manifest; default: chameleon. Only rows of `export parquet` record this
    and the next three options."""
    codebook_size: int = 8192
    """Entries of its codebook; a row with a larger code is rejected."""
    stride: int = 16
    """Pixels of an image on a side for each code."""
    weights_hash: str | None = None
    """Hash of its weights, from the manifest of a dataset encoded by this project: needed to export both together."""
    layout: str = "hw"
    """Axes of the arrays, a letter each: hw, n for codes in one dimension (TiTok), hwk for several codebooks of one size."""
    mode: str | None = None
    """With another --layout than hw: the mode of the images, such as cc256, which names the column."""
    codes: str | None = None
    """Field with the codes of an image. Default: Liquid's columns, else vq_code, vq_codes, codes or npy."""
    text: tuple[str, ...] = ()
    """Fields with the text: the first that is there. Default: well-known names in a documented order."""
    code_root: str | None = None
    """Folder that paths of npy files are relative to, and may not leave. Default: the folder of the records."""
    grid: tuple[int, int] | None = None
    """Rows and columns of codes, if they follow neither from the array, nor from the fields width and height, nor from 512
    pixels."""
    crop: int | None = None
    """With --grid: number of the grid to take, from 0, if an array has several, such as ten crops."""

    command = "convert coded"
    field_options = ("codes", "text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.codebook_size <= 1 << 32:
            raise UsageError(f"--codebook-size {self.codebook_size}: expected 1 to 2**32")
        if self.stride < 1 or SIDE_512 % self.stride:
            raise UsageError(f"--stride {self.stride}: expected a divisor of {SIDE_512}")
        if (self.layout == HW.layout) != (self.mode is None) or (self.mode is not None and self.grid is not None):
            raise UsageError("--layout n, hwk and so on need --mode, such as cc256, and take no --grid; hw takes no --mode")
        if self.grid is not None and min(self.grid) < 1:
            raise UsageError(f"--grid {self.grid[0]} {self.grid[1]}: at least 1")
        if self.crop is not None and (self.grid is None or self.crop < 0):
            raise UsageError(f"--crop {self.crop}: counts the grids of --grid, from 0")

    def make_converter(self) -> Coded:
        """The codes, text and turns of a record."""
        rows = CodedRows(self.codebook_size, self.stride, self.grid, self.crop, self._other)
        num_ahead = 0 if self.code_root is None else _NUM_AHEAD  # files are waited for
        return Coded(rows, self.codes, FieldMap(text=self.text), self.code_root, self.strict_links, num_ahead)

    @property
    def _other(self) -> tuple[CodeGrid, Mode] | None:
        if self.mode is None:
            return None
        return CodeGrid(layout=self.layout, codebook_size=self.codebook_size), parse_mode(self.mode)

    @property
    def _tokenizer_settings(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer or _LIQUIDS,
            "codebook_size": self.codebook_size,
            "stride": self.stride if self._other is None or self._other[0].has_sides else None,
            "weights_hash": self.weights_hash,
            **({} if self._other is None else self._other[0].declared),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """See ConvertOptions."""
        names = ("mode", "codes", "text", "code_root", "grid", "crop")
        said = {name: value for name in names if (value := getattr(self, name)) not in (None, ())}
        return {**self._tokenizer_settings, **said, **super().settings}

    def code_columns(self, files: Sequence[InputFile]) -> Mapping[str, Mapping[str, Any]]:
        """What the options and files of `export parquet` say of the codes; see ConvertOptions.

        Args:
            files: the input, as `Source.choose` chose it.

        Raises:
            UsageError: files of `export parquet` contradict one another, or the options, or lost what made their codes.
        """
        provenance = {**self._tokenizer_settings, "precision": "unknown", "imported": True}
        columns: dict[str, Mapping[str, Any]] = {}
        given = [
            name
            for name in ("tokenizer", "codebook_size", "stride", "weights_hash")
            if getattr(self, name) != getattr(CodedConfig, name)
        ]
        tables = [file for file in files if file.url.lower().endswith(PARQUET)]
        with ThreadPoolExecutor(_NUM_AHEAD, "footer") as pool:
            for (url, _), exported in zip(tables, pool.map(lambda file: exported_codes(*file), tables), strict=True):
                if exported is None and self.tokenizer is None:
                    raise UsageError(
                        f"{url} is from `export parquet`, but something wrote it again and left out what made its codes: say "
                        "--tokenizer, --codebook-size and --stride, as the manifest of the dataset has them"
                    )
                for column, made in (exported or {}).items():
                    if given or columns.setdefault(column, made) != made:
                        how = f"leave out --{given[0].replace('_', '-')}" if given else "convert what has other codes apart"
                        raise UsageError(f"{url} says itself how {column} was made: {how}")
        return {**dict.fromkeys(CODE_COLUMNS if self._other is None else (self._other[1].column,), provenance), **columns}


@dataclass(frozen=True)
class Coded:
    """Records that hold codes -> samples."""

    rows: CodedRows
    codes_field: str | None
    field_map: FieldMap
    root: str | None
    strict_links: bool
    num_ahead: int
    made: dict[str, Mapping[str, CodeGrid]] = field(default_factory=dict)
    """URL of a file of `export parquet` that was met -> what its columns of codes are."""

    def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See Converter."""
        known = (*CODE_COLUMNS, *CODE_NAMES, *(suffix[1:] for suffix in PICKLED))
        names = known if self.codes_field is None else (self.codes_field,)
        found = [name for name in names if value_of(fields, name) not in (None, ABSENT)]
        if len(found) > 1 and not set(found) <= {*CODE_COLUMNS}:
            options = " or ".join(f"--codes {name}" for name in found)
            raise Reject("ambiguous_fields", f"{', '.join(found)} hold codes: say {options}")
        roles = {"codes": found[0]} if found else {}
        text = self.field_map.text_field(fields)
        return roles if text is None else {**roles, "text": text}

    def convert(self, key: str, fields: Mapping[str, Any], source: str) -> Sample:
        """See Converter."""
        if fields.keys() >= {*TYPED_FIELDS}:
            if source not in self.made:
                self.made[source] = code_layouts(exported_codes(source) or {}) if source.lower().endswith(PARQUET) else {}
            return self.rows.typed(key, fields, self.made[source])
        name, kind = self.roles(fields).get("codes"), fields.get("data_type")
        if name is None and (kind is None or self.rows.other):
            raise lacks(fields, " or ".join((*CODE_COLUMNS, *CODE_NAMES)), "; see --codes", "missing_codes")
        if name is None or (name in CODE_COLUMNS and not self.rows.other):
            text = {"text": self.field_map.required_text(fields)} if self.field_map.text or "text" not in fields else {}
            return self.rows.sample(key, {"data_type": IMAGE_TYPES[0], **fields, **text})
        if kind == "visual_sft" and not self.rows.other:
            return self.rows.sample(key, {**fields, CODE_COLUMNS[0]: value_of(fields, name)})
        if kind not in (None, *IMAGE_TYPES):
            raise Reject("unknown_data_type", f"data_type is {kind!r}, and {name} has codes: expected {IMAGE_TYPES[0]}")
        value = self._loaded(value_of(fields, name), source)
        return self.rows.image(key, fields, name, value, self.field_map.required_text(fields))

    def _loaded(self, value: Any, source: str) -> Any:
        """The content of the file that a value names, or the value."""
        if not isinstance(value, str) or not value.lower().endswith(_SUFFIXES):
            return value
        data = ImageSource(source, self.root, self.strict_links).read(value, _MAX_FILE_BYTES)
        if len(data) > _MAX_FILE_BYTES:
            raise Reject("too_many_bytes", f"{value[:300]}: more than {_MAX_FILE_BYTES:,} bytes")
        return data

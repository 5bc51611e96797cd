"""What a package adds to wds-tools: a source (CSV files), a converter (notes), an image tokenizer (mean colours), a template.

wds-tools convert notes --input notes.csv --output notes
wds-tools convert pairs --source csv --input pairs.csv --output pairs --encode colours
wds-tools pack --input pairs --tokenizer Lumina-mGPT/ --template lumina-mgpt --max-length 4096 --output rows
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wds_tools import Sample
from wds_tools.convert import ConvertOptions
from wds_tools.errors import NotFound, Reject
from wds_tools.sequences.prompts import Prompts
from wds_tools.sequences.templates import Chameleon
from wds_tools.sources import InputFile, Record, file_records
from wds_tools.storage import open_store, split_url

if TYPE_CHECKING:  # a source or a converter does not need it
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class CsvFiles:
    """CSV files whose first line names the fields; a task is a file."""

    def choose(self, url: str, sizes: Mapping[str, int]) -> Sequence[str]:
        """The files of a folder that are read."""
        names = [name for name in sizes if name.endswith(".csv")]
        if not names:
            raise NotFound(f"{url}: no *.csv under this folder")
        return names

    def plan(self, files: Sequence[InputFile]) -> tuple[Sequence[str], int]:
        """A task for each file; progress counts bytes."""
        return [file.url for file in files], sum(file.size for file in files)

    def read(self, task: str) -> Iterator[Record[Mapping[str, Any]]]:
        """The records of a file, under the numbers of their lines."""
        return file_records(task, self._read_lines(task))

    def _read_lines(self, url: str) -> Iterator[tuple[int, Mapping[str, Any] | Reject, int]]:
        root, name = split_url(url)
        text = bytes(open_store(root).read(name)).decode(errors="replace")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        for fields in rows:
            is_whole = None not in fields and None not in fields.values()
            broken = Reject("bad_csv", f"{len(rows.fieldnames or ())} fields expected, as the first line has")
            yield rows.line_num, fields if is_whole else broken, len(text) // (text.count("\n") or 1)


@dataclass(frozen=True, kw_only=True)
class NotesConfig(ConvertOptions):
    """Convert notes, a title and a body each, to documents."""

    input: tuple[str, ...]
    """.csv files with the fields title and body, folders of them or brace patterns."""
    min_characters: int = 1
    """Notes with a shorter body are rejected."""

    command = "convert notes"

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides on a byte of the output."""
        return {"min_characters": self.min_characters, **super().settings}

    def make_source(self) -> CsvFiles:
        """What reads the input, unless --source names another."""
        return CsvFiles()

    def make_converter(self) -> Notes:
        """What makes samples of the records."""
        return Notes(self.min_characters)


@dataclass(frozen=True)
class Notes:
    """Records with a title and a body -> documents."""

    min_characters: int
    num_ahead = 0  # nothing to wait for: one record after the other

    def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """Which field is what: said before anything is written."""
        return {role: name for role, name in (("title", "title"), ("text", "body")) if name in fields}

    def convert(self, key: str, fields: Mapping[str, Any], _source: str) -> Sample:
        """The sample of a record; a Reject says why there is none."""
        body = str(fields.get("body") or "")
        if len(body) < self.min_characters:
            raise Reject("too_short", f"a body of {len(body)} characters, expected at least {self.min_characters}")
        return Sample(key=key, data_type="text_pretrain", text=f"{fields.get('title', '')}\n\n{body}")


class Colours:
    """Block of 16 x 16 pixels -> its mean colour, 3 bits each of red, green and blue. See wds_tools.vq.ImageTokenizer."""

    name, codebook_size, stride, weights_hash = "colours", 512, 16, "sha256:0"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Pixels -> codes (B, H / 16, W / 16)."""
        blocks = pixels_BHWC.to(self.device).float().unflatten(2, (-1, self.stride)).unflatten(1, (-1, self.stride))
        red, green, blue = (blocks.mean((2, 4)).long() >> 5).unbind(-1)
        return red << 6 | green << 3 | blue

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes -> pixels, one colour a block."""
        codes_Bhw1 = codes_Bhw.to(self.device).long()[..., None]
        colours_BhwC = (codes_Bhw1 >> codes_Bhw1.new_tensor([6, 3, 0]) & 7) << 5
        return colours_BhwC.byte().repeat_interleave(self.stride, 1).repeat_interleave(self.stride, 2)


def load_colours(weights: Path | None, device: torch.device, precision: str) -> Colours:  # noqa: ARG001  there are none
    """What `--tokenizer colours` and `--encode colours` load."""
    return Colours(device)


_GRIDS = tuple(f"<reserved{8800 + number:05d}>" for number in range(97))
"""Lumina-mGPT's words for 0, 32, 64, ... pixels."""
_PROMPTS = replace(Chameleon().prompts, size="")


@dataclass(frozen=True, kw_only=True)
class LuminaMGPT(Chameleon):
    """Chameleon whose images state height and width, as Lumina-mGPT's code has it, and whose rows of codes have an end."""

    eos: str | None = "<reserved08706>"
    row_end: str = "<reserved08799>"
    others: tuple[str, ...] = ("<reserved08706>", *_GRIDS)
    states_shape: bool = True
    prompts: Prompts = _PROMPTS

    def before_codes(self, shape: Sequence[int] | None) -> str:
        """Two codes are 32 pixels."""
        height, width = shape or (0, 0)
        return self.boi + _GRIDS[height // 2] + _GRIDS[width // 2]

"""What all conversions share beside the options of any job."""

from __future__ import annotations

from dataclasses import dataclass

from wds_tools.errors import FormatError, UsageError
from wds_tools.format.schema import MAX_KEY_BYTES, check_key
from wds_tools.jobs.options import JobOptions

_MAX_PREFIX = MAX_KEY_BYTES - len("-TTTTTTTTT-NNNNNNNN")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(JobOptions):
    """How any conversion finds its files, and what its samples are called."""

    input: tuple[str, ...]
    """Files, folders or brace patterns; paths or URLs."""
    strict_links: bool = False
    """Of folders (--input, --image-root), follow no symlink that leads out: for what was unpacked from archives of strangers."""
    key_prefix: str = ""
    """NAME makes keys NAME-TTTTTT-NNNNNNNN, so that samples of two datasets can lie in one folder. Letters, digits, _ and -."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_prefix:
            try:
                check_key(self.key_prefix)
            except FormatError as error:
                raise UsageError(f"--key-prefix: {error}") from error
        if len(self.key_prefix) > _MAX_PREFIX:
            raise UsageError(f"--key-prefix {self.key_prefix}: {len(self.key_prefix)} characters, at most {_MAX_PREFIX}")

"""What a user says of a tokenizer and how it is to run: the same options for every command that encodes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from wds_tools.errors import FormatError, UsageError
from wds_tools.format.codes import CODE_COLUMNS, named_column

_SEVERAL_GPUS = re.compile(r"cuda:\d{1,3}(,\d{1,3})+")


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How a tokenizer runs."""

    help_group = "encoding"

    weights: str | None = None
    """Folder of the tokenizer's weights."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N, or several with a process each: cuda:0,1,2,3."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Number format of the network. All but fp32 are faster and change some codes."""
    compile: bool = False
    """Run the network through torch.compile: needs a minute of preparation for each image size, and changes some codes."""
    batch_size: int = 16
    """Images of 512 x 512 pixels in a batch; fewer if they are larger. Halved if memory runs out."""
    resize: Literal["pillow", "torch"] = "pillow"
    """Library that scales the images. torch needs half of the processor time, and changes some codes."""

    min_pixels: int = 0
    """With a mode such as fit720: images with fewer pixels are enlarged to this number."""

    code_set: str = ""
    """Name of the code set, if a dataset gets several: its columns are then vqcode_512-NAME and so on."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: at least 1")
        try:
            named_column(CODE_COLUMNS[0], self.code_set)
        except FormatError as error:
            raise UsageError(f"--code-set: {error}") from None
        repeated = [device for device in self.devices if device != "cpu" and self.devices.count(device) > 1]
        if repeated:
            raise UsageError(f"--device {self.device}: names {repeated[0]} twice")

    @property
    def devices(self) -> tuple[str, ...]:
        """One name for each process that encodes: "cuda:0,1" is cuda:0 and cuda:1, "cpu,cpu" two processes on the CPU."""
        if _SEVERAL_GPUS.fullmatch(self.device):
            return tuple(f"cuda:{int(number)}" for number in self.device.removeprefix("cuda:").split(","))
        return tuple(self.device.split(","))

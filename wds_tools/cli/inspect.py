"""`wds-tools inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from wds_tools.cli.options import Named, Positional
from wds_tools.cli.summary import Printed, itemize, show
from wds_tools.convert.inspect import inspect_input
from wds_tools.terminal import counted

EXAMPLE = "wds-tools inspect laion/"
_Kind = Literal["pairs", "documents", "conversations", "interleaved", "coded"]


@dataclass(frozen=True, kw_only=True)
class Config(Printed):
    """Show what an input is and what it would become: its fields, which field is what, the first samples, and the command to
    type. Writes nothing."""

    input: Positional[tuple[str, ...]]
    """Files, folders or patterns; paths or URLs."""
    converter: Annotated[_Kind | None, Named("as")] = None
    """Kind of samples to make. Default: the kind that fits."""
    image_root: tuple[str, ...] = ()
    """Folder that image paths are relative to, or tars with the images; this and the following options work as in `convert`."""
    image: str | None = None
    """Field with the image."""
    text: tuple[str, ...] = ()
    """Fields with the text: the first that is there."""
    texts: tuple[str, ...] = ()
    """Several captions, NAME=FIELD each."""
    conversations: str | None = None
    """Field with the turns."""
    codes: str | None = None
    """Field with the codes."""
    keep: tuple[str, ...] = ()
    """Fields to keep as provenance."""
    drop: tuple[str, ...] = ()
    """Fields with images to leave out."""
    where: str | None = None
    """Take only records for which this is true."""


def run(config: Config) -> int:
    """Look, and say what there is."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("input", "converter", "json") and value}
    found = inspect_input(config.input, converter=config.converter, **settings)
    left_out, rejects, fields = found["left_out"], found["rejects"], found["fields"]
    width = max(map(len, fields))
    lines = [
        f"input     {found['input']}",
        *([f"left out  {counted(left_out['files'], 'file')}, such as {left_out['such_as']}"] if left_out else []),
        f"records   {found['num_records']:,} looked at" + (f", {itemize(rejects)}" if rejects else ""),
        "fields",
        *(f"  {name:<{width}}  {itemize(field['types'])}: {field['example']}" for name, field in fields.items()),
        f"becomes   {found['converter']}: {found['field_map']}",
        *(f"  {line}" for line in found["samples"]),
        f"stops at  {found['problem']}" if found["problem"] else f"command   {found['command']}",
    ]
    show(config, found, lines)
    return 0

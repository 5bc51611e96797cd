"""`wds-tools inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from wds_tools.cli.summary import Printed, itemize, print_json
from wds_tools.convert.inspect import inspect_input
from wds_tools.terminal import say

EXAMPLE = "wds-tools inspect laion/"


@dataclass(frozen=True, kw_only=True)
class Config(Printed):
    """Say what an input is, and what would become of it: its fields, which is what, the first samples, and the command to type.
    Nothing is written."""

    input: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or patterns; paths or URLs."""
    converter: Annotated[
        Literal["pairs", "documents", "conversations", "interleaved", "coded"] | None, tyro.conf.arg(name="as")
    ] = None
    """What it is to become. Default: what fits."""
    image_root: tuple[str, ...] = ()
    """Folder that image paths are relative to, or tars with the images, as `convert` has it."""


def run(config: Config) -> int:
    """Look, and say what there is."""
    found = inspect_input(config.input, converter=config.converter, image_root=config.image_root)
    if config.json:
        print_json(found)
        return 0
    left_out, rejects, fields = found["left_out"], found["rejects"], found["fields"]
    width = max(map(len, fields))
    say(
        f"input     {found['input']}",
        *([f"left out  {left_out['files']:,} files, such as {left_out['such_as']}"] if left_out else []),
        f"records   {found['num_records']:,} looked at" + (f", {itemize(rejects)}" if rejects else ""),
        "fields",
        *(f"  {name:<{width}}  {itemize(field['types'])}: {field['example']}" for name, field in fields.items()),
        f"becomes   {found['converter']}: {found['field_map']}",
        *(f"  {line}" for line in found["samples"]),
        *([f"stops at  {found['problem']}"] if found["problem"] else []),
        f"command   {found['command']}",
    )
    return 0

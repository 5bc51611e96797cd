"""`wds-tools inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
    converter: Annotated[Literal["pairs", "documents", "conversations", "coded"] | None, tyro.conf.arg(name="as")] = None
    """What it is to become. Default: what fits."""
    image_root: str | None = None
    """Folder that image paths are relative to, as `convert` has it."""


def run(config: Config) -> int:
    """Look, and say what there is."""
    found = inspect_input(config.input, converter=config.converter, image_root=config.image_root)
    if config.json:
        print_json(asdict(found))
        return 0
    say(f"input     {found.input}")
    if found.left_out is not None:
        say(f"left out  {found.left_out['files']:,} files, such as {found.left_out['such_as']}")
    say(f"records   {found.num_records:,} looked at" + (f", {itemize(found.rejects)}" if found.rejects else ""), "fields")
    width = max(map(len, found.fields))
    for name, facts in found.fields.items():
        say(f"  {name:<{width}}  {itemize(facts['types'])}: {facts['example']}")
    say(f"becomes   {found.converter}: {found.field_map}", *(f"  {line}" for line in found.samples))
    if found.problem is not None:
        say(f"stops at  {found.problem}")
    say(f"command   {found.command}")
    return 0

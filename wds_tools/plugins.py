"""What other installed packages add by entry points: sources, converters, ... Each is imported when it is asked for."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from wds_tools.errors import UsageError, WdsToolsError, in_one_line, meant

SOURCES, CONVERTERS = "wds_tools.sources", "wds_tools.converters"
TOKENIZERS, TEMPLATES = "wds_tools.tokenizers", "wds_tools.templates"
"""Groups of entry points."""


@dataclass(frozen=True)
class Names:
    """In the type of a setting: it may be one of a list of names, ours and those of packages."""

    where: str
    """MODULE:FUNCTION that gives the list; imported when it is asked for."""

    def __call__(self) -> list[str]:
        """The names."""
        return list(pkgutil.resolve_name(self.where)())


def plugins(group: str) -> dict[str, EntryPoint]:
    """Name -> entry point, of a group."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_plugin(group: str, name: str, error: type[WdsToolsError] = WdsToolsError) -> Any:
    """What an entry point names.

    Args:
        group: one of the groups above.
        name: of the entry point.
        error: raised if it can't be imported.

    Raises:
        UsageError: no installed package has an entry point of this name.
    """
    kind, known = group.rpartition(".")[2].removesuffix("s"), plugins(group)
    if name not in known:
        raise UsageError(
            f"unknown {kind} {name!r}: {meant(name, known)}installed packages have {', '.join(sorted(known)) or 'none'}"
        )
    try:
        return known[name].load()
    except Exception as cause:
        raise error(f"{kind} {name!r} of {known[name].value} can't be imported ({in_one_line(cause)})") from cause

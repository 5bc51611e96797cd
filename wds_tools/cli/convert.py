"""`wds-tools convert NAME`, for any converter: ours, one a module beside this one, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.convert import ConvertOptions, run_conversion
from wds_tools.errors import WdsToolsError
from wds_tools.plugins import CONVERTERS, load_plugin


def convert_command(options: type[ConvertOptions]) -> tuple[type[Any], Callable[[Any], int]]:
    """`Config` and `run` of a command.

    Args:
        options: of the converter.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Printed, options):  # type: ignore[misc, valid-type]
        __doc__ = options.__doc__

    def run(config: Any) -> int:
        print_dataset(config.output, run_conversion(config), json=config.json)
        return 0

    return Config, run


def plugin_command(name: str) -> Any:
    """What a command's module has, for a converter of an installed package.

    Raises:
        WdsToolsError: it can't be imported, or is not a converter's options.
    """
    options = load_plugin(CONVERTERS, name)
    if not (isinstance(options, type) and issubclass(options, ConvertOptions)):
        raise WdsToolsError(f"converter {name!r}: its entry point is {options!r:.80}, expected a subclass of ConvertOptions")
    config, run = convert_command(options)
    return SimpleNamespace(Config=config, run=run, EXAMPLE=f"wds-tools convert {name} --input INPUT --output OUTPUT")

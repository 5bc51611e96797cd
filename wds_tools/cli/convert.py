"""`wds-tools convert NAME`, for any converter: ours, and those of installed packages.

Those that take images can encode them on the way: the options that say so are here, once for all of them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from functools import cache
from types import SimpleNamespace
from typing import Annotated, Any

from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.convert import ConvertOptions, run_conversion
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import UsageError, WdsToolsError
from wds_tools.jobs.records import Encoder
from wds_tools.plugins import CONVERTERS, Names, load_plugin

_OURS = {
    "pairs": "--input pairs.jsonl --output s3://bucket/pairs-raw --workers 8",
    "documents": "--input dclm/ --output s3://bucket/dclm --workers 8",
    "conversations": "--input llava.json --image-root images/ --output s3://bucket/sft-raw --workers 8",
    "interleaved": "--input mmc4.jsonl --image-root images/ --output s3://bucket/pages-raw --workers 8",
    "coded": "--input liquid-data/ --output s3://bucket/liquid --workers 8",
}
"""Name, by which the module and its options are called, too -> an example."""


@dataclass(frozen=True, kw_only=True)
class Encoding(TokenizerOptions):
    """Codes instead of images in one go."""

    help_group = "encoding"

    encode: Annotated[str | None, Names("wds_tools.vq.registry:tokenizer_names")] = None
    """Image tokenizer: makes the codes in the same step, like `wds-tools encode --tokenizer`."""
    keep_images: bool = False
    """With --encode: keep the source images beside the codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        encoding = {"keep_images", "sft_mode", *(field.name for field in fields(TokenizerOptions))}
        for field in fields(self) if self.encode is None else ():
            if field.name in encoding and getattr(self, field.name) != field.default:
                raise UsageError(f"--{field.name.replace('_', '-')} says how to encode, and has no effect without --encode")


def _encoder(config: Any) -> Encoder | None:
    if getattr(config, "encode", None) is None:
        return None
    from wds_tools.encode.image_encoder import ImageEncoder  # with torch, which converting alone does without

    return ImageEncoder(
        config.encode,
        TokenizerOptions(**{field.name: getattr(config, field.name) for field in fields(TokenizerOptions)}),  # travels to workers
        workers=config.workers,
        cpus=config.remote_cpus,
        keep_images=config.keep_images,
        limits=config.limits,
        modes=config.modes,
    )


@cache
def command(name: str) -> Any:
    """What a command's module has, for a converter; the command can encode if it takes images.

    Raises:
        WdsToolsError: that of an installed package can't be imported, or is not a converter's options.
    """
    if name in _OURS:
        options = getattr(importlib.import_module(f"wds_tools.convert.{name}"), f"{name.capitalize()}Config")
    else:
        options = load_plugin(CONVERTERS, name)
    if not (isinstance(options, type) and issubclass(options, ConvertOptions)):
        raise WdsToolsError(f"converter {name!r}: its entry point is {options!r:.80}, expected a subclass of ConvertOptions")
    bases = (Printed, options, Encoding) if options.image_facts is not None else (Printed, options)

    @dataclass(frozen=True, kw_only=True)
    class Config(*bases):  # type: ignore[misc]
        __doc__ = options.__doc__

        def __post_init__(self) -> None:
            for base in bases[1:]:
                base.__post_init__(self)

    def run(config: Any) -> int:
        print_dataset(config.output, run_conversion(config, _encoder(config)), json=config.json)
        return 0

    example = _OURS.get(name, "--input INPUT --output OUTPUT")
    return SimpleNamespace(Config=Config, run=run, EXAMPLE=f"wds-tools convert {name} {example}")

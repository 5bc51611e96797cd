"""`wds-tools convert pairs`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.convert import run_conversion
from wds_tools.convert.pairs import PairsConfig
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import UsageError

EXAMPLE = "wds-tools convert pairs --input pairs.jsonl --output s3://bucket/pairs-raw --workers 8"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, PairsConfig, TokenizerOptions):
    """Convert image-caption pairs to shards. The images go in byte for byte, and codes come with `wds-tools encode`; or codes
    instead of images in one go, with --encode."""

    encode: str | None = None
    """An image tokenizer: fill the codes straight away, as `wds-tools encode --tokenizer` does."""
    keep_images: bool = False
    """With --encode: keep the source images beside the codes."""

    def __post_init__(self) -> None:
        PairsConfig.__post_init__(self)
        TokenizerOptions.__post_init__(self)
        if self.encode is None:
            for field in (*fields(TokenizerOptions), *(field for field in fields(self) if field.name == "keep_images")):
                if getattr(self, field.name) != field.default:
                    raise UsageError(f"--{field.name.replace('_', '-')} says how to encode, and has no effect without --encode")


def run(config: Config) -> int:
    """Convert, and say what came of it."""
    image_encoder = None
    if config.encode is not None:
        from wds_tools.encode.image_encoder import ImageEncoder  # with torch, which converting alone does without

        image_encoder = ImageEncoder(
            config.encode,
            config,
            workers=config.workers,
            cpus=config.remote_cpus,
            keep_images=config.keep_images,
            limits=config.limits,
        )
    print_dataset(config.output, run_conversion(config, image_encoder), json=config.json)
    return 0

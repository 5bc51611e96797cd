"""`wds-tools encode`."""

from dataclasses import dataclass, fields

from wds_tools.cli import convert
from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.dataset.layout import MANIFEST, PLAN
from wds_tools.encode.encode import EncodeConfig, encode, named_tokenizer
from wds_tools.errors import NotFound, UsageError
from wds_tools.sources.inputs import expand_inputs
from wds_tools.storage import open_store

EXAMPLE = "wds-tools encode --input pairs-raw --output pairs --tokenizer chameleon --weights vqgan/ --device cuda"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, EncodeConfig):
    """Make the codes of a dataset's images with an image tokenizer. The input may also be files of image-caption pairs, as for
    `wds-tools convert pairs --encode`, which has more options."""


def run(config: Config) -> int:
    """Encode, and say what came of it."""
    if _is_to_convert(config.input):
        if config.sft_mode != Config.sft_mode:
            raise UsageError(f"--sft-mode {config.sft_mode}: {config.input} is read as pairs; see convert conversations --encode")
        pairs = convert.command("pairs")
        names = {field.name for field in fields(pairs.Config)} & {field.name for field in fields(config)}
        same = {name: value for name in names - {"input"} if (value := getattr(config, name)) is not None}
        return int(pairs.run(pairs.Config(input=(config.input,), encode=named_tokenizer(config.tokenizer), **same)))
    print_dataset(config.output, encode(config), json=config.json)
    return 0


def _is_to_convert(url: str) -> bool:
    """Whether files are named, and no dataset of ours, be it complete or not."""
    store = open_store(url)
    if store.exists(MANIFEST) or store.exists(PLAN):
        return False
    try:
        return bool(expand_inputs([url], lambda _url, sizes: list(sizes)).files)
    except (NotFound, UsageError):
        return False

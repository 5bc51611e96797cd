"""`wds-tools encode`."""

from dataclasses import dataclass, fields

from wds_tools.cli import convert
from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.convert.inspect import fitting_converter
from wds_tools.dataset.layout import MANIFEST, PLAN
from wds_tools.encode.encode import EncodeConfig, encode, named_tokenizer
from wds_tools.errors import NotFound, UsageError
from wds_tools.sources.inputs import expand_inputs
from wds_tools.storage import open_store

EXAMPLE = "wds-tools encode --input pairs-raw --output pairs --tokenizer chameleon --weights vqgan/ --device cuda"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, EncodeConfig):
    """Make the codes of a dataset's images with an image tokenizer. The input may also be files of pairs, conversations or
    interleaved documents, as for `wds-tools convert ... --encode`, which has more options."""

    input: tuple[str, ...]  # type: ignore[assignment]
    """The dataset to encode, a directory or URL; or files, folders or patterns."""


def run(config: Config) -> int:
    """Encode, and say what came of it."""
    if _are_files(config.input):
        return _convert(config)
    if len(config.input) > 1:
        raise UsageError(f"--input {' '.join(config.input[:3])}: expected one dataset, or files and nothing else")
    settings = {field.name: getattr(config, field.name) for field in fields(EncodeConfig)} | {"input": config.input[0]}
    print_dataset(config.output, encode(EncodeConfig(**settings)), json=config.json)
    return 0


def _convert(config: Config) -> int:
    """By the converter that fits, with the options that are given."""
    kind = fitting_converter(config.input)
    command = convert.command(kind)
    known = {field.name for field in fields(command.Config)}
    if "encode" not in known:
        raise UsageError(f"--input {' '.join(config.input[:3])}: no images to encode: `wds-tools convert {kind}` takes these")
    given = {
        field.name: value
        for field in fields(config)
        if (value := getattr(config, field.name)) != field.default and value is not None
    }
    tokenizer = named_tokenizer(given.pop("tokenizer", None))
    if unknown := sorted(given.keys() - known):
        raise UsageError(
            f"--{unknown[0].replace('_', '-')}: the input is read as by convert {kind} --encode, which has no such option"
        )
    return int(command.run(command.Config(encode=tokenizer, **given)))


def _are_files(urls: tuple[str, ...]) -> bool:
    """Whether files are named, and no dataset of ours, be it complete or not."""
    if any((store := open_store(url)).exists(MANIFEST) or store.exists(PLAN) for url in urls):
        return False
    try:
        return bool(expand_inputs(urls, lambda _url, sizes: list(sizes)).files)
    except (NotFound, UsageError):
        return False

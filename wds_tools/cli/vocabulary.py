"""`wds-tools vocabulary`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from wds_tools.cli.summary import Printed, print_json
from wds_tools.errors import UsageError
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.tokenizer import TextTokenizer
from wds_tools.sequences.vocabulary import add_tokens
from wds_tools.storage.place import check_apart
from wds_tools.terminal import say

EXAMPLE = "wds-tools vocabulary gemma/ --output gemma-images/ --codebook-size 8192"


@dataclass(frozen=True, kw_only=True)
class Config(Printed):
    """Say which special tokens a text tokenizer has and what vocab_size a model needs; add the missing ones."""

    input: tyro.conf.Positional[str]
    """Folder of a Hugging Face tokenizer, or a tokenizer.json."""
    output: str | None = None
    """A new folder, for a copy to which the missing tokens are added."""
    tokens: tuple[str, ...] = (SequenceConfig.boi, SequenceConfig.eoi, SequenceConfig.unconditional)
    """The special tokens to look for."""
    codebook_size: int | None = None
    """Entries of the image codebook, which stand behind the text vocabulary."""
    multiple: int = 128
    """Round the size up to a multiple of this: such matrices are faster on a GPU."""

    def __post_init__(self) -> None:
        if self.multiple < 1 or (self.codebook_size or 1) < 1:
            raise UsageError(f"--multiple {self.multiple}, --codebook-size {self.codebook_size}: at least 1")


def run(config: Config) -> int:
    """Look, add what is missing if asked, and say what there is. Exit status 1 if tokens are missing."""
    tokenizer = TextTokenizer(config.input)
    if config.output is not None:
        check_apart(config.input, config.output)
        tokenizer = add_tokens(config.input, config.output, config.tokens)
    ids = {name: tokenizer.id_of(name) for name in config.tokens}
    if config.json:
        print_json(
            {
                "tokens": ids,
                "bos_token": tokenizer.named("bos_token"),
                "eos_token": tokenizer.named("eos_token"),
                "text_vocabulary": tokenizer.num_tokens,
                "vocab_size": tokenizer.num_tokens + (config.codebook_size or 0),
            }
        )
        return 1 if None in ids.values() else 0
    for role in ("bos_token", "eos_token"):
        name = tokenizer.named(role)
        say(f"{role:<18}{f'{name} {tokenizer.id_of(name)}' if name else 'not named: give bos=, eos= to say which'}")
    for name, number in ids.items():
        say(f"{name:<18}{'missing: --output DIR makes a copy that has it' if number is None else number}")
    say(f"{'text vocabulary':<18}{tokenizer.num_tokens:,}")
    if config.codebook_size is not None:
        size = tokenizer.num_tokens + config.codebook_size
        say(f"{'image codes':<18}{tokenizer.num_tokens:,} ... {size - 1:,}")
        rounded = -(-size // config.multiple) * config.multiple
        say(f"{'vocab_size':<18}{size:,} at least, {rounded:,} as a multiple of {config.multiple}")
    return 1 if None in ids.values() else 0

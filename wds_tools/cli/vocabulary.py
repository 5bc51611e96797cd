"""`wds-tools vocabulary`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, show
from wds_tools.errors import UsageError
from wds_tools.plugins import Names
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.templates import find_template
from wds_tools.sequences.tokenizer import TextTokenizer
from wds_tools.sequences.vocabulary import add_tokens
from wds_tools.storage.place import check_apart

EXAMPLE = "wds-tools vocabulary gemma/ --output gemma-images/ --codebook-size 8192"


@dataclass(frozen=True, kw_only=True)
class Config(Printed):
    """Show which special tokens a text tokenizer has and the vocab_size that a model needs; add missing tokens."""

    input: Positional[str]
    """Folder of a Hugging Face tokenizer, or a tokenizer.json."""
    output: str | None = None
    """New folder for a copy with the missing tokens."""
    template: Annotated[str, Names("wds_tools.sequences.templates:template_names")] = SequenceConfig.template
    """Template whose tokens are used: liquid, chameleon, emu3, or one of a package."""
    tokens: tuple[str, ...] | None = None
    """The special tokens to look for; by default those of the template."""
    codebook_size: int | None = None
    """Entries of the image codebook: they come after the text vocabulary, or are part of it if the template names them."""
    multiple: int = 128
    """Round the size up to a multiple of this: such matrices are faster on a GPU."""

    def __post_init__(self) -> None:
        if self.multiple < 1 or (self.codebook_size or 1) < 1:
            raise UsageError(f"--multiple {self.multiple}, --codebook-size {self.codebook_size}: at least 1")


def run(config: Config) -> int:
    """Look, add what is missing if asked, and say what there is. Exit status 1 if tokens are missing."""
    template = find_template(config.template)
    names = list(template.tokens if config.tokens is None else config.tokens)
    codes = template.code_tokens(config.codebook_size or 0)
    tokenizer = TextTokenizer(config.input)
    if config.output is not None:
        check_apart(config.input, config.output)
        tokenizer = add_tokens(config.input, config.output, names + codes)
    ids = {name: tokenizer.id_of(name) for name in names}
    num_missing = sum(tokenizer.id_of(name) is None for name in codes)
    size = tokenizer.num_tokens + (0 if codes else config.codebook_size or 0)
    named = {role: tokenizer.named(role) for role in ("bos_token", "eos_token")}
    counts = {"text_vocabulary": tokenizer.num_tokens, "vocab_size": size, "missing_codes": num_missing}
    facts = {
        role: f"{name} {tokenizer.id_of(name)}" if name else "not named: give bos=, eos= to say which"
        for role, name in named.items()
    }
    facts |= {
        name: "missing: --output DIR makes a copy that has it" if number is None else f"{number}" for name, number in ids.items()
    }
    facts["text vocabulary"] = f"{tokenizer.num_tokens:,}"
    if config.codebook_size is not None:
        inside = f"{len(codes):,} tokens of the text vocabulary, {num_missing or 'none'} missing"
        facts["image codes"] = inside if codes else f"{tokenizer.num_tokens:,} ... {size - 1:,}"
        rounded = -(-size // config.multiple) * config.multiple
        facts["vocab_size"] = f"{size:,} at least, {rounded:,} as a multiple of {config.multiple}"
    show(config, {"tokens": ids, **named, **counts}, (f"{name:<18}{fact}" for name, fact in facts.items()))
    return 1 if None in ids.values() or num_missing else 0

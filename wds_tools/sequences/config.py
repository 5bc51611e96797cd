"""How samples become token sequences: `SequenceConfig`, a value that is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from wds_tools.errors import UsageError
from wds_tools.plugins import Names

DEFAULT_TEMPLATE = "liquid"


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """How samples become token sequences."""

    help_group = "token rows"

    tokenizer: str
    """Folder of a Hugging Face tokenizer (tokenizer.json and its tokenizer_config.json), or a tokenizer.json, with the tokens
    around images (see `wds-tools vocabulary`)."""
    max_length: int
    """Tokens of a row. An image that does not fit in a row is refused, never cut."""
    template: Annotated[str, Names("wds_tools.sequences.templates:template_names")] = DEFAULT_TEMPLATE
    """Decides the tokens around images, and the ids of codes: liquid, chameleon, emu3, or a template of a package
    (docs/training.md)."""
    t2i_ratio: float = 0.5
    """Share of the image-text pairs that become text to image; the others become captions."""
    unconditional_ratio: float = 0.1
    """Share of the text-to-image examples whose text is replaced by <unconditional>, for classifier-free guidance."""
    image_ratio: float = 0.5
    """Share of the images in interleaved documents that are trained; their texts always are."""
    document_eos: bool = False
    """Put an EOS after the last token of a document, interleaved or not."""
    prompts: str | None = None
    """A JSON file with other wordings (docs/training.md)."""
    codebook_size: int | None = None
    """Entries of the image codebook; by default as the manifests say."""
    bos: str | None = None
    """The token that begins a sequence; by default the one that tokenizer_config.json names; "": none."""
    eos: str | None = None
    """The token that ends a sequence; by default the one that tokenizer_config.json names."""
    boi: str | None = None
    """The token that begins an image; by default the template's, also for the next two."""
    eoi: str | None = None
    """The token that ends it; by default the template's."""
    unconditional: str | None = None
    """The token that stands for a dropped text; by default the template's; "": none."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UsageError(f"max_length={self.max_length}, expected 2 or more tokens")
        for name in ("t2i_ratio", "unconditional_ratio", "image_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} is not in 0 ... 1")
        if self.codebook_size is not None and not 1 <= self.codebook_size < 1 << 31:
            raise UsageError(f"codebook_size={self.codebook_size} is not in 1 ... 2**31 - 1")
        for name in ("eos", "boi", "eoi"):
            if getattr(self, name) == "":
                raise UsageError(f"{name}='': every image, and every example but a document, ends with a token; name one")

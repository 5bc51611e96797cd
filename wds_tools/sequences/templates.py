"""Templates: what stands around an image in a row, in which order its ids stand, and where they are in the vocabulary.

    liquid      <boi> codes <eoi>                                       codes behind the text vocabulary
    chameleon   <racm3:break> codes <eoss>                              IMGIMG...Z of the tokenizer
    emu3        <|image start|> rows*columns <|image token|>            <|visual token NNNNNN|> of the tokenizer
                (row <|extra_200|>) ... <|extra_201|> <|image end|>

A template is a value: names, wordings, and methods that a package's own may replace. Build.py makes rows of it, and
knows none by name. The names and forms are those of the models' published processors (transformers; Emu3's own training code).
Invariant: `liquid` gives the rows that there were before there were templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_tools.errors import UsageError, meant
from wds_tools.plugins import TEMPLATES, load_plugin, plugins
from wds_tools.sequences.config import DEFAULT_TEMPLATE, SequenceConfig
from wds_tools.sequences.prompts import Prompts, read_prompts

_OUR_PROMPTS = Prompts()
_NAMES = ("bos", "eos", "boi", "eoi", "unconditional")


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a model reads and writes images; with its defaults, `liquid`. Names are those of special tokens of the tokenizer."""

    name: str = DEFAULT_TEMPLATE
    """As a config says it."""
    bos: str | None = None
    """Begins a sequence; None: the one that the tokenizer's configuration names; "": none."""
    eos: str | None = None
    """Ends it; None: the one that the tokenizer's configuration names."""
    boi: str = "<boi>"
    """Begins an image."""
    eoi: str = "<eoi>"
    """Ends it."""
    unconditional: str = "<unconditional>"
    """Stands for a dropped text; "": nothing does."""
    row_end: str = ""
    """Behind each row of codes; "": nothing."""
    others: tuple[str, ...] = ()
    """Further special tokens that `before_codes` and `behind_codes` name."""
    states_shape: bool = False
    """`before_codes` says the shape of the grid, so that a prompt needs it."""
    prompts: Prompts = _OUR_PROMPTS
    """The wordings, where no file has others."""
    version: int = 1
    """Higher when the same samples give other ids: then runs that were saved before are refused."""

    @property
    def spec(self) -> dict[str, Any]:
        """What states and manifests say of it; nothing of `liquid`, so that those from before there were others stay good."""
        return {} if self.name == DEFAULT_TEMPLATE else {"template": self.name, "template_version": self.version}

    @property
    def tokens(self) -> list[str]:
        """The special tokens that images need."""
        return [name for name in dict.fromkeys((self.boi, self.eoi, self.unconditional, self.row_end, *self.others)) if name]

    def code_token(self, code: int) -> str:  # noqa: ARG002  none has a name here
        """The name of the token of an image code; "": codes are the ids behind the text vocabulary, in their order."""
        return ""

    def code_tokens(self, codebook_size: int) -> list[str]:
        """The names of all codes, in order; empty where they are behind the text vocabulary."""
        return [*map(self.code_token, range(codebook_size))] if self.code_token(0) else []

    def before_codes(self, shape: Sequence[int] | None) -> str:  # noqa: ARG002  it is not said here
        """What stands before the codes of an image: words, and special tokens by name. A prompt ends with it.

        Args:
            shape: of the array of codes: rows, columns; None in a prompt whose caller does not know it, unless `states_shape`.
        """
        return self.boi

    def behind_codes(self) -> str:
        """What stands behind them."""
        return self.eoi

    def to_ids(self, codes: NDArray[Any]) -> NDArray[Any]:
        """A number from 0 to below the codebook's size, of several codebooks to below their sum, for each token of an image.

        Here the codes themselves, which have one order in the layouts hw and n. For other arrays a template has its own.

        Args:
            codes: of one image, as they are stored, in the layout of their column: see wds_tools.format.codes.CodeGrid.

        Returns:
            Whole numbers, in a shape that is a function of that of the codes; `in_order` gets their ids in it.
        """
        return codes

    def in_order(self, ids: NDArray[np.int32], row_end: NDArray[np.int32]) -> NDArray[np.int32]:
        """The ids between `before_codes` and `behind_codes`, (T,); T is a function of the shape.

        Args:
            ids: of the codes of one image, in the shape of their array.
            row_end: the id of that token, (1,), or none, (0,).
        """
        if len(row_end):
            ids = np.concatenate([ids, np.broadcast_to(row_end, (*ids.shape[:-1], 1))], axis=-1)
        return ids.reshape(-1)


_END_OF_TURN = "<reserved08706>"
_CHAMELEON_PROMPTS = Prompts(
    draw=(_END_OF_TURN,),
    describe=tuple(text.removesuffix("\n") + _END_OF_TURN for text in Prompts.describe),
    system=("", _END_OF_TURN),
    human=("", _END_OF_TURN),
    gpt=("", ""),
)
_EMU3_PROMPTS = Prompts(draw=("",), size="", system=("", " "), human=("USER: ", " "), gpt=("ASSISTANT:", ""))
_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


@dataclass(frozen=True, kw_only=True)
class Chameleon(Template):
    """Chameleon and what was made of it (Anole): a turn ends with <reserved08706>."""

    boi: str = "<racm3:break>"
    eoi: str = "<eoss>"
    unconditional: str = ""
    others: tuple[str, ...] = (_END_OF_TURN,)
    prompts: Prompts = _CHAMELEON_PROMPTS

    def code_token(self, code: int) -> str:
        """IMGIMG, a letter for each digit (A is 0), Z."""
        return f"IMGIMG{str(code).translate(_LETTERS)}Z"


@dataclass(frozen=True, kw_only=True)
class Emu3(Template):
    """Emu3: an image states its rows and columns, each row of codes has an end, and so has the frame."""

    boi: str = "<|image start|>"
    eoi: str = "<|image end|>"
    unconditional: str = ""
    row_end: str = "<|extra_200|>"
    others: tuple[str, ...] = ("<|image token|>", "<|extra_201|>")
    states_shape: bool = True
    prompts: Prompts = _EMU3_PROMPTS

    def code_token(self, code: int) -> str:
        """Six digits."""
        return f"<|visual token {code:06d}|>"

    def before_codes(self, shape: Sequence[int] | None) -> str:
        """The size in codes, as words."""
        height, width = shape or (0, 0)
        return f"{self.boi}{height}*{width}{self.others[0]}"

    def behind_codes(self) -> str:
        """The end of the frame, and of the image."""
        return self.others[1] + self.eoi


BUILT_IN = {DEFAULT_TEMPLATE: Template, "chameleon": Chameleon, "emu3": Emu3}


def template_names() -> list[str]:
    """What `find_template` knows: ours, and those of installed packages."""
    return list(dict.fromkeys([*BUILT_IN, *sorted(plugins(TEMPLATES))]))


def find_template(name: str) -> Template:
    """The template of a name.

    Raises:
        UsageError: there is none of this name, or what a package gives is none.
    """
    if name not in (known := template_names()):
        raise UsageError(f"unknown template {name!r}: {meant(name, known)}there are {', '.join(known)}")
    made = BUILT_IN[name]() if name in BUILT_IN else load_plugin(TEMPLATES, name, UsageError)()
    if not isinstance(made, Template):
        raise UsageError(f"template {name!r} gives {type(made).__name__}, expected a wds_tools.sequences.templates.Template")
    return replace(made, name=name)


def configured(config: SequenceConfig) -> Template:
    """The template of a config, with the names and wordings that it gives in the place of the template's own.

    Raises:
        UsageError: as find_template, or the prompts can't be read.
    """
    template = find_template(config.template)
    given = {name: value for name in _NAMES if (value := getattr(config, name)) is not None}
    return replace(template, prompts=read_prompts(config.prompts, template.prompts), **given)

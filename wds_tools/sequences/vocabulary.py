"""The ids of a model that reads and writes text and image codes: special tokens by name, codes where the template says.

0 ... num_tokens - 1                      the text tokenizer's, special tokens among them, and the codes that it has names for
num_tokens ... num_tokens + codebook - 1  image codes, where it has none
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from wds_tools.errors import StorageError, UsageError
from wds_tools.format.codes import Codes
from wds_tools.format.schema import IMAGE_MARK
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.prompts import Prompts
from wds_tools.sequences.templates import Template, configured
from wds_tools.sequences.tokenizer import CONFIG, FILE, NO_IDS, Ids, Part, TextTokenizer, joined, load_backend, read_settings

ROLES = frozenset(("system", "human", "gpt"))
"""Who speaks in a conversation; see Prompts."""
MOST_IDS = 1 << 31
"""Ids that an int32 tells apart."""
_MOST_LISTED = 8
"""Missing tokens that a message names."""

Size = tuple[int, int]
"""(width, height) in pixels."""
Shape = tuple[int, ...]
"""Of an array of codes."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids, and how many there are."""

    text_size: int
    """Ids of the text tokenizer: the code c of an image is the id text_size + c, unless there are `code_ids`."""
    codebook_size: int
    """Image codes; 0: none are expected."""
    bos: int | None
    eos: int
    boi: int | None
    """None where no image is expected and the tokenizer has none; so the next two."""
    eoi: int | None
    unconditional: int | None
    template: Template = field(repr=False)
    """The tokens' names and the wordings, among others."""
    tokenizer: TextTokenizer = field(repr=False, compare=False)
    code_ids: Ids | None = field(default=None, repr=False, compare=False)
    """(codebook_size,) of a template whose codes are tokens of the tokenizer: the id of each."""

    @property
    def prompts(self) -> Prompts:
        """The wordings."""
        return self.template.prompts

    @property
    def size(self) -> int:
        """Ids in all: the least vocab_size of a model."""
        return self.text_size + (self.codebook_size if self.code_ids is None else 0)

    @property
    def rows_spec(self) -> dict[str, Any]:
        """What a manifest of rows says of it. `code_ids`: where the ids of codes are not those from text_size on, runs of them
        in the order of the codes: the first id, and how many follow one another."""
        spec = {"vocabulary_size": self.size, "text_size": self.text_size, **self.template.spec}
        if self.code_ids is None:
            return spec
        starts = np.flatnonzero(np.diff(self.code_ids, prepend=-2) != 1)
        lengths = np.diff(starts, append=len(self.code_ids))
        return spec | {"code_ids": np.stack([self.code_ids[starts], lengths], 1).tolist()}

    def padded(self, multiple: int) -> int:
        """The size, rounded up to a multiple: matrices of such sizes are faster on a GPU."""
        return -(-self.size // multiple) * multiple

    def before_image(self, text: str, size: Size | None, wording: int, shape: Shape | None) -> list[Part]:
        """What stands before the codes of a text-to-image example; see `prompt_ids`."""
        stated = self.prompts.size.format(width=size[0], height=size[1]) if size else ""
        draw = self.prompts.draw[wording % len(self.prompts.draw)] if text else self.template.unconditional
        ours = self.tokenizer.wording(stated + draw + self.template.before_codes(shape))
        return [Part(ids_of(self.bos)), Part(words=text, is_own=True), *ours]

    def codes(self, ids: Ids, *, trained: bool) -> list[Part]:
        """The ids of an image's codes, and what stands behind them."""
        behind = self.tokenizer.wording(self.template.behind_codes())
        return [Part(ids, trained), *(part._replace(trained=trained) for part in behind)]

    def image(self, codes: Codes, *, trained: bool = False) -> list[Part]:
        """A whole image, all trained or none, with what stands around its codes."""
        before = self.tokenizer.wording(self.template.before_codes(codes.shape))
        ids = self.ids_of_codes(codes)
        return [*(part._replace(trained=trained) for part in before), *self.codes(ids, trained=trained)]

    def turns(self, turns: Sequence[Mapping[str, str]], images: Iterator[Codes]) -> Iterator[Part]:
        """The turns of a conversation. Answers are trained, with the images in them; images without any mark come first."""
        are_marked = any(IMAGE_MARK in turn["value"] for turn in turns)
        for turn in turns:
            before, behind = map(self.tokenizer.wording, getattr(self.prompts, turn["from"]))
            is_answer = turn["from"] == "gpt"
            yield from before
            if not are_marked and turn["from"] == "human":
                yield from chain.from_iterable(map(self.image, images))
            yield from marked(turn["value"], (self.image(codes, trained=is_answer) for codes in images), trained=is_answer)
            yield from behind
            if is_answer:
                yield Part(ids_of(self.eos), True)

    def ids_of_codes(self, codes: Codes) -> Ids:
        """The ids between what stands before and behind an image's codes, in order."""
        codes = self.template.to_ids(codes)
        if self.code_ids is None:
            ids = codes.astype(np.int32)
            ids += self.text_size
        else:
            ids = self.code_ids[codes]
        row_end = self.template.row_end
        ordered = self.template.in_order(ids, ids_of(self.tokenizer.id_of(row_end) if row_end else None))
        return np.asarray(ordered, np.int32).reshape(-1)  # a package's may be of another type

    def prompt_ids(
        self,
        text: str | Sequence[Mapping[str, str]],
        *,
        images: Sequence[Codes] = (),
        size: Size | None = None,
        wording: int = 0,
        shape: Shape | None = None,
    ) -> list[int]:
        """What to generate an image from: exactly the ids that stand before its codes in a row, liquid's `<boi>` the last.

        Args:
            text: what to draw; "": without a text, for classifier-free guidance. Or the turns of a conversation, the last what
                "gpt" has said up to the image: "Here it is: ", or "".
            images: the codes of each image in the turns.
            size: (width, height) in pixels, for models trained on images of many shapes (image_text_multi); else None.
            wording: which of the draw prompts, modulo their number; rows have one as often as another.
            shape: (rows, columns) of codes, for templates that state them (emu3).

        Raises:
            UsageError: the template states the shape, and it is not given; the turns don't end with one of gpt, or don't have a
                mark for each image.
            TokenizerError: the text is no Unicode.
        """
        if shape is None and self.template.states_shape:
            raise UsageError("the prompts of this template state how many codes an image has: give shape=(rows, columns)")
        if isinstance(text, str):
            parts = self.before_image(text, size, wording, shape)
        else:
            parts = self._before_answered(text, images, shape)
        (runs,) = self.tokenizer.encode_runs([joined(parts)])
        return [number for run in runs for number in run.tolist()]

    def _before_answered(self, turns: Sequence[Mapping[str, str]], images: Sequence[Codes], shape: Shape | None) -> list[Part]:
        roles = [turn["from"] for turn in turns]
        num_marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
        if roles[-1:] != ["gpt"] or not ROLES.issuperset(roles) or num_marks != len(images):
            raise UsageError(
                f"turns from {', '.join(map(str, roles)) or 'nobody'}, {num_marks} {IMAGE_MARK}, {len(images)} images: expected "
                "those of system, human and gpt, the last what gpt has said before the image to come, and a mark for each image"
            )
        grids = iter(images)
        answer = marked(turns[-1]["value"], (self.image(codes, trained=True) for codes in grids), trained=True)
        before = self.tokenizer.wording(self.template.before_codes(shape))
        parts = [Part(ids_of(self.bos)), *self.turns(turns[:-1], grids), *self.tokenizer.wording(self.prompts.gpt[0]), *answer]
        return [*parts, *(part._replace(trained=True) for part in before)]


def find_vocabulary(tokenizer: TextTokenizer, config: SequenceConfig, codebook_size: int) -> Vocabulary:
    """Look the special tokens up.

    Args:
        tokenizer: of the config.
        config: the names.
        codebook_size: 0: there are no images, and the tokens around them need not exist.

    Raises:
        UsageError: tokens are missing (lists all of them), the prompts can't be read, or there are more ids than an int32 holds.
    """
    template = configured(config)
    bos, eos = template.bos, template.eos
    bos, eos = tokenizer.named("bos_token") if bos is None else bos, tokenizer.named("eos_token") if eos is None else eos
    unnamed = [role for role, name in (("bos", bos), ("eos", eos)) if name is None]
    codes = template.code_tokens(codebook_size)
    image = [*template.tokens, *codes]
    wanted = [name for name in (bos, eos, *(image if codebook_size else [])) if name]
    missing = [name for name in wanted if tokenizer.id_of(name) is None]
    if unnamed or missing:
        says = [f"it has no {name}" for name in missing[:_MOST_LISTED]]
        says += [f"nor {len(missing) - _MOST_LISTED:,} others"] if len(missing) > _MOST_LISTED else []
        if set(missing) & set(image):
            options = f" --template {config.template}" if template.spec else ""
            options += f" --codebook-size {codebook_size}" if codes else ""
            says += [f"`wds-tools vocabulary {tokenizer.path}{options} --output DIR` adds what images need"]
        says += [f"its tokenizer_config.json names no {role}_token: give {role}='...'" for role in unnamed]
        says += ["bos='' for none"] if "bos" in unnamed else []
        raise UsageError(f"tokenizer {tokenizer.path}: {'; '.join(says)}")
    if (ids := tokenizer.num_tokens + (0 if codes else codebook_size)) > MOST_IDS:
        raise UsageError(
            f"{tokenizer.num_tokens:,} text tokens and {codebook_size:,} codes are {ids:,} ids: at most {MOST_IDS:,} fit an int32"
        )
    tokenizer.reserve([name for name in (bos, eos, *template.tokens, *codes) if name])
    return Vocabulary(
        text_size=tokenizer.num_tokens,
        codebook_size=codebook_size,
        bos=tokenizer.id_of(bos) if bos else None,
        eos=_known(tokenizer, eos),
        boi=tokenizer.id_of(template.boi),
        eoi=tokenizer.id_of(template.eoi),
        unconditional=tokenizer.id_of(template.unconditional),
        template=template,
        tokenizer=tokenizer,
        code_ids=np.array([tokenizer.id_of(name) for name in codes], np.int32) if codes else None,
    )


def add_tokens(path: str, output: str, names: Sequence[str]) -> TextTokenizer:
    """Copy a tokenizer's folder, with these special tokens added where they are missing.

    Args:
        path: the folder, or a tokenizer.json.
        output: a new folder.
        names: of the tokens.

    Returns:
        The tokenizer in the new folder.

    Raises:
        UsageError: the output exists, or there is no tokenizer at the path.
        StorageError: the new folder can't be written.
    """
    source, target = Path(path), Path(output)
    if target.exists():
        raise UsageError(f"--output {output} exists already: choose a new folder")
    tokenizer = load_backend(source)
    tokenizer.add_special_tokens(list(names))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temp:
            folder = Path(temp) / "tokenizer"
            folder.mkdir()
            for file in source.iterdir() if source.is_dir() else ():
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
            tokenizer.save(str(folder / FILE))
            settings = read_settings(folder / CONFIG)
            if isinstance(listed := settings.get("added_tokens_decoder"), dict):  # where transformers' Gemma looks for them
                flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
                listed |= {str(tokenizer.token_to_id(name)): {"content": name, **flags} for name in names}
                (folder / CONFIG).write_bytes(orjson.dumps(settings, option=orjson.OPT_INDENT_2))
            folder.rename(target)
    except OSError as error:
        raise StorageError(f"--output {output}: can't write the tokenizer there: {error}") from error
    return TextTokenizer(output)


def marked(text: str, images: Iterator[Sequence[Part]], *, trained: bool) -> Iterator[Part]:
    """A sample's text, with the next image at each mark."""
    first, *others = text.split(IMAGE_MARK)
    yield Part(words=first, is_own=True, trained=trained)
    for words in others:
        yield from next(images)
        yield Part(words=words, is_own=True, trained=trained)


def ids_of(token: int | None) -> Ids:
    """One id, or none."""
    return NO_IDS if token is None else np.array([token], np.int32)


def _known(tokenizer: TextTokenizer, name: str | None) -> int:
    found = tokenizer.id_of(name or "")
    assert found is not None
    return found

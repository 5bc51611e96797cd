"""The ids of a model that reads and writes text and image codes: special tokens by name, codes behind the text vocabulary.

0 ... num_tokens - 1                      the text tokenizer's, special tokens among them
num_tokens ... num_tokens + codebook - 1  image codes
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from wds_tools.errors import StorageError, UsageError
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.prompts import Prompts, read_prompts
from wds_tools.sequences.tokenizer import CONFIG, FILE, NO_IDS, Ids, Part, TextTokenizer, joined, load_backend, read_settings

MOST_IDS = 1 << 31
"""Ids that an int32 tells apart."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids, and how many there are."""

    text_size: int
    """Ids of the text tokenizer: the code c of an image is the id text_size + c."""
    codebook_size: int
    """Image codes; 0: none are expected."""
    bos: int | None
    eos: int
    boi: int | None
    """None where no image is expected and the tokenizer has none; so the next two."""
    eoi: int | None
    unconditional: int | None
    names: SequenceConfig = field(repr=False)
    """The tokens' names, among others."""
    tokenizer: TextTokenizer = field(repr=False, compare=False)
    prompts: Prompts = field(repr=False)

    @property
    def size(self) -> int:
        """Ids in all: the least vocab_size of a model."""
        return self.text_size + self.codebook_size

    def padded(self, multiple: int) -> int:
        """The size, rounded up to a multiple: matrices of such sizes are faster on a GPU."""
        return -(-self.size // multiple) * multiple

    def before_image(self, text: str, size: tuple[int, int] | None, wording: int) -> list[Part]:
        """What stands before the codes of a text-to-image example; see `prompt_ids`."""
        stated = self.prompts.size.format(width=size[0], height=size[1]) if size else ""
        draw = self.prompts.draw[wording % len(self.prompts.draw)] if text else self.names.unconditional
        ours = self.tokenizer.wording(stated + draw + self.names.boi)
        return [Part(ids_of(self.bos)), Part(words=text, is_own=True), *ours]

    def prompt_ids(self, text: str, *, size: tuple[int, int] | None = None, wording: int = 0) -> list[int]:
        """What to generate an image from: exactly the ids that stand before its codes in a row, `<boi>` the last.

        Args:
            text: what to draw; "": without a text, for classifier-free guidance.
            size: (width, height) in pixels, for models trained on images of many shapes (image_text_multi); else None.
            wording: which of the draw prompts, modulo their number; rows have one as often as another.

        Raises:
            TokenizerError: the text is no Unicode.
        """
        (runs,) = self.tokenizer.encode_runs([joined(self.before_image(text, size, wording))])
        return [number for run in runs for number in run.tolist()]


def find_vocabulary(tokenizer: TextTokenizer, config: SequenceConfig, codebook_size: int) -> Vocabulary:
    """Look the special tokens up.

    Args:
        tokenizer: of the config.
        config: the names.
        codebook_size: 0: there are no images, and the tokens around them need not exist.

    Raises:
        UsageError: tokens are missing (lists all of them), the prompts can't be read, or there are more ids than an int32 holds.
    """
    bos, eos = (getattr(config, role) for role in ("bos", "eos"))
    bos, eos = tokenizer.named("bos_token") if bos is None else bos, tokenizer.named("eos_token") if eos is None else eos
    unnamed = [role for role, name in (("bos", bos), ("eos", eos)) if name is None]
    image = [config.boi, config.eoi, config.unconditional]
    wanted = [name for name in (bos, eos, *(image if codebook_size else [])) if name]
    missing = [name for name in wanted if tokenizer.id_of(name) is None]
    if unnamed or missing:
        says = [f"it has no {name}" for name in missing]
        says += (
            [f"`wds-tools vocabulary {tokenizer.path} --output DIR` adds what images need"] if set(missing) & set(image) else []
        )
        says += [f"its tokenizer_config.json names no {role}_token: give {role}='...'" for role in unnamed]
        says += ["bos='' for none"] if "bos" in unnamed else []
        raise UsageError(f"tokenizer {tokenizer.path}: {'; '.join(says)}")
    if (ids := tokenizer.num_tokens + codebook_size) > MOST_IDS:
        raise UsageError(
            f"{tokenizer.num_tokens:,} text tokens and {codebook_size:,} codes are {ids:,} ids: at most {MOST_IDS:,} fit an int32"
        )
    tokenizer.reserve([name for name in (bos, eos, *image) if name])
    return Vocabulary(
        text_size=tokenizer.num_tokens,
        codebook_size=codebook_size,
        bos=tokenizer.id_of(bos) if bos else None,
        eos=_known(tokenizer, eos),
        boi=tokenizer.id_of(config.boi),
        eoi=tokenizer.id_of(config.eoi),
        unconditional=tokenizer.id_of(config.unconditional),
        names=config,
        tokenizer=tokenizer,
        prompts=read_prompts(config.prompts),
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


def ids_of(token: int | None) -> Ids:
    """One id, or none."""
    return NO_IDS if token is None else np.array([token], np.int32)


def _known(tokenizer: TextTokenizer, name: str | None) -> int:
    found = tokenizer.id_of(name or "")
    assert found is not None
    return found

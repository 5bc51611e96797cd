"""A Hugging Face text tokenizer as this project uses it: many texts a call, on one thread, special tokens never from a text.

    wordings, texts -> Parts -> joined: neighbours that are text are one string -> one call each

Processes are what runs side by side here, so the library's own threads are switched off unless TOKENIZERS_PARALLELISM is set.
Cost: Gemma's 262,145 tokens take seconds and 0.4 GB to load; 32,000 take a tenth of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from wds_tools.errors import MissingPackage, TokenizerError, UsageError
from wds_tools.format.typed_json import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_NAMES = (CONFIG, "special_tokens_map.json")

Ids = NDArray[np.int32]
NO_IDS: Ids = np.zeros(0, np.int32)


class Part(NamedTuple):
    """A run of an example, all trained or none: ids, or words that are not yet ids."""

    ids: Ids = NO_IDS
    trained: bool = False
    words: str = ""
    is_own: bool = False
    """Some of the words are the sample's, not a wording of ours."""


def joined(parts: Iterable[Part]) -> list[Part]:
    """The parts without empty ones, and neighbours that are words, all trained or none, as one: a string for one call."""
    runs: list[Part] = []
    for part in parts:
        if not part.words:
            if len(part.ids):
                runs.append(part)
        elif runs and (last := runs[-1]).words and last.trained == part.trained:
            runs[-1] = Part(NO_IDS, part.trained, last.words + part.words, last.is_own or part.is_own)
        else:
            runs.append(part)
    return runs


class TextTokenizer:
    """Text -> ids.

    Args:
        path: a folder, or a tokenizer.json.

    Raises:
        UsageError: there is no tokenizer.
        TokenizerError: it can't be read.
    """

    def __init__(self, path: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.path = path
        self.backend = load_backend(Path(path))
        self.backend.no_padding()
        self.backend.no_truncation()
        self._names = _special_names(Path(path))
        self.num_tokens = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id: where image codes begin."""
        self._special: dict[int, str] = {}
        self._words_alone = lru_cache(8192)(lambda words: self.encode([words])[0])
        self.wording = lru_cache(8192)(self._wording)
        """A wording of ours as parts: texts, and the ids of the special tokens that it names between them."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts; the name of a special token in a text is text.

        Raises:
            TokenizerError: a text is no Unicode (a lone surrogate).
        """
        self.backend.encode_special_tokens = True
        return self._encode(texts)

    def encode_runs(self, rows: Sequence[Sequence[Part]]) -> list[list[Ids]]:
        """The ids of each run (see `joined`) of each row: one call for all that are not our wordings alone. Raises as encode."""
        encoded = iter(self.encode([run.words for runs in rows for run in runs if run.is_own]))
        return [
            [next(encoded) if run.is_own else self._words_alone(run.words) if run.words else run.ids for run in runs]
            for runs in rows
        ]

    def ends(self, texts: Sequence[str]) -> list[list[int]]:
        """How many characters of each text its first token covers, its first two, ...; see encode."""
        self.backend.encode_special_tokens = True
        return [[end for _, end in one.offsets] for one in self.backend.encode_batch(texts, add_special_tokens=False)]

    def _wording(self, text: str) -> tuple[Part, ...]:
        self.backend.encode_special_tokens = False
        encoded = self.backend.encode(text, add_special_tokens=False)
        parts, at = [], 0
        for number, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if number in self._special and self._special[number] in text[begin:end]:
                parts += [Part(words=text[at:begin]), Part(np.array([number], np.int32))]
                at = end
        return (*parts, Part(words=text[at:]))

    def id_of(self, token: str) -> int | None:
        """The id of a token, if there is one of this name."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def reserve(self, names: Sequence[str]) -> None:
        """Hold these tokens for special where they were added as plain ones or are entries of the vocabulary alone, which a text
        could name and a wording could not. Those that do not exist are passed over. Before any wording."""
        added = self.backend.get_added_tokens_decoder()
        self._special = {number: one.content for number, one in added.items() if one.special}
        wanted = {number: name for name in names if (number := self.id_of(name)) is not None and number not in self._special}
        self.backend.add_special_tokens([*wanted.values()])
        self._special |= wanted

    def named(self, role: str) -> str | None:
        """The token that the tokenizer's configuration gives a role, such as "bos_token"."""
        return self._names.get(role)

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        try:
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"{self.path} can't encode a text: {error}") from error
        return [np.array(one.ids, np.int32) for one in encoded]


@lru_cache(4)
def tokenizer_hash(path: str) -> str:
    """XXH3-128 of all that a tokenizer is, in 32 hex digits. Raises as TextTokenizer."""
    return xxh3_128_hexdigest(load_backend(Path(path)).to_str().encode())


def load_backend(path: Path) -> Tokenizer:
    """The library's tokenizer in a folder or file. Raises as TextTokenizer, and MissingPackage."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackage("text is tokenized by the package tokenizers: pip install 'wds-tools[train]'") from error
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        if not path.is_dir():
            raise UsageError(f"tokenizer {path}: no such folder or file; to get one: `hf download NAME --local-dir DIR`")
        return _converted(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # that is what the library raises
        raise TokenizerError(f"{file} is no tokenizer of the tokenizers library: {error}") from error


def _converted(path: Path) -> Tokenizer:
    """From the files of older tokenizers, by transformers."""
    from tokenizers import Tokenizer

    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingPackage(f"{path} has no {FILE}; to convert what it has: pip install 'wds-tools[train]'") from error
    try:
        backend = getattr(AutoTokenizer.from_pretrained(str(path), local_files_only=True), "backend_tokenizer", None)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise UsageError(f"{path} has no {FILE}, and transformers can't read a tokenizer there: {error}") from error
    if not isinstance(backend, Tokenizer):
        raise UsageError(f"{path}: a tokenizer without a {FILE} that transformers can't turn into one")
    return backend


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object of a file beside a tokenizer; empty if there is none. Raises TokenizerError if it can't be read."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TokenizerError(f"{file} can't be read: {error}") from error
    return read_json(dict[str, Any], data, f"{file} can't be read", TokenizerError)


def _special_names(path: Path) -> dict[str, str]:
    """Role -> token, as the files beside the tokenizer say."""
    folder = path if path.is_dir() else path.parent
    names: dict[str, str] = {}
    for file in reversed(_NAMES):
        record = read_settings(folder / file)
        for role in ("bos_token", "eos_token"):
            token = record.get(role)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                names[role] = content
    return names

"""A Hugging Face text tokenizer as this project uses it: many texts a call, on one thread, special tokens never from a text.

Processes are what runs side by side here, so the library's own threads are switched off unless TOKENIZERS_PARALLELISM is set.
Cost: Gemma's 262,145 tokens take seconds and 0.4 GB to load; 32,000 take a tenth of one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wds_tools.errors import MissingPackage, TokenizerError, UsageError
from wds_tools.format.typed_json import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_NAMES = (CONFIG, "special_tokens_map.json")

Ids = NDArray[np.int32]


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

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts; the name of a special token in a text is text.

        Raises:
            TokenizerError: a text is no Unicode (a lone surrogate).
        """
        self.backend.encode_special_tokens = True
        return self._encode(texts)

    def encode_template(self, text: str) -> Ids:
        """The ids of a wording of ours; special tokens in it count as such."""
        self.backend.encode_special_tokens = False
        return self._encode([text])[0]

    def id_of(self, token: str) -> int | None:
        """The id of a token, if there is one of this name."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def reserve(self, names: Sequence[str]) -> None:
        """Hold these tokens for special wherever they were added as plain ones, which a text could name."""
        added = self.backend.get_added_tokens_decoder().values()
        self.backend.add_special_tokens([token.content for token in added if token.content in names and not token.special])

    def named(self, role: str) -> str | None:
        """The token that the tokenizer's configuration gives a role, such as "bos_token"."""
        return self._names.get(role)

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        try:
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"{self.path} can't encode a text: {error}") from error
        return [np.array(one.ids, np.int32) for one in encoded]


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


def _special_names(path: Path) -> dict[str, str]:
    """Role -> token, as the files beside the tokenizer say."""
    folder = path if path.is_dir() else path.parent
    names: dict[str, str] = {}
    for file in reversed(_NAMES):
        try:
            data = (folder / file).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TokenizerError(f"{folder / file} can't be read: {error}") from error
        record = read_json(dict[str, Any], data, f"{folder / file} can't be read", TokenizerError)
        for role in ("bos_token", "eos_token"):
            token = record.get(role)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                names[role] = content
    return names

"""How many tokens the texts of a dataset are, for mixtures whose weights are shares of tokens (`index --tokens`).

A file for each tokenizer beside the manifest. What it says is of one content: of a dataset that has grown, it is no longer taken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import orjson

from wds_tools.dataset.layout import TOKENS
from wds_tools.errors import NotFound
from wds_tools.format.manifest import Manifest
from wds_tools.format.typed_json import Count, read_json
from wds_tools.storage import Store


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """What was counted."""

    fingerprint: str
    """Of the manifest."""
    text_tokens: Count
    """Tokens of all texts and turns, without special ones."""


def read_token_count(store: Store, manifest: Manifest, tokenizer_hash: str) -> TokenCount | None:
    """What was counted of this very content, if anything. Raises FormatError: the file is damaged."""
    name = f"{TOKENS}{tokenizer_hash}.json"
    try:
        found = read_json(TokenCount, store.read(name), f"{store.url}/{name}")
    except NotFound:
        return None
    return found if found.fingerprint == manifest.fingerprint() else None


def write_token_count(store: Store, count: TokenCount, tokenizer_hash: str) -> None:
    """Keep it beside the manifest. Raises StorageError."""
    store.put(f"{TOKENS}{tokenizer_hash}.json", orjson.dumps(asdict(count)))

"""Weights that are shares of tokens: what a source's samples have of them on average, as `wds-tools index --tokens` counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loaders.config import LoaderConfig
from wds_tools.dataset.token_counts import read_token_count
from wds_tools.errors import UsageError
from wds_tools.sequences.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from loaders.order.samples import OpenSource


def count_tokens(opened: OpenSource, tokenizer: str) -> tuple[int, int]:
    """Tokens of a source: (of all texts by this tokenizer, of all images).

    Raises:
        UsageError: they have not been counted, or not of this content.
    """
    count = read_token_count(opened.store, opened.manifest, tokenizer_hash(tokenizer))
    if count is None:
        raise UsageError(
            f"the tokens of {opened.store.url} have not been counted by this tokenizer, or it has changed since: "
            f"wds-tools index {opened.source.url} --tokens {tokenizer}"
        )
    return count.text_tokens, opened.manifest.num_codes


def mean_tokens_of(opened: OpenSource, config: LoaderConfig) -> float:
    """Tokens of a source's samples on average, which a weight is divided by; 1 where weights are shares of samples."""
    if config.sequences is None or config.unit == "samples":
        return 1.0
    if not (num_tokens := sum(count_tokens(opened, config.sequences.tokenizer))):
        raise UsageError(f"{opened.store.url} has no tokens at all, so it can't have a share of them: leave it out")
    return num_tokens / opened.manifest.samples

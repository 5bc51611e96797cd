"""The tokens of a dataset's texts, counted once: `wds-tools index DATASET --tokens TOKENIZER`.

    shards -> texts and turns, 256 samples at a time -> their ids -> how many -> tokens/HASH.json (`dataset.token_counts`)

Cost: one read of every shard, and the tokenizer's.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from wds_tools.dataset.lease import Lease
from wds_tools.dataset.reader import read_shard
from wds_tools.dataset.token_counts import TokenCount, write_token_count
from wds_tools.errors import UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS
from wds_tools.format.shards import ShardInfo
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Advance, Progress
from wds_tools.sequences.tokenizer import TextTokenizer, tokenizer_hash
from wds_tools.storage import Store

_AT_ONCE = 256


def count_tokens(store: Store, manifest: Manifest, tokenizer: str, *, workers: int = 1, quiet: bool = True) -> TokenCount:
    """Count the tokens of all texts and turns, and keep the number beside the manifest. Special tokens are not among them.

    Args:
        store, manifest: the dataset.
        tokenizer: folder of a Hugging Face tokenizer, or a tokenizer.json.
        workers: processes to use.
        quiet: show no progress.

    Raises:
        UsageError: there is no tokenizer, the dataset is not of our schema, or another run is writing there.
        FormatError, StorageError: a shard is damaged, or the dataset can't be read or written.
    """
    if manifest.schema_version == ANY_MEMBERS or manifest.source.get("rows"):
        raise UsageError(f"{store.url} has no texts to count: token rows, or tars of any members")
    key = tokenizer_hash(tokenizer)
    with Lease(store) as lease, Progress("tokens", manifest.samples, quiet=quiet) as progress:
        with closing(run_tasks(_Counter(store, tokenizer), manifest.shards, workers=workers, on_report=progress)) as counts:
            text_tokens = sum(counts)
        lease.check()
        count = TokenCount(fingerprint=manifest.fingerprint(), text_tokens=text_tokens)
        write_token_count(store, count, key)
    return count


@dataclass(frozen=True)
class _Counter:
    store: Store
    path: str

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Loaded once a process."""
        return TextTokenizer(self.path)

    def __call__(self, shard: ShardInfo, report: Report) -> int:
        """The tokens of a shard's texts."""
        num_tokens = 0
        samples = read_shard(self.store, shard)
        while chunk := list(islice(samples, _AT_ONCE)):
            texts = [text for one in chunk for text in (one.text, *(turn["value"] for turn in one.conversations or ())) if text]
            num_tokens += sum(map(len, self.tokenizer.encode(texts)))
            report(Advance(units=len(chunk), samples=len(chunk)))
        return num_tokens

"""Ways from samples to batches of token rows: `python -m benchmarks.sequences_ways WAY KIND FOLDER` prints what one of them took.

    reference   what one would write: for each sample json.loads of the codes, one tokenizer call, tensors; padded to the longest
    padded      build_loader(sequences=...)
    fly         build_loader(sequences=..., packing=True)
    ahead       build_loader over what `wds-tools pack` made
    wait        the share of steps of 100 ms, 8 rows each, that is spent waiting for `fly` with two workers, on all cores

The reference has its records in memory before the clock starts; ours read their shards from the page cache. `fly` is timed once
its windows are full. Batches of 32 samples, or rows of 65,536 tokens. One process on one core.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from loaders import Loader, LoaderConfig, SequenceConfig, Source, World, build_loader
from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.storage import open_store

CODEBOOK_SIZE = 8192
BATCH, BATCH_TOKENS = 32, 1 << 16
"""Of `fly`: so few that their windows are full before the clock starts."""
LONGEST_S = 2.5
STEP_S, WAIT_STEPS, WAIT_ROWS = 0.1, 80, 8
PROMPT = " Draw a picture of this."
ALL_LANES = 8
"""Steps after which every lane has come, whatever the batch."""


def sources(folder: Path, kind: str) -> tuple[str, ...]:
    """The datasets of a kind of input."""
    names = {"pairs": ("pairs",), "mixture": ("pairs", "documents")}[kind]
    return tuple(str(folder / name) for name in names)


def reference(folder: Path, kind: str, max_length: int, totals: dict[str, int]) -> Iterator[int]:
    """The straightforward collator, shuffled; yields the samples of each batch. Adds its padding and lost text to `totals`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    size = len(tokenizer)
    records = [record for url in sources(folder, kind) for record in _records(url)]
    random.Random(0).shuffle(records)
    (boi, eoi), eos = tokenizer.convert_tokens_to_ids(["<boi>", "<eoi>"]), tokenizer.eos_token_id
    yield 0  # the clock starts here
    for begin in range(0, len(records), BATCH):
        rows = []
        for text, codes_json in records[begin : begin + BATCH]:
            if codes_json is None:
                ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
                labels = list(ids)
            else:
                codes = [code + size for code in json.loads(codes_json)]
                before = [tokenizer.bos_token_id, *tokenizer(text + PROMPT)["input_ids"], boi]
                ids = [*before, *codes, eoi, eos]
                labels = [-100] * len(before) + [*codes, eoi, eos]
            totals["lost"] += max(len(ids) - max_length, 0)
            totals["tokens"] += len(ids)
            rows.append((torch.tensor(ids[:max_length]), torch.tensor(labels[:max_length])))
        input_ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=eos)
        labels_BL = torch.nn.utils.rnn.pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=-100)
        attention_mask = torch.arange(input_ids.shape[1]) < torch.tensor([len(ids) for ids, _ in rows])[:, None]
        totals["padding"] += int((~attention_mask).sum())
        totals["all"] += input_ids.numel()
        assert labels_BL.shape == attention_mask.shape
        yield len(rows)


def _records(url: str) -> Iterator[tuple[str, str | None]]:
    store = open_store(url)
    for row in read_manifest(store).shards:
        for sample in read_shard(store, row):
            grids = list(sample.codes.values())
            yield sample.text, json.dumps(grids[0].reshape(-1).tolist()) if grids else None


def loader(folder: Path, kind: str, way: str, max_length: int) -> Loader:
    """Ours."""
    urls = sources(folder, kind) if way != "ahead" else (str(folder / f"rows-{kind}-{max_length}"),)
    sequences = SequenceConfig(tokenizer=str(folder / "tokenizer"), max_length=max_length, t2i_ratio=1.0)
    config = LoaderConfig(
        sources=tuple(map(Source, urls)),
        sequences=None if way == "ahead" else sequences,
        packing=way in ("fly", "wait"),
        batch_size=WAIT_ROWS if way == "wait" else BATCH if way == "padded" else BATCH_TOKENS // max_length,
        num_workers=2 if way == "wait" else 0,
        last_batch="drop",
    )
    return build_loader(config, World())


def time_ours(folder: Path, kind: str, way: str, max_length: int) -> dict[str, float]:
    """Samples per second, and padding."""
    batches = loader(folder, kind, way, max_length)
    steps = iter(batches)
    for _ in range(ALL_LANES if way == "fly" else 0):
        next(steps)  # of this loop: another would fill the windows again
    before, rows = batches.stats()["samples"], 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < LONGEST_S:
        batch = next(steps, None)
        if batch is None:
            steps = iter(batches)
        else:
            rows += len(batch["input_ids"])
    seconds = time.perf_counter() - begun
    stats = batches.stats()
    if way == "ahead":
        manifest = read_manifest(open_store(str(folder / f"rows-{kind}-{max_length}")), any_members=True)
        counts = manifest.source["counts"]
        samples = rows * counts["samples"] / manifest.samples
        padding = counts["padding"] / (counts["padding"] + counts["tokens"])
        return {"samples_per_s": samples / seconds, "padding": padding}
    tokens = stats["tokens"] + stats["padding"]
    return {"samples_per_s": (stats["samples"] - before) / seconds, "padding": stats["padding"] / tokens}


def time_reference(folder: Path, kind: str, max_length: int) -> dict[str, float]:
    """The same of the reference, and the share of tokens that it loses."""
    totals = dict.fromkeys(("lost", "tokens", "padding", "all"), 0)
    batches = reference(folder, kind, max_length, totals)
    next(batches)
    begun, samples = time.perf_counter(), 0
    for count in batches:
        samples += count
        if time.perf_counter() - begun > LONGEST_S:
            break
    return {
        "samples_per_s": samples / (time.perf_counter() - begun),
        "padding": totals["padding"] / totals["all"],
        "lost": totals["lost"] / totals["tokens"],
    }


def wait(folder: Path, kind: str, max_length: int) -> dict[str, float]:
    """How much of the time of steps that take 100 ms is spent waiting, once the windows of all lanes are full."""
    batches = loader(folder, kind, "wait", max_length)
    steps = iter(islice(batches, WAIT_STEPS))
    for _ in range(ALL_LANES):
        next(steps)
    begun, waited = time.perf_counter(), 0.0
    while True:
        asked = time.perf_counter()
        if next(steps, None) is None:
            break
        waited += time.perf_counter() - asked
        time.sleep(STEP_S)
    total = time.perf_counter() - begun
    batches.close()
    return {"waiting": waited / total}


def main(way: str, kind: str, folder: Path, max_length: int) -> dict[str, Any]:
    """Time one way."""
    torch.set_num_threads(1)
    if way == "wait":
        return wait(folder, kind, max_length)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return time_reference(folder, kind, max_length) if way == "reference" else time_ours(folder, kind, way, max_length)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))

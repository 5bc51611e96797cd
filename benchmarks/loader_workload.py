"""The samples that every loader reads: 60,000 captions with codes and 20,000 documents, kept in the plainest form there is.

    FOLDER/pairs/source/      texts.jsonl (a JSON string a line), codes.npy (60000, 32, 32) uint16
    FOLDER/documents/source/  texts.jsonl
    FOLDER/KIND/FORMAT/       the same samples as a peer wants them, written by that peer from source/

Texts are cut from the prose that the installed packages bring; codes are random. Kept in files, since the peers live in an
environment of their own, which holds other packages and so other prose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("pairs", "documents")
NUM_SAMPLES = {"pairs": 60_000, "documents": 20_000}
SAMPLES_PER_SHARD = 10_000
CODEBOOK_SIZE = 8192
GRID = (32, 32)
Text = tuple[str, Any]
"""A sample: its text, and its codes as an integer array or tensor of 1,024, or None for a document."""


def write_source(folder: Path) -> None:
    """Make both sets, unless they are there."""
    from benchmarks.workload import corpus  # needs zstandard, which the peers' environment has no use for

    if not (folder / "pairs" / "source").is_dir():
        rng = np.random.default_rng(1)
        words = [word for word in corpus(4_000_000).split() if word.isalpha() and len(word) < 12]
        lengths = rng.integers(10, 61, NUM_SAMPLES["pairs"])
        starts = rng.integers(0, len(words) - 60, NUM_SAMPLES["pairs"])
        captions = [" ".join(words[at : at + n]) for at, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
        codes = rng.integers(0, CODEBOOK_SIZE, (len(captions), *GRID), dtype="<u2")
        _publish(folder / "pairs" / "source", captions, codes)
    if not (folder / "documents" / "source").is_dir():
        rng = np.random.default_rng(2)
        text = corpus(100_000_000)
        lengths = rng.integers(4000, 6001, NUM_SAMPLES["documents"])
        starts = rng.integers(0, len(text) - 6000, NUM_SAMPLES["documents"])
        _publish(
            folder / "documents" / "source", [text[at : at + n] for at, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
        )


def _publish(folder: Path, texts: list[str], codes: np.ndarray | None = None) -> None:
    temp = folder.with_suffix(".tmp")
    temp.mkdir(parents=True, exist_ok=True)
    (temp / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    if codes is not None:
        np.save(temp / "codes.npy", codes)
    temp.rename(folder)


def read_source(folder: Path) -> Iterator[tuple[str, np.ndarray | None]]:
    """The samples of one kind (folder / "source") in order: text, and codes (32, 32) uint16 or None."""
    codes = np.load(folder / "source" / "codes.npy") if (folder / "source" / "codes.npy").exists() else None
    with (folder / "source" / "texts.jsonl").open() as lines:
        for number, line in enumerate(lines):
            yield json.loads(line), None if codes is None else codes[number]


def digest(text: str, codes: Any) -> int:
    """64 bits over one sample; summed modulo 2**64 they show that a pass saw every sample exactly once, in whatever order."""
    data = text.encode()
    if codes is not None:
        data += b"\0" + np.ascontiguousarray(np.asarray(codes).ravel(), "<u2").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())

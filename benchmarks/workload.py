"""Input that anyone has: text of the installed packages, wrapped as DCLM wraps its records, and captions with random codes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import orjson
import zstandard

CODEBOOK_SIZE = 8192
_PROSE = (".md", ".rst", ".txt", "METADATA")
_CORPUS_CHARS = 200_000_000
_WRAPPER = {
    "bff_contained_ngram_count_before_dedupe": 20,
    "language_id_whole_page_fasttext": {"en": 0.9382619857788086},
    "metadata": {
        "Content-Length": "38231",
        "Content-Type": "application/http; msgtype=response",
        "WARC-Block-Digest": "sha1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "WARC-Concurrent-To": "<urn:uuid:00000000-0000-0000-0000-000000000000>",
        "WARC-Date": "2014-03-13T14:49:13Z",
        "WARC-IP-Address": "192.0.2.1",
        "WARC-Payload-Digest": "sha1:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB",
        "WARC-Record-ID": "<urn:uuid:00000000-0000-0000-0000-000000000001>",
        "WARC-Target-URI": "http://example.com/a/page",
        "WARC-Type": "response",
        "WARC-Warcinfo-ID": "<urn:uuid:00000000-0000-0000-0000-000000000002>",
    },
    "previous_word_count": 900,
    "url": "http://example.com/a/page",
    "warcinfo": "robots: classic\r\nhostname: host.example\r\nisPartOf: CC-MAIN-2014-10\r\n",
    "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.08555358648300171,
}


def corpus(num_chars: int) -> str:
    """Prose that the installed packages bring (READMEs, licences, notes), one file after the other, in a fixed order."""
    found = sorted(str(path) for path in Path(sysconfig.get_paths()["purelib"]).rglob("*") if path.name.endswith(_PROSE))
    texts: list[str] = []
    held = 0
    for name in np.random.default_rng(0).permutation(found).tolist():
        text = Path(name).read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        held += len(text)
        if held >= num_chars:
            break
    return "\n".join(texts)


def write_documents(folder: Path, num_documents: int, document_chars: int = 5000) -> int:
    """Write a .jsonl.zst file of records of about 6 KB; lengths vary as web pages' do (log-normal). Returns the bytes of JSON."""
    text = corpus(min(num_documents * document_chars, _CORPUS_CHARS))
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(document_chars) - 0.32, 0.8, num_documents), len(text) // 2).astype(int)
    starts = (np.cumsum(lengths) - lengths) % (len(text) - lengths)  # one after the other; around again if the corpus is short
    folder.mkdir(parents=True)
    total = 0
    path = folder / "shard_00000000_processed.jsonl.zst"
    with path.open("wb") as out, zstandard.ZstdCompressor(3).stream_writer(out) as sink:
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            total += sink.write(orjson.dumps({"text": text[start : start + length], **_WRAPPER}) + b"\n")
    return total


def captioned_codes(num_samples: int) -> list[tuple[str, np.ndarray]]:
    """(caption of 40 words, 32 x 32 uint16 codes of an 8,192-entry codebook)."""
    words = [word for word in corpus(1_000_000).split() if word.isalpha() and len(word) < 12]
    rng = np.random.default_rng(1)
    captions = [" ".join(words[40 * n % (len(words) - 40) :][:40]) for n in range(num_samples)]
    return [(caption, rng.integers(0, CODEBOOK_SIZE, (32, 32), dtype="<u2")) for caption in captions]

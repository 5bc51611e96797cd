"""`make bench-sequences`: from samples to batches of token rows, against the straightforward collator, in one run.

Pairs (a caption of 10 to 60 words, 32 x 32 codes), and a mixture of as many documents of DCLM's lengths. The ways are in
sequences_ways.py; they take turns, each in a process of its own. Writes OUT/sequences.json and prints tables; `--publish` puts
them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.loader import machine
from benchmarks.loader_report import Bar, bar_table, put_section
from benchmarks.sequences_ways import CODEBOOK_SIZE, sources
from benchmarks.workload import corpus
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.format.schema import Sample
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.storage import open_store

ROOT = Path(__file__).parents[1]
ROUNDS = 3
NUM_SAMPLES = 6_000
VOCABULARY = 32_000
LENGTHS = (2048, 4096)
SPEED_WAYS = ("reference", "padded", "fly", "ahead")
TITLES = {
    "reference": "one tokenizer call a sample, JSON codes, padded to the longest",
    "padded": "build_loader, padded",
    "fly": "build_loader, packed on the fly",
    "ahead": "build_loader, packed ahead",
}
SECTION = ("<!-- sequences: written by `make bench-sequences ARGS=--publish` -->", "<!-- /sequences -->")


def write_inputs(folder: Path) -> None:
    """A tokenizer, both datasets, and rows of them packed ahead."""
    text = corpus(60_000_000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<boi>", "<eoi>", "<unconditional>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    pieces = (text[at : at + 10_000] for at in range(0, 20_000_000, 10_000))
    tokenizer.train_from_iterator(pieces, trainer)
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))
    rng = np.random.default_rng(1)
    words = [word for word in text[:4_000_000].split() if word.isalpha() and len(word) < 12]
    counts = rng.integers(10, 61, NUM_SAMPLES)
    starts = rng.integers(0, len(words) - 60, NUM_SAMPLES)
    pairs = (
        Sample(
            key=f"{number:08d}",
            data_type="image_text",
            text=" ".join(words[at : at + count]),
            codes={"vqcode_512": rng.integers(0, CODEBOOK_SIZE, (32, 32), dtype="<u2")},
        )
        for number, (at, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True))
    )
    _write(folder / "pairs", pairs, {"vqcode_512": {"tokenizer": "random", "codebook_size": CODEBOOK_SIZE}})
    lengths = np.minimum(rng.lognormal(np.log(5000) - 0.32, 0.8, NUM_SAMPLES), 200_000).astype(int)
    places = rng.integers(0, len(text) - 200_000, NUM_SAMPLES)
    documents = (
        Sample(key=f"{number:08d}", data_type="text_pretrain", text=text[at : at + length])
        for number, (at, length) in enumerate(zip(places.tolist(), lengths.tolist(), strict=True))
    )
    _write(folder / "documents", documents, {})
    for kind in ("pairs", "mixture"):
        for length in LENGTHS:
            pack(
                PackConfig(
                    input=sources(folder, kind),
                    tokenizer=str(folder / "tokenizer"),
                    max_length=length,
                    t2i_ratio=1.0,
                    output=str(folder / f"rows-{kind}-{length}"),
                    workers=os.cpu_count() or 1,
                    task_samples=6_000,
                    quiet=True,
                )
            )


def _write(folder: Path, samples: Iterator[Sample], codes: dict[str, Any]) -> None:
    store = open_store(str(folder))
    output = Output(store, OutputSpec(num_tasks=1, source={"command": "benchmark"}, codes=codes))
    output.begin()
    with TaskWriter(store, 0, ShardLimits(samples=2000)) as writer:
        for sample in samples:
            writer.add(sample)
        writer.finish(writer.num_samples)
    output.finish(output.results())


def measure(folder: Path) -> dict[str, Any]:
    """Medians of the rounds: {kind: {length: {way: {...}}}}, and the share of waiting."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(ROUNDS):
        for kind in ("pairs", "mixture"):
            for length in LENGTHS:
                for way in SPEED_WAYS:
                    print(f"round {number + 1} of {ROUNDS}: {kind}, rows of {length}, {way}", file=sys.stderr)
                    found.setdefault(f"{kind}/{length}/{way}", []).append(_run(way, kind, folder, length))
    found["mixture/2048/wait"] = [_run("wait", "mixture", folder, 2048) for _ in range(ROUNDS)]
    return {
        name: {measure: statistics.median(one[measure] for one in rounds) for measure in rounds[0]}
        for name, rounds in found.items()
    }


def _run(way: str, kind: str, folder: Path, length: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.sequences_ways", way, kind, str(folder), str(length)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}, {kind}:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def bars(results: dict[str, Any]) -> Iterator[Bar]:
    """What was aimed at."""
    measured = results["measured"]

    def times(way: str, kind: str, length: int) -> float:
        speeds = [measured[f"{kind}/{length}/{one}"]["samples_per_s"] for one in (way, "reference")]
        return float(speeds[0] / speeds[1])

    for length in LENGTHS:
        yield Bar(f"pairs, rows of {length:,}: samples/s padded over the collator", times("padded", "pairs", length), 5.0, True)
        yield Bar(f"pairs, rows of {length:,}: samples/s packed on the fly over it", times("fly", "pairs", length), 5.0, True)
        yield Bar(f"pairs, rows of {length:,}: samples/s packed ahead over it", times("ahead", "pairs", length), 50.0, True)
        yield Bar(f"mixture, rows of {length:,}: samples/s packed ahead over it", times("ahead", "mixture", length), 50.0, True)
        for way in ("fly", "ahead"):
            padding = 100 * measured[f"mixture/{length}/{way}"]["padding"]
            yield Bar(f"mixture, rows of {length:,}: padding, {TITLES[way].partition(', ')[2]}", padding, 2.0, False, " %")
    waiting = 100 * measured["mixture/2048/wait"]["waiting"]
    yield Bar("waiting with two workers and steps of 100 ms, share of the time", waiting, 1.0, False, " %")


def markdown(results: dict[str, Any]) -> str:
    """As it stands in docs/benchmarks.md."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [f"Measured {results['date']} on {results['machine']}; {versions}. Median of {ROUNDS}.", ""]
    heads = [f"{kind}, rows of {length:,}" for kind in ("pairs", "mixture") for length in LENGTHS]
    lines += [f"| samples/s (padding) | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for way in SPEED_WAYS:
        cells = [results["measured"][f"{kind}/{length}/{way}"] for kind in ("pairs", "mixture") for length in LENGTHS]
        shown = [f"{cell['samples_per_s']:,.0f} ({cell['padding']:.1%})" for cell in cells]
        lines.append(f"| {TITLES[way]} | {' | '.join(shown)} |")
    lost = ", ".join(f"{results['measured'][f'mixture/{length}/reference']['lost']:.1%} at {length:,}" for length in LENGTHS)
    lines += ["", f"The collator loses tokens of the mixture: {lost}; ours none.", "", *bar_table(bars(results))]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything under OUT/sequences, which is emptied first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--publish", action="store_true", help="write the section in docs/benchmarks.md")
    arguments = parser.parse_args()
    folder = arguments.out.resolve() / "sequences"
    shutil.rmtree(folder, ignore_errors=True)
    write_inputs(folder)
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "measured": measure(folder)}
    results["versions"] = {name: version(name) for name in ("tokenizers", "transformers", "torch", "numpy")}
    (folder.parent / "sequences.json").write_text(json.dumps(results, indent=2) + "\n")
    text = markdown(results)
    print(text)
    if arguments.publish:
        put_section(ROOT / "docs" / "benchmarks.md", SECTION, text)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

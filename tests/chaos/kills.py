"""A command that writes is stopped at any moment, by any signal, once or twice, and run again: the bytes are those of an
undisturbed run, and what it says and leaves behind is what docs/reliability.md promises.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import webdataset as wds
from commands import (
    command,
    environment,
    image_bytes,
    session,
    start,
    tree,
    wait_until,
    workers_of,
    write_documents,
    write_jsonl,
    write_pairs,
)
from factory import image_sample
from s3 import BUCKET
from tokens import write_small_sets

from wds_tools.storage import LocalStore, Store, open_store

Target = Literal["parent", "group", "worker"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
COMMANDS: Mapping[str, Sequence[str]] = {
    "convert pairs": ("--input", "pairs", "--task-lines", "6", "--shard-samples", "4"),
    "convert pairs --encode": ("--input", "pairs", "--task-lines", "6", "--encode", "tiny", "--device", "cpu"),
    "convert documents": ("--input", "texts", "--task-bytes", "1", "--shard-samples", "70"),
    "convert conversations": ("--input", "talks.jsonl", "--task-lines", "3", "--shard-samples", "2"),
    "convert coded": ("--input", "rows.jsonl", "--task-lines", "4", "--codebook-size", "8192", "--tokenizer", "tiny"),
    "encode": ("--input", "raw", "--device", "cpu", "--shard-samples", "4"),
    "pack": (
        "--input",
        "small/pairs",
        "small/texts",
        "--tokenizer",
        "small/tokenizer",
        "--max-length",
        "1280",
        "--task-samples",
        "10",
    ),
    "convert interleaved": ("--input", "pages.jsonl", "--task-lines", "3", "--shard-samples", "4"),
    "convert documents --part": ("--input", "texts", "--task-bytes", "1", "--shard-samples", "70", "--part", "1/2"),
    "select": ("--input", "small/pairs", "--where", "num_codes > 0", "--fraction", "0.8", "--shard-samples", "3"),
    "relabel": ("--input", "small/pairs", "--with", "recaptions.jsonl", "--on", "key", "--texts", "recap=caption"),
    "index": (),
    "finalize": (),
    "export hf": ("--input", "small/pairs", "small/texts", "--num-shards", "6"),
    "export parquet": ("--input", "small/pairs", "small/texts", "--num-shards", "6"),
    "vocabulary": ("small/tokenizer", "--codebook-size", "8192"),
}
"""With inputs below one folder, where they are run."""
BEGUN = dict.fromkeys(COMMANDS, "_work/") | {"finalize": "_work/run-", "vocabulary": ""}
"""What is in an output as soon as a command has begun."""
WITHOUT_RESUME = ("index", "finalize", "convert documents --part", "vocabulary")
"""Those that are run again as they are."""
WITHOUT_PROGRESS = ("finalize", "vocabulary")
RESOURCE_TRACKER = re.compile(r"^.*resource_tracker: There appear to be.*\n.*\n", re.MULTILINE)
"""What Python says of a process that was killed before it could tidy up."""
LIMIT_S = 240.0
"""Of anything that is waited for: seconds on an idle machine."""


class Peace(NamedTuple):
    """An undisturbed run."""

    files: dict[str, bytes]
    starts_s: float
    """Until it wrote the first byte."""
    ends_s: float


class Kills:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self._inputs = folder / "inputs"
        self._outputs = folder / "outputs"
        self._peace: dict[str, Peace] = {}
        self._has_s3 = "AWS_ENDPOINT_URL" in os.environ
        write_inputs(self._inputs)

    def plan(self, rng: random.Random, number: int) -> tuple[str, Callable[[], None]]:
        name = list(COMMANDS)[number % len(COMMANDS)]
        on_s3 = self._has_s3 and name != "vocabulary" and rng.random() < 0.25
        url = f"s3://{BUCKET}/chaos-{number}" if on_s3 else str(self._outputs / str(number))
        blows = [
            (rng.choice(SIGNALS), rng.choice(("parent", "group", "worker")), rng.random() < 0.7, rng.random())
            for _ in range(rng.choice((1, 1, 2)))
        ]
        what = " and ".join(f"{one.name} to the {target}" for one, target, _, _ in blows)
        return f"{name}, {what}, {'s3' if on_s3 else 'folder'}", lambda: self._storm(name, url, blows)

    def _storm(self, name: str, url: str, blows: Sequence[tuple[signal.Signals, Target, bool, float]]) -> None:
        if name not in self._peace:
            self._peace[name] = self._run_in_peace(name)
        peace, store = self._peace[name], open_store(url)
        again: list[str] = []
        self._prepare(name, url)
        for number, target, is_at_work, moment in blows:
            if name == "vocabulary" and Path(url).exists():  # which is whole as soon as it exists
                break
            before = {entry.name for entry in store.list("_work/run-")}  # of a run that was killed
            with started(*self._words(name, url), *again, cwd=self._inputs) as process:
                if is_at_work:
                    wait_until(lambda: any(store.list(BEGUN[name])) or process.poll() is not None, "the run begins", LIMIT_S)
                    time.sleep(moment * (peace.ends_s - peace.starts_s))
                else:
                    time.sleep(moment * peace.ends_s)
                wait_until(lambda: is_ours(process), "Python has started", LIMIT_S)
                self._check_end(process, number, strike(process, number, target), store, before)
            again = [] if name in WITHOUT_RESUME else ["--resume"]
        if name != "vocabulary" or not Path(url).exists():
            with started(*self._words(name, url), *again, cwd=self._inputs) as process:
                _, said = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, f"the run that should go on: {said}"
        found = contents(store)
        names = sorted(name for name in {*found, *peace.files} if found.get(name) != peace.files.get(name))
        assert names == [], f"files that differ, are missing or left: {names[:5]}"
        assert not any(word.startswith(".tmp") for word in tree(Path(url))) or "://" in url

    def _words(self, name: str, url: str) -> list[str]:
        place = [url] if name == "index" else ["--output", url]
        quiet = [] if name in WITHOUT_PROGRESS else ["--quiet"]
        workers = [] if name in WITHOUT_PROGRESS else ["--workers", "2"]
        return [*name.partition(" --")[0].split(), *COMMANDS[name], *place, *quiet, *workers]

    def _prepare(self, name: str, url: str) -> None:
        if name == "select":  # which makes these of its input where they are missing
            shutil.rmtree(self._inputs / "small/pairs/fields", ignore_errors=True)
        if name == "index":
            store = open_store(url)
            for tar in sorted((self._inputs / "tars").iterdir()):
                store.put(tar.name, tar.read_bytes())
        if name == "finalize":
            for part in ("1/2", "2/2"):
                words = ["convert", "documents", *COMMANDS["convert documents"], "--output", url, "--part", part, "--quiet"]
                subprocess.run(command(*words), cwd=self._inputs, env=environment(), check=True, capture_output=True)

    def _run_in_peace(self, name: str) -> Peace:
        url = str(self._outputs / f"peace {name}")
        store = open_store(url)
        self._prepare(name, url)
        begun = time.monotonic()
        with started(*self._words(name, url), cwd=self._inputs) as process:
            wait_until(lambda: any(store.list(BEGUN[name])) or process.poll() is not None, "the run begins", LIMIT_S)
            starts_s = time.monotonic() - begun
            _, said = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, said
        return Peace(contents(store), starts_s, time.monotonic() - begun)

    def _check_end(
        self, process: subprocess.Popen[str], number: signal.Signals, target: Target | None, store: Store, before: set[str]
    ) -> None:
        """What a run that was hit says, leaves behind, and gives as its exit status."""
        _, said = process.communicate(timeout=LIMIT_S)
        status = process.returncode if process.returncode >= 0 else 128 - process.returncode
        allowed = {0}  # it may have been at its end
        if target == "worker":
            allowed |= {1} if number == signal.SIGKILL else set()
        elif target is not None:
            allowed |= {128 + number}
        assert status in allowed, f"exit status {status}, expected one of {allowed}: {said}"
        assert "Traceback" not in said, said
        if number == signal.SIGKILL:
            said = RESOURCE_TRACKER.sub("", said)
        lines = said.splitlines()
        assert all(line.startswith("wds-tools: ") for line in lines), said
        told = sum(bool(re.search("stopped by|interrupted|a worker process ended", line)) for line in lines)
        assert told == (status not in (0, 128 + signal.SIGKILL)), f"status {status}: {said}"
        wait_until(lambda: not session(process.pid), "no process of the run is left", LIMIT_S)
        if number != signal.SIGKILL or target == "worker":
            left = {entry.name for entry in store.list("_work/run-")}
            assert left <= before, f"leases that are left: {left - before}; {said}"
            if isinstance(store, LocalStore) and not left:
                assert not (Path(store.url) / ".tmp").exists(), f"unfinished files are left: {said}"


@contextlib.contextmanager
def started(*args: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that does not outlive the block, whatever becomes of it."""
    with start(*args, cwd=cwd) as process:
        try:
            yield process
        finally:
            process.kill()
            for pid in session(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def is_ours(process: subprocess.Popen[str]) -> bool:
    """Whether the command catches SIGTERM, or has ended. Before, it is Python that starts, and Python that ends."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        return process.poll() is not None or (caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1))
    return True


def strike(process: subprocess.Popen[str], number: signal.Signals, target: Target) -> Target | None:
    """Send a signal; returns to whom it went: to the parent if there are no workers, to nobody if it has ended."""
    if process.poll() is not None:
        return None
    with contextlib.suppress(ProcessLookupError):
        if target == "worker" and (workers := workers_of(process)):
            os.kill(workers[0], number)
            return "worker"
        if target == "group":
            os.killpg(process.pid, number)
            return "group"
    process.send_signal(number)
    return "parent"


def contents(store: Store) -> dict[str, bytes]:
    """All files of an output."""
    return {entry.name: bytes(store.read(entry.name)) for entry in store.list()}


def write_inputs(folder: Path) -> None:
    """What COMMANDS name; one record in ten is unusable."""
    for file in range(4):
        path = write_pairs(folder / f"pairs/{file}", 24)
        lines = path.read_bytes().splitlines()
        lines[::12] = [b'{"image_path": "nowhere.jpg", "text_prompt": "x"}'] * len(lines[::12])
        write_jsonl(path, lines)
    for file in range(24):
        texts = ({"text": f"document {file} {number} " * 5 if number % 20 else ""} for number in range(150))
        write_documents(folder / f"texts/{file:03}.jsonl.zst", texts)
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Noise."}]
    names = [f"pairs/0/images/{number % 24}.jpg" if number % 12 else "nowhere.jpg" for number in range(40)]
    write_jsonl(folder / "talks.jsonl", ({"id": str(n), "image": name, "conversations": talk} for n, name in enumerate(names)))
    rows = ({"data_type": "image_text", "text": f"row {number}", "vqcode_512": [number] * 1024} for number in range(80))
    write_jsonl(folder / "rows.jsonl", rows)
    pages = [{"id": n, "images": [names[n], None], "texts": [None, f"Below picture {n}."]} for n in range(40)]
    write_jsonl(folder / "pages.jsonl", pages)
    write_small_sets(folder / "small")
    keys = [image_sample(number).key for number in range(0, 40, 2)]
    write_jsonl(folder / "recaptions.jsonl", ({"key": key, "caption": f"recaption of {key}"} for key in keys))
    (folder / "tars").mkdir()
    for file in range(30):
        with wds.TarWriter(str(folder / f"tars/{file:02}.tar"), mtime=0) as writer:
            for number in range(8):
                writer.write({"__key__": f"{file}-{number}", "jpg": image_bytes(number), "txt": f"caption {number}"})
    words = ("convert", "pairs", "--input", "pairs/0", "--output", "raw", "--task-lines", "3", "--quiet")
    subprocess.run(command(*words), cwd=folder, env=environment(), check=True, capture_output=True)

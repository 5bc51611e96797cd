"""For tests of whole commands: run the real command line, look at what it left behind, make small inputs, find the real ones."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from forks import Forks
from PIL import Image

from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""The real inputs, data of others: they lie beside this repository, or not. Prefer `shared`."""
WAIT_S = 120.0
_forks: Forks | None = None


def tar_bytes(members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar as Python's own tarfile writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def shared(name: str) -> Path:
    """A file or folder of the real inputs; skips the test where it isn't there."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the real inputs: no shared/data/{name} beside this repository")
    return path


def command(*args: str | Path) -> list[str]:
    """The command line as this Python starts it."""
    return [sys.executable, "-m", "wds_tools", *map(str, args)]


def environment() -> dict[str, str]:
    """For subprocesses: this source tree comes first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def wds_tools(*args: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; its exit status has to be `status`, and there is no traceback."""
    global _forks
    env = environment()
    if _forks is None or not _forks.is_alive:
        _forks = Forks()
    if _forks.can(env):
        result = _forks.run(["wds_tools", *map(str, args)], env, 200)
    else:
        result = subprocess.run(command(*args), env=env, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == status, f"exit status {result.returncode}:\n{result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    return result


def start(*args: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start the command line in a session of its own, so that `session` finds all that belongs to it."""
    pipe = subprocess.PIPE
    words, env = command(*args), environment()
    return subprocess.Popen(words, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def session(leader: int) -> list[int]:
    """The living processes of a session, without its leader."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue
        if fields[3] == str(leader) and fields[0] != "Z" and folder.name != str(leader):
            found.append(int(folder.name))
    return found


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes of a run (not multiprocessing's resource tracker)."""
    return [pid for pid in session(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_until(what: Callable[[], Any], why: str, timeout_s: float = WAIT_S) -> None:
    """Poll until it is true; fails loudly."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"still not after {timeout_s:g} s: {why}"
        time.sleep(0.01)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, folders with None."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in sorted(folder.rglob("*"))}


def read_samples(url: str | Path) -> list[Sample]:
    """All samples of a dataset, in order."""
    store = open_store(str(url))
    return [sample for row in read_manifest(store).shards for sample in read_shard(store, row)]


def read_rejects(url: str | Path) -> list[dict[str, Any]]:
    """All rejects of a dataset, in order."""
    store = open_store(str(url))
    return [json.loads(line) for entry in store.list("rejects/") for line in store.read(entry.name).splitlines()]


def image_bytes(seed: int, width: int = 40, height: int = 32, kind: str = "JPEG") -> bytes:
    """An image that differs from seed to seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, kind)
    return out.getvalue()


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    """One record a line; bytes go in as they are."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_pairs(folder: Path, count: int, *, width: int = 40, height: int = 32, name: str = "pairs.jsonl") -> Path:
    """A jsonl of `count` good pairs and their images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"images/{number}.jpg").write_bytes(image_bytes(number, width, height))
    return write_jsonl(
        folder / name, ({"image_path": f"images/{i}.jpg", "text_prompt": f"caption {i}", "url": f"u{i}"} for i in range(count))
    )


def write_documents(path: Path, records: Iterable[object]) -> Path:
    """A .jsonl.zst of one frame."""
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    return path


def last_line(text: str) -> str:
    """The one line that a failure says; there may be progress before it."""
    lines = text.strip().splitlines()
    assert lines, "nothing was said"
    return lines[-1]


def captions(samples: Sequence[Sample]) -> list[str]:
    """Their texts."""
    return [sample.text for sample in samples]


def documents(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl.zst, read by json and zstandard alone."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
        for line in io.TextIOWrapper(stream, "utf-8", newline="\n"):
            yield json.loads(line)


def disturb(args: Sequence[str], output: Path, *, workers: int, num_kills: int, work_s: float, rng: random.Random) -> None:
    """Run a command and kill it some time after it began with the output, several times; then let it end."""
    again: list[str] = []
    for _ in range(num_kills):
        process = start(*args, "--output", str(output), "--workers", str(workers), *again)
        wait_until(lambda: (output / "_work/plan.json").exists() or process.poll() is not None, "the run begins")  # noqa: B023
        time.sleep(rng.uniform(0, work_s))
        process.kill()
        process.communicate()
        wait_until(lambda: not session(process.pid), "the workers of a killed run are gone")  # noqa: B023
        again = ["--resume"]
    wds_tools(*args, "--output", output, "--workers", str(workers), *again)

"""The block cache gives back what was written or nothing, stays within its limit, and never stands in the way of reading."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from loaders.reading.cache import LEFTOVER_S, MAX_WRITTEN_BYTES, UNIT_BYTES, WRITTEN, BlockCache
from wds_tools.errors import UsageError
from wds_tools.format.checksum import content_hash

ROOT = Path(__file__).parents[3]
KB = 1 << 10
ROOMY = 1 << 30


def content(number: int) -> str:
    """The hash of a shard."""
    return content_hash(str(number).encode()).hexdigest()


def block(number: int, num_bytes: int = 64 * KB) -> bytes:
    return random.Random(number).randbytes(num_bytes)


def fill(cache: BlockCache, numbers: range, num_bytes: int = 64 * KB) -> None:
    for number in numbers:
        cache.write(content(number), 0, num_bytes, block(number, num_bytes))


def blocks(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if not path.name.startswith(".")]


def total_bytes(folder: Path) -> int:
    total = 0
    for path in blocks(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # deleted while we looked
    return total


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not made yet" / "cache"


@pytest.fixture
def cache(folder: Path) -> BlockCache:
    return BlockCache(str(folder), ROOMY)


def test_what_was_written_is_read_by_whoever_asks_for_these_bytes_of_this_content(cache: BlockCache, folder: Path) -> None:
    assert cache.read(content(1), 5, 105) is None
    assert not folder.exists(), "reading makes nothing"
    cache.write(content(1), 5, 105, memoryview(block(1, 100)))
    other = BlockCache(str(folder), ROOMY)
    assert other.read(content(1), 5, 105) == block(1, 100)
    for ask in ((content(2), 5, 105), (content(1), 5, 104), (content(1), 6, 105), (content(1), 0, 1)):
        assert other.read(*ask) is None
    assert other.stats() == {"hits": 1, "misses": 4, "written": 0, "evicted": 0, "damaged": 0, "not_written": 0}
    assert cache.stats() == {"hits": 0, "misses": 1, "written": 1, "evicted": 0, "damaged": 0, "not_written": 0}


def test_files_are_for_their_owner_alone(cache: BlockCache, folder: Path) -> None:
    fill(cache, range(1))
    (path,) = blocks(folder)
    assert path.stat().st_mode & 0o077 == path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "wrong",
    [("../" * 3 + "etc/passwd", 0, 1), ("A" * 32, 0, 1), ("a" * 31, 0, 1), ("a" * 33, 0, 1), ("a" * 32, -1, 1), ("a" * 32, 1, 1)],
)
def test_what_is_no_content_or_range_is_refused(cache: BlockCache, wrong: tuple[str, int, int]) -> None:
    with pytest.raises(UsageError, match="expected 0 <= start < end, and an XXH3-128"):
        cache.read(*wrong)
    with pytest.raises(UsageError, match="expected 0 <= start < end, and an XXH3-128"):
        cache.write(*wrong, b"1")


def test_the_callers_other_mistakes_are_refused(cache: BlockCache) -> None:
    with pytest.raises(UsageError, match=r"3 bytes given to the cache as \[0, 4\).*expected 4"):
        cache.write(content(1), 0, 4, b"123")
    for folder, max_bytes in (("", 1), ("a", 0), ("a", -5)):
        with pytest.raises(UsageError, match="expected a folder, and a size of 1 or more"):
            BlockCache(folder, max_bytes)


# --- damage ----------------------------------------------------------------------------------------------------------------


def flip(place: int) -> object:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 16
        path.write_bytes(data)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        flip(0),
        flip(50),
        flip(-1),
        flip(-16),
        flip(-17),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),  # what a power cut may leave
        lambda path: path.write_bytes(next(p for p in blocks(path.parents[1]) if p != path).read_bytes()),
    ],
    ids=[
        "first bit",
        "middle",
        "last of checksum",
        "first of checksum",
        "last of data",
        "cut",
        "longer",
        "empty",
        "zeros",
        "other",
    ],
)
def test_a_damaged_file_is_a_miss_is_deleted_and_counted(cache: BlockCache, folder: Path, damage: object) -> None:
    fill(cache, range(2), 100)
    path = next(path for path in blocks(folder) if path.name.startswith(content(0)))
    damage(path)  # type: ignore[operator]
    assert cache.read(content(0), 0, 100) is None
    assert not path.exists()
    assert cache.stats() | {"written": 0} == {
        "hits": 0,
        "misses": 1,
        "written": 0,
        "evicted": 0,
        "damaged": 1,
        "not_written": 0,
    }
    fill(cache, range(1), 100)
    assert cache.read(content(0), 0, 100) == block(0, 100)


def test_symlinks_are_not_followed(cache: BlockCache, folder: Path, tmp_path: Path) -> None:
    fill(cache, range(2), 100)
    one, two = (next(path for path in blocks(folder) if path.name.startswith(content(number))) for number in range(2))
    outside = tmp_path / "outside"
    one.parent.rename(outside)
    one.parent.symlink_to(outside)  # the folder of one block
    target = tmp_path / "target"
    two.rename(target)
    two.symlink_to(target)  # the other block itself
    assert cache.read(content(0), 0, 100) is None
    assert cache.read(content(1), 0, 100) is None
    fill(cache, range(1, 2), 100)
    assert not two.is_symlink()
    with pytest.warns(UserWarning, match="can't write to the cache"):
        fill(cache, range(1), 100)
    BlockCache(str(folder), 150).write(content(9), 0, 100, block(9, 100))  # looks, and deletes
    assert [path.name for path in outside.iterdir()] == [one.name]
    assert target.exists()


def test_what_is_no_file_in_the_place_of_a_block_is_a_miss_and_nobody_waits_for_it(cache: BlockCache, folder: Path) -> None:
    fill(cache, range(2), 100)
    for number, make in enumerate((os.mkfifo, os.mkdir)):
        path = next(path for path in blocks(folder) if path.name.startswith(content(number)))
        path.unlink()
        make(path)
        assert cache.read(content(number), 0, 100) is None


# --- the limit -------------------------------------------------------------------------------------------------------------


def test_over_the_limit_the_blocks_longest_not_read_go_down_to_90_percent(folder: Path) -> None:
    size = 64 * KB - 16
    cache = BlockCache(str(folder), 20 * 64 * KB)
    fill(cache, range(20), size)
    for path in blocks(folder):
        age(path, 10_000)
    assert all(cache.read(content(number), 0, size) for number in range(0, 20, 2))  # marked as read
    fill(cache, range(20, 21), size)
    assert {number for number in range(21) if cache.read(content(number), 0, size)} >= {*range(0, 20, 2), 20}
    assert total_bytes(folder) == 18 * 64 * KB
    assert cache.stats()["evicted"] == 3


def test_a_block_is_marked_as_read_at_most_once_a_minute(cache: BlockCache, folder: Path) -> None:
    fill(cache, range(1))
    (path,) = blocks(folder)
    for seconds, is_marked in ((30, False), (90, True)):
        age(path, seconds)
        before = path.stat().st_mtime
        assert cache.read(content(0), 0, 64 * KB)
        assert (path.stat().st_mtime > before) == is_marked


def test_each_process_counts_what_the_others_write(folder: Path) -> None:
    limit = 20 * 64 * KB
    caches = [BlockCache(str(folder), limit) for _ in range(10)]  # what they know they have from the disk, as processes do
    for number in range(200):
        caches[number % 10].write(content(number), 0, 64 * KB - 16, block(number, 64 * KB - 16))
        assert total_bytes(folder) <= limit
    assert sum(cache.stats()["evicted"] for cache in caches) == 200 - len(blocks(folder))


def test_a_new_process_counts_what_was_there(folder: Path) -> None:
    fill(BlockCache(str(folder), ROOMY), range(20))
    BlockCache(str(folder), 10 * 64 * KB).write(content(99), 0, 10, block(99, 10))
    assert total_bytes(folder) <= 9 * 64 * KB


def test_a_block_above_the_limit_is_not_kept(folder: Path) -> None:
    cache = BlockCache(str(folder), 100)
    cache.write(content(1), 0, 100, block(1, 100))
    assert cache.read(content(1), 0, 100) is None


def test_the_count_of_what_was_written_begins_again_and_everybody_notices(folder: Path) -> None:
    one, two = BlockCache(str(folder), 10 * UNIT_BYTES), BlockCache(str(folder), 10 * UNIT_BYTES)
    for cache in (one, two):
        fill(cache, range(1), 100)
    with (folder / WRITTEN).open("ab") as file:
        file.write(bytes(MAX_WRITTEN_BYTES))
    for number in range(30):
        (one, two)[number % 2].write(content(number), 0, UNIT_BYTES - 16, block(number, UNIT_BYTES - 16))
        assert total_bytes(folder) <= 10 * UNIT_BYTES + 200
    assert (folder / WRITTEN).stat().st_size < 1000
    (folder / WRITTEN).unlink()
    fill(one, range(30, 60))
    assert total_bytes(folder) <= 10 * UNIT_BYTES


def test_old_leftovers_of_killed_writers_go_and_everything_else_stays(folder: Path) -> None:
    fill(BlockCache(str(folder), ROOMY), range(1), 100)
    (path,) = blocks(folder)
    old, new, foreign = (path.parent / name for name in (".tmp-0123456789abcdef", ".tmp-1123456789abcdef", "notes.txt"))
    for file in (old, new, foreign, folder / "notes.txt"):
        file.write_bytes(b"x" * 1000)
        age(file, LEFTOVER_S + 10)
    age(new, LEFTOVER_S - 60)
    (folder / "zz").mkdir()
    (folder / "aa").write_bytes(b"")
    fill(BlockCache(str(folder), 150), range(1, 2), 100)  # looks, and has too much
    assert not old.exists()
    assert not path.exists()
    assert new.exists()
    assert foreign.exists()
    assert (folder / "notes.txt").exists()


# --- disks that don't want it ----------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_one_warning_and_reading_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = BlockCache(str(tmp_path / "file"), ROOMY)
    with pytest.warns(UserWarning, match=r"/file: can't write to the cache, Not a directory: .*choose another folder") as caught:
        fill(cache, range(3))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert cache.read(content(0), 0, 64 * KB) is None
    assert cache.stats() == {"hits": 0, "misses": 1, "written": 0, "evicted": 0, "damaged": 0, "not_written": 3}


LOAD = f"""
import importlib.util, sys
# without torch, which takes seconds
spec = importlib.util.spec_from_file_location("cache", {str(ROOT / "loaders/reading/cache.py")!r})
cache_module = sys.modules["cache"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache_module)
"""

FULL_DISK = """
import os, subprocess, warnings
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
print("mounted")
cache = cache_module.BlockCache(folder, 1 << 30)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for number in range(20):
        cache.write(f"{number:032x}", 0, 100_000, bytes([number]) * 100_000)
assert len(caught) == 1, caught
print(caught[0].message)
kept = [number for number in range(20) if cache.read(f"{number:032x}", 0, 100_000) == bytes([number]) * 100_000]
counts = cache.stats()
assert counts["hits"] == counts["written"] == len(kept) >= 5, counts
assert counts["not_written"] == 20 - len(kept), counts
assert not [name for _, _, names in os.walk(folder) for name in names if name.startswith(".")]
"""


def test_a_full_disk_is_one_warning_and_what_is_there_is_still_read(tmp_path: Path) -> None:
    for prefix in (("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")):
        if shutil.which("unshare") is None:
            break
        command = [*prefix, sys.executable, "-c", LOAD + FULL_DISK, str(tmp_path)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, check=False)
        if "mounted" in done.stdout:
            assert done.returncode == 0, done.stderr
            assert "can't write to the cache, No space left on device: what is there is still read" in done.stdout
            return
    pytest.skip("may not mount a small tmpfs here, not even in a namespace of its own")


# --- processes and threads -------------------------------------------------------------------------------------------------


def test_a_pickled_cache_is_the_same_cache(cache: BlockCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill(cache, range(1))
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301 - our own
    monkeypatch.chdir(tmp_path)
    assert again.read(content(0), 0, 64 * KB) == block(0)
    assert again.stats()["written"] == 0


def test_a_forked_child_uses_it_while_a_thread_of_the_parent_holds_its_locks(cache: BlockCache) -> None:
    fill(cache, range(1))
    with cache._lock, cache._looking, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork, from Python 3.12 on
        pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # rather than hang
        fill(cache, range(1, 2))
        is_right = cache.read(content(0), 0, 64 * KB) == block(0) and cache.read(content(1), 0, 64 * KB) == block(1)
        os._exit(0 if is_right and cache.stats()["hits"] == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert cache.stats()["hits"] == 0


def test_no_descriptor_is_kept(cache: BlockCache) -> None:
    fill(cache, range(1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    fill(cache, range(20))
    for number in range(40):
        cache.read(content(number), 0, 64 * KB)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


HAMMER = """
import random, threading
folder, max_bytes, seed, num_turns = sys.argv[1], *map(int, sys.argv[2:])
cache = cache_module.BlockCache(folder, max_bytes)
wrong = []
def work(seed):
    draw = random.Random(seed)
    for _ in range(num_turns):
        number = int(draw.paretovariate(0.5)) % 200
        data = random.Random(number).randbytes(20_000 + 1000 * (number % 10))
        found = cache.read(f"{number:032x}", number, number + len(data))
        if found is None:
            cache.write(f"{number:032x}", number, number + len(data), data)
        elif found != data:
            wrong.append(number)
print("on", flush=True)
threads = [threading.Thread(target=work, args=(seed * 10 + thread,)) for thread in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
counts = cache.stats()
assert not wrong and not counts["damaged"] and not counts["not_written"], (wrong, counts)
print(*(counts[name] for name in ("hits", "misses", "written", "evicted")))
"""


@pytest.mark.slow
def test_many_processes_hammer_one_small_cache_and_some_are_killed(folder: Path) -> None:
    limit, num_processes = 1_000_000, 5
    slack = (num_processes + 1) * 3 * 30_000  # what is being written
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}

    def start(seed: int, num_turns: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LOAD + HAMMER, *map(str, (folder, limit, seed, num_turns))]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    processes = [start(seed, 500) for seed in range(num_processes)]
    num_killed = peak = 0
    while any(process.poll() is None for process in processes):
        if num_killed < 3:
            victim = start(100 + num_killed, 1_000_000)
            assert victim.stdout is not None
            assert victim.stdout.readline() == "on\n"
            time.sleep(0.1)
            victim.kill()
            victim.communicate()
            num_killed += 1
        for process in processes:  # a walk while they write would see bytes that were never there at one time
            process.send_signal(signal.SIGSTOP)
        peak = max(peak, total_bytes(folder))
        for process in processes:
            process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    counts = []
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        counts.append([int(number) for number in out.split()[1:]])
    hits, misses, written, evicted = map(sum, zip(*counts, strict=True))
    assert min(hits, misses, evicted) > 50, counts
    assert written == misses
    assert peak <= limit + slack, (peak, counts)
    assert total_bytes(folder) <= limit + slack
    cache = BlockCache(str(folder), limit)
    for path in blocks(folder):
        name, first, end = path.name.split("-")
        assert cache.read(name, int(first), int(end)) is not None


def test_a_writer_killed_in_the_middle_leaves_nothing_that_is_read(folder: Path) -> None:
    script = (
        "import os, signal\n"
        "real = os.write\n"
        "def write(file, data):\n"
        "    real(file, data[:1000]); os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.write = write\n"
        "cache_module.BlockCache(sys.argv[1], 1 << 30).write('a' * 32, 0, 5000, bytes(5000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", LOAD + script, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = (folder / "aa").iterdir()
    assert left.stat().st_size == 1000
    cache = BlockCache(str(folder), ROOMY)
    assert cache.read("a" * 32, 0, 5000) is None
    cache.write("a" * 32, 0, 5000, bytes(5000))
    assert cache.read("a" * 32, 0, 5000) == bytes(5000)


def test_threads_share_it(cache: BlockCache) -> None:
    small = BlockCache(cache.folder, 20 * 64 * KB)
    failures = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(100):
            number = draw.randrange(40)
            found = small.read(content(number), 0, 64 * KB)
            if found is None:
                small.write(content(number), 0, 64 * KB, block(number))
            elif found != block(number):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = small.stats()
    assert not failures
    assert counts["hits"] + counts["misses"] == 800
    assert counts["written"] == counts["misses"]
    assert counts["damaged"] == counts["not_written"] == 0
    assert total_bytes(Path(cache.folder)) <= 28 * 64 * KB

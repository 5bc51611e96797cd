"""Batches on their way from workers to the trainer, through a /dev/shm that is too small: said, never waited for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from factory import image_sample, make_dataset

from loaders import LoaderConfig, Source, World
from loaders.handover import affordable_prefetch
from loaders.stream import open_source
from wds_tools.errors import UsageError

SAMPLES, SIDE, BATCH = 256, 64, 64  # a batch of codes takes 512 KiB

IN_A_LOADER = """
import sys, warnings
from loaders import LoaderConfig, Source, World, build_loader
import loaders.loader
if sys.argv[2] == "unforeseen":
    loaders.loader.affordable_prefetch = lambda config, *_: config.prefetch
config = LoaderConfig(sources=(Source(sys.argv[1]),), batch_size=64, num_workers=2, prefetch=4, start_method="fork")
kept = list(build_loader(config, World()))
print(sum(len(batch["__key__"]) for batch in kept))
"""
IN_A_DATASET = """
import sys, torch
from loaders import ShardDataset
stock = torch.utils.data.DataLoader(ShardDataset(sys.argv[1]), batch_size=None, num_workers=2, multiprocessing_context="fork")
print(len(list(stock)))
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shm") / "set"
    make_dataset(folder, (image_sample(number, side=SIDE) for number in range(SAMPLES)))
    return str(folder)


def run(code: str, *args: str, shm: str) -> subprocess.CompletedProcess[str]:
    """Run it where /dev/shm is a file system of its own, of this size."""
    mount = f"mount -t tmpfs -o size={shm} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code, *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_fewer_batches_are_prepared_ahead_where_they_would_not_fit(url: str) -> None:
    done = run(IN_A_LOADER, url, "foreseen", shm="2800k")
    assert "going on with prefetch=1" in done.stderr
    assert "--shm-size" in done.stderr


def test_what_can_not_fit_is_refused_before_a_worker_starts(url: str) -> None:
    done = run(IN_A_LOADER, url, "foreseen", shm="1m")
    assert done.returncode == 1
    assert "UsageError: /dev/shm has 1,048,576 bytes free for this rank" in done.stderr
    assert "even prefetch=1 is too much" in done.stderr


@pytest.mark.parametrize("code", [IN_A_LOADER, IN_A_DATASET], ids=["loader", "dataset"])
def test_a_batch_that_a_worker_can_not_hand_over_is_an_error_and_no_wait(url: str, code: str) -> None:
    done = run(code, url, "unforeseen", shm="1m")
    assert done.returncode == 1
    assert "a worker can't hand over its batch" in done.stderr or "Bus error" in done.stderr
    assert "/dev/shm" in done.stderr or "shared memory" in done.stderr


def test_ranks_of_one_machine_share_what_is_free(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoaderConfig(sources=(Source(url),), batch_size=BATCH, num_workers=2, prefetch=4)
    sources = [open_source(config.sources[0])]
    assert affordable_prefetch(config, World(), sources) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    with pytest.raises(UsageError, match="even prefetch=1"):
        affordable_prefetch(config, World(), sources)


def test_a_machine_without_shared_memory_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("loaders.handover.SHARED_MEMORY", str(tmp_path / "none"))
    config = LoaderConfig(sources=(Source(url),), batch_size=BATCH, num_workers=2, prefetch=4)
    assert affordable_prefetch(config, World(), [open_source(config.sources[0])]) == 4

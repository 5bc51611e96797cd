"""Batches on their way from workers to the trainer, through a /dev/shm that is too small: said, never waited for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from commands import environment
from factory import image_sample, make_dataset

from loaders import LoaderConfig, Source, World
from loaders.order.samples import open_source
from loaders.workers.handover import affordable_prefetch
from wds_tools.errors import UsageError

HOWS = """
import json, sys, warnings
import torch
import loaders.workers.pool
from loaders import LoaderConfig, ShardDataset, Source, World, build_loader

def loader(batch_size):
    config = LoaderConfig(sources=(Source(sys.argv[1]),), batch_size=batch_size, num_workers=2, start_method="fork")
    return build_loader(config, World())

def dataset(_):
    return torch.utils.data.DataLoader(ShardDataset(sys.argv[1]), batch_size=None, num_workers=2, multiprocessing_context="fork")

def outcome(make, batch_size):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            told = f"{len(list(make(batch_size)))} came"
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
    return [told, *(str(one.message) for one in caught)]

found = {"fewer": outcome(loader, 64), "refused": outcome(loader, 256)}
loaders.workers.pool.affordable_prefetch = lambda config, *_: config.prefetch_factor
found |= {"loader": outcome(loader, 512), "dataset": outcome(dataset, 1)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Batches of 64 take 512 KiB. Not below pytest's folder, which may be in the /dev/shm that another hides."""
    with TemporaryDirectory() as folder:
        make_dataset(f"{folder}/set", (image_sample(number, side=64) for number in range(512)))
        yield f"{folder}/set"


@pytest.fixture(scope="module")
def outcomes(url: str) -> dict[str, list[str]]:
    """What came of each, and warnings, where /dev/shm is a file system of its own, of 2.5 MiB."""
    mount = "mount -t tmpfs -o size=2560k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", HOWS, url],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_fewer_batches_are_prepared_ahead_where_they_would_not_fit(outcomes: dict[str, list[str]]) -> None:
    told, warning = outcomes["fewer"]
    assert told == "8 came"
    assert warning.startswith(
        "/dev/shm has 2,621,440 bytes free for this rank: 2 workers with prefetch_factor=4 batches of about 524,288"
    )
    assert "going on with prefetch_factor=1. docker run --shm-size" in warning


@pytest.mark.slow
def test_what_can_not_fit_is_refused_before_a_worker_starts(outcomes: dict[str, list[str]]) -> None:
    (told,) = outcomes["refused"]
    assert told.startswith("UsageError: /dev/shm has")
    assert "even prefetch_factor=1 is too much. docker run --shm-size" in told


@pytest.mark.parametrize("reader", ["loader", "dataset"])
def test_a_batch_that_a_worker_can_not_hand_over_is_an_error_and_no_wait(outcomes: dict[str, list[str]], reader: str) -> None:
    told = outcomes[reader][0]
    assert "a worker can't hand over its batch" in told or "Bus error" in told
    assert "/dev/shm" in told or "shared memory" in told


def test_ranks_of_one_machine_share_what_is_free(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoaderConfig(sources=(Source(url),), batch_size=64, num_workers=2, prefetch_factor=4)
    sources = [open_source(config.sources[0])]
    assert affordable_prefetch(config, World(), sources) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    with pytest.raises(UsageError, match="even prefetch_factor=1"):
        affordable_prefetch(config, World(), sources)


def test_a_machine_without_shared_memory_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("loaders.workers.handover.SHARED_MEMORY", str(tmp_path / "none"))
    config = LoaderConfig(sources=(Source(url),), batch_size=64, num_workers=2, prefetch_factor=4)
    assert affordable_prefetch(config, World(), [open_source(config.sources[0])]) == 4

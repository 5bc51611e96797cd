"""Saves of a loader: whole or not at all, the newest counts, and it proves the run from its beginning, whatever ranks there were.

Ranks are threads here (tests/ranks.py); tests/project/test_train_example.py has processes.
"""

from __future__ import annotations

import warnings
from itertools import chain, islice
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from factory import make_dataset, text_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from tokens import write_small_sets

from loaders import LoaderConfig, SequenceConfig, Source, World, build_loader
from loaders.proof.audit import audit, read_receipts
from wds_tools.errors import FormatError, NotFound, StorageError, UsageError
from wds_tools.storage import LocalStore

NUM_SAMPLES, BATCH = 60, 6


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LoaderConfig:
    folder = tmp_path_factory.mktemp("data") / "set"
    make_dataset(folder, (text_sample(number) for number in range(NUM_SAMPLES)), shard_samples=20)
    return LoaderConfig(sources=(Source(str(folder)),), batch_size=BATCH, last_batch="short")


def train(config: LoaderConfig, folder: str | Path, world: World, steps: int, every: int) -> list[list[str]]:
    """The keys of each step of a start, with a save behind each `every`-th step."""
    loader = build_loader(config, world)
    loader.resume(folder)
    seen = []
    for batch in islice(loader, steps):
        seen.append(batch["__key__"])
        if len(seen) % every == 0:
            loader.save(folder)
    return seen


@settings(max_examples=12, deadline=None)
@given(
    starts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=5),
    kills=st.lists(st.none() | st.integers(0, 7), min_size=5, max_size=5),
)
def test_the_newest_save_proves_the_run_whatever_was_killed_between_its_files(
    config: LoaderConfig,
    tmp_path_factory: pytest.TempPathFactory,
    starts: list[tuple[int, int, int]],
    kills: list[int | None],
) -> None:
    folder = tmp_path_factory.mktemp("saves")
    put = LocalStore.put
    for (world_size, steps, every), kill in zip(starts, kills, strict=False):
        count = iter(range(1000))

        def dying(store: LocalStore, name: str, data: bytes, kill: int | None = kill, count: Any = count) -> None:
            if next(count) == kill:
                raise Killed
            put(store, name, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalStore, "put", dying)
            try:
                on_ranks(world_size, lambda world, steps=steps, every=every: train(config, folder, world, steps, every))
            except Killed:
                pass
        found = build_loader(config, World())
        if step := found.resume(folder):
            audited = audit(read_receipts([str(folder)]))
            assert audited.is_exact()
            assert (audited.absent, audited.superseded) == ((), ())
            assert sum(epoch.handed_over for epoch in audited.epochs) == step * BATCH
            assert found.step == step


@pytest.fixture(scope="module")
def saved(config: LoaderConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After two starts: three ranks to step 4, saved at 2 and 4, two ranks to step 7, saved at 7."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(3, lambda world: train(config, folder, world, 4, 2))
    on_ranks(2, lambda world: train(config, folder, world, 3, 3))
    return folder


def test_a_save_is_a_state_and_a_file_of_each_rank_and_names_never_meet(saved: Path) -> None:
    assert sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*.json")) == [
        "loader-000001.json",
        *(f"loader-000001/rank-0000{rank}.json" for rank in range(3)),
        "loader-000002.json",
        *(f"loader-000002/rank-0000{rank}.json" for rank in range(3)),
        "loader-000003.json",
        *(f"loader-000003/rank-0000{rank}.json" for rank in range(2)),
    ]
    assert sorted(receipt.world_size for receipt in read_receipts([str(saved)])) == [2, 2, 3, 3, 3]


def test_a_save_without_its_state_is_passed_over_and_its_number_not_used_again(
    config: LoaderConfig, saved: Path, tmp_path: Path
) -> None:
    folder = copytree(saved, tmp_path / "copy")
    (folder / "loader-000003.json").unlink()
    assert train(config, folder, World(), 1, 1) == [[key for rank in range(2) for key in keys_of(config, rank, 2)[4]]]
    assert (folder / "loader-000004.json").exists()


def keys_of(config: LoaderConfig, rank: int, world_size: int) -> list[list[str]]:
    return [batch["__key__"] for batch in build_loader(config, World(rank=rank, world_size=world_size))]


def test_what_was_saved_for_a_start_is_there_for_any_number_of_ranks(config: LoaderConfig, saved: Path) -> None:
    alone = keys_of(config, 0, 1)[7:]
    ranks = on_ranks(4, lambda world: train(config, saved, world, 3, 99))
    assert [list(chain(*step)) for step in zip(*ranks, strict=True)] == alone


def test_a_folder_with_nothing_changes_nothing_and_other_files_do_not_matter(config: LoaderConfig, tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_text("{}")
    loader = build_loader(config, World())
    assert loader.resume(tmp_path) == 0
    loader.save(tmp_path)
    assert build_loader(config, World()).resume(tmp_path) == 0
    assert [receipt.num_samples for receipt in read_receipts([str(tmp_path)])] == [0]


def test_saves_lie_in_object_stores_too(config: LoaderConfig) -> None:
    folder = "memory://saves/run"
    assert len(train(config, folder, World(), 4, 4)) == 4
    assert build_loader(config, World()).resume(folder) == 4
    assert audit(read_receipts([folder])).is_exact()


def test_a_rank_that_cannot_write_ends_all_ranks_and_nothing_counts(
    config: LoaderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalStore.put

    def refusing(store: LocalStore, name: str, data: bytes) -> None:
        if name.endswith("rank-00001.json"):
            raise StorageError("no space left")
        put(store, name, data)

    monkeypatch.setattr(LocalStore, "put", refusing)

    def save(world: World) -> str:
        with pytest.raises(StorageError, match="rank 1: no space left") as error:
            build_loader(config, world).save(tmp_path)
        return str(error.value)

    assert len(set(on_ranks(2, save))) == 1
    assert build_loader(config, World()).resume(tmp_path) == 0


def test_a_save_that_is_damaged_or_has_lost_a_file_is_an_error_that_names_it(
    config: LoaderConfig, saved: Path, tmp_path: Path
) -> None:
    folder = copytree(saved, tmp_path / "copy")
    (folder / "loader-000003/rank-00001.json").write_text("[1]")
    for read in (lambda: build_loader(config, World()).resume(folder), lambda: read_receipts([str(folder)])):
        with pytest.raises(FormatError, match=r"loader-000003/rank-00001\.json: no list of receipts"):
            read()
    (folder / "loader-000003/rank-00001.json").unlink()
    with pytest.raises(NotFound, match="rank-00001"):
        build_loader(config, World()).resume(folder)
    (folder / "loader-000003.json").write_text('{"num_ranks": 0, "state": {}}')
    with pytest.raises(FormatError, match=r"loader-000003\.json: not a save of a loader"):
        build_loader(config, World()).resume(folder)


def test_ranks_that_cannot_speak_with_each_other_are_told_what_to_do(config: LoaderConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this world has 2 ranks, torch"):
        build_loader(config, World(rank=1, world_size=2)).save(tmp_path)


def test_packed_rows_are_saved_with_the_lanes_of_all_ranks_and_without_receipts(tmp_path: Path) -> None:
    data = write_small_sets(tmp_path)
    config = LoaderConfig(
        sources=(Source(str(data / "pairs")), Source(str(data / "texts"))),
        sequences=SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=64),
        packing=True,
        batch_size=4,
    )
    whole = [batch["input_ids"].tolist() for batch in islice(build_loader(config, World()), 8)]

    def start(world: World) -> list[list[list[int]]]:
        loader = build_loader(config, world)
        loader.resume(tmp_path / "run")
        rows = [batch["input_ids"].tolist() for batch in islice(loader, 4)]
        loader.save(tmp_path / "run")
        return rows

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [[list(chain(*step)) for step in zip(*on_ranks(ranks, start), strict=True)] for ranks in (2, 1)]
    assert found[0] + found[1] == whole
    assert read_receipts([str(tmp_path / "run")]) == []

"""Inside the trainers people have: torch.distributed, torch's and webdataset's loaders, torchdata's, and tars made by others."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from commands import environment, wds_tools
from factory import image_sample, make_dataset, text_sample
from PIL import Image
from s3 import free_ports

from loaders import Loader, LoaderConfig, ShardDataset, Source, World, build_loader
from wds_tools.errors import UsageError

COUNT = 101


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 13 samples, and a last one of 10."""
    folder = tmp_path_factory.mktemp("torch") / "set"
    make_dataset(folder, map(image_sample, range(COUNT)), shard_samples=13)
    return str(folder)


@pytest.fixture(scope="module")
def all_keys() -> list[str]:
    return sorted(image_sample(number).key for number in range(COUNT))


def loader(url: str, **settings: Any) -> Loader:
    return build_loader(LoaderConfig(**{"sources": (Source(url),), "batch_size": 8, "last_batch": "short", **settings}), World())


def keys(samples: Iterable[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


# Each rank says what it got; an all_reduce in every step hangs, and so fails, unless all ranks take as many.
TRAIN = """
import json, sys
import torch.distributed as dist
import torch
from loaders import LoaderConfig, Source, World, build_loader

def main():
    url, num_workers = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo")
    world = World.detect()
    found = {}
    for tail in ("drop", "short", "wrap"):
        config = LoaderConfig(sources=(Source(url),), batch_size=14, last_batch=tail, num_workers=num_workers)
        made = build_loader(config)
        assert made.world == world == World(rank=dist.get_rank(), world_size=dist.get_world_size())
        steps = []
        for epoch in range(2):
            announced = len(made)
            for batch in made:
                total = torch.tensor([len(batch["__key__"])])
                dist.all_reduce(total)
                steps.append((batch["__key__"], int(total)))
            assert len(steps) == announced * (epoch + 1)
            dist.barrier()
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, made.state_dict())
        assert all(state == states[0] for state in states)
        found[tail] = steps
        made.close()
    print(json.dumps([world.rank, found]), flush=True)
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def trained(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[tuple[list[str], int]]]]:
    """Tail -> of each of three ranks, the (keys, samples over all ranks) of the steps of two epochs."""
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(TRAIN)
    (port,) = free_ports(1)
    shared = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(path), url, "1" if rank == 1 else "0"],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [rank.communicate(timeout=80) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0, 0], [err[-2000:] for _, err in outputs]
    found = dict(json.loads(out) for out, _ in outputs)
    return {last_batch: [found[rank][last_batch] for rank in range(3)] for last_batch in ("drop", "short", "wrap")}


@pytest.mark.slow
@pytest.mark.parametrize(("last_batch", "steps", "seen"), [("drop", 7, 98), ("short", 8, 101), ("wrap", 8, 112)])
def test_ranks_of_a_process_group_end_together_and_have_every_sample(
    url: str, all_keys: list[str], trained: dict[str, Any], last_batch: Any, steps: int, seen: int
) -> None:
    ranks = trained[last_batch]
    assert {len(rank) for rank in ranks} == {2 * steps}
    alone = loader(url, batch_size=14, last_batch=last_batch)
    for epoch in range(2):
        together = [[key for rank in ranks for key in rank[step][0]] for step in range(epoch * steps, (epoch + 1) * steps)]
        assert together == [batch["__key__"] for batch in alone]
        assert [len(batch) for batch in together] == [rank[1] for rank in ranks[0][epoch * steps : (epoch + 1) * steps]]
        counts = Counter(key for batch in together for key in batch)
        assert counts.total() == seen
        assert len(counts) == min(seen, COUNT)
        assert set(counts) <= set(all_keys)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_epochs_that_are_taken_by_count_follow_each_other(url: str, all_keys: list[str], num_workers: int) -> None:
    """As trainers do that stop at len(loader) and never ask for a batch too many (Lightning's fetcher, zip with a range)."""
    made = loader(url, num_workers=num_workers)
    steps, epochs = [], []
    for _ in range(3):
        steps.append(len(made))
        epochs.append([key for _, batch in zip(range(13), made, strict=False) for key in batch["__key__"]])
    made.close()
    assert steps == [13, 13, 13]
    assert [sorted(epoch) for epoch in epochs] == [all_keys] * 3
    plain = loader(url)
    assert epochs == [[key for batch in plain for key in batch["__key__"]] for _ in range(3)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchs_own_loader_batches_the_samples_each_once(url: str, all_keys: list[str], num_workers: int) -> None:
    stock = torch.utils.data.DataLoader(ShardDataset(url), batch_size=8, num_workers=num_workers, collate_fn=list)
    batches = list(stock)
    assert sorted(key for batch in batches for key in keys(batch)) == all_keys
    assert {len(batch) for batch in batches[:-2]} == {8}
    if num_workers == 0:
        assert [key for batch in batches for key in keys(batch)] == keys(ShardDataset(url))


def pair(sample: dict[str, Any]) -> tuple[str, torch.Tensor]:
    return sample["__key__"], sample["codes"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_webdatasets_loader_batches_in_the_pipeline_and_behind_it(url: str, all_keys: list[str], num_workers: int) -> None:
    dataset = ShardDataset(url).map(pair).batched(8)
    found = []
    for names, codes_Bhw in wds.WebLoader(dataset, batch_size=None, num_workers=num_workers):
        assert codes_Bhw.shape == (len(names), 4, 4)
        found += names
    assert sorted(found) == all_keys
    behind = wds.WebLoader(ShardDataset(url).map(pair), batch_size=None, num_workers=num_workers).shuffle(50).batched(16)
    assert sorted(name for names, _ in behind for name in names) == all_keys


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_epoch_chooses_the_order_of_each_epoch(url: str, all_keys: list[str], num_workers: int) -> None:
    dataset = ShardDataset(url)
    stock = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(keys(stock))
        assert epochs[-1] == keys(ShardDataset(url, epoch=epoch))
        assert sorted(epochs[-1]) == all_keys
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_persistent_workers_hear_of_set_epoch_and_begin_an_epoch_that_was_left_again(url: str) -> None:
    dataset = ShardDataset(url)
    stock = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 3, 1):
        dataset.set_epoch(epoch)
        assert keys(stock) == keys(ShardDataset(url, epoch=epoch))
    dataset.set_epoch(2)
    list(islice(stock, 5))
    dataset.set_epoch(4)
    assert keys(stock) == keys(ShardDataset(url, epoch=4))
    stock._iterator._shutdown_workers()


@pytest.mark.parametrize("world_size", [1, 3])  # of 101 samples, so that ranks differ by one
def test_a_state_from_the_end_of_an_epoch_goes_on_with_the_next(url: str, world_size: int) -> None:
    ranks = [ShardDataset(url, epoch=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    for rank in ranks:
        keys(rank)
    states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
    assert all(state == states[0] for state in states)
    for number in range(world_size):
        resumed, plain = (ShardDataset(url, epoch=epoch, rank=number, world_size=world_size) for epoch in (0, 5))
        resumed.load_state_dict(states[number])
        assert [keys(resumed) for _ in range(3)] == [keys(plain)] * 3


torchdata = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@torchdata
@pytest.mark.parametrize(
    ("stop", "batch_size", "num_workers"),
    [
        *((stop, batch_size, 0) for stop in (1, 5) for batch_size in (None, 7)),
        (5, 7, 2),
        *(pytest.param(*case, 2, marks=pytest.mark.slow) for case in ((1, None), (1, 7), (5, None))),
    ],
)
def test_torchdatas_stateful_loader_goes_on_where_it_was(
    url: str, all_keys: list[str], stop: int, batch_size: int | None, num_workers: int
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def made() -> Any:
        return stateful.StatefulDataLoader(
            ShardDataset(url, epoch=2), batch_size=batch_size, num_workers=num_workers, collate_fn=as_list
        )

    whole = flat(made())
    assert sorted(whole) == all_keys
    first = made()
    before = flat(islice(first, stop))
    state = json.loads(json.dumps(first.state_dict(), default=repr)) if num_workers == 0 else first.state_dict()
    assert before == whole[: len(before)]
    resumed = made()
    resumed.load_state_dict(state)
    assert before + flat(resumed) == whole
    assert flat(resumed) == whole  # the next epoch is whole again


def as_list(samples: Any) -> list[dict[str, Any]]:
    return samples if isinstance(samples, list) else [samples]


def flat(batches: Iterable[list[dict[str, Any]]]) -> list[str]:
    return [key for batch in batches for key in keys(batch)]


@torchdata
def test_a_state_travels_between_a_stateful_loader_and_the_dataset_itself(url: str) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    dataset = ShardDataset(url)
    samples = iter(stateful.StatefulDataLoader(dataset, batch_size=None))
    before = keys(islice(samples, 30))
    other = ShardDataset(url)
    other.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    assert before + keys(other) == keys(ShardDataset(url))


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, 10, 10)).save(out, "PNG")
    return out.getvalue()


def test_an_unshuffled_dataset_goes_on_too(url: str) -> None:
    dataset = ShardDataset(url, shuffle=False)
    before = keys(islice(dataset, 30))
    other = ShardDataset(url, shuffle=False)
    other.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    assert before + keys(other) == [image_sample(number).key for number in range(COUNT)]


LONG = "folder-" * 40
KEYS = ["{}", "a/b/{}", "a.b/c-{}", LONG + "{}", "deep/" * 40 + "{}", "umlaut-ä-{}", "日本/{}", "with space {}", "-{}", "x/-{}"]


def others_samples(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        key = KEYS[number % len(KEYS)].format(number)
        sample = {"__key__": key, "png": png(number), "cls": number, "json": {"caption": f"caption {number}"}}
        if number % 3 == 0:
            sample["seg.png"] = png(number + 1)
        yield sample


def write_others(folder: Path, count: int = 60, shards: int = 4) -> None:
    """Tars by webdataset's writer, in folders."""
    samples = list(others_samples(count))
    for shard in range(shards):
        path = folder / f"part{shard % 2}" / f"{shard}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wds.TarWriter(str(path)) as writer:
            for sample in samples[shard::shards]:
                writer.write(sample)


def as_webdataset_reads(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> suffix -> bytes, by webdataset itself."""
    samples = list(wds.WebDataset([str(path) for path in sorted(folder.rglob("*.tar"))], shardshuffle=False))
    gc.collect()  # it leaves its files open
    return {sample["__key__"]: members(sample) for sample in samples}


def members(sample: dict[str, Any]) -> dict[str, bytes]:
    return {name: value for name, value in sample.items() if not name.startswith("__") and value is not None}


leaves_files_open = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.slow
@leaves_files_open
def test_tars_of_webdatasets_writer_give_what_webdataset_reads(tmp_path: Path) -> None:
    write_others(tmp_path)
    wds_tools("index", tmp_path)
    expected = as_webdataset_reads(tmp_path)
    assert len(expected) == 60
    assert {sample["__key__"]: members(sample) for sample in ShardDataset(str(tmp_path))} == expected
    for num_workers in (0, 2):
        made = loader(str(tmp_path), num_workers=num_workers)
        found: dict[str, dict[str, bytes]] = {}
        for batch in made:
            columns = {name: column for name, column in batch.items() if name not in ("__key__", "__source__")}
            for row, key in enumerate(batch["__key__"]):
                found[key] = {name: column[row] for name, column in columns.items() if column[row] is not None}
        assert found == expected
        made.close()


def test_webdatasets_decoders_go_on_behind_tars_of_others(tmp_path: Path) -> None:
    write_others(tmp_path)
    wds_tools("index", tmp_path)
    dataset = ShardDataset(str(tmp_path)).decode("rgb8").to_tuple("png", "cls", "json", "__key__")
    found = list(wds.WebLoader(dataset, batch_size=None, num_workers=2, collate_fn=tuple))
    assert sorted(label for _, label, _, _ in found) == list(range(60))
    for image_HWC, label, record, key in found:
        assert image_HWC.shape == (4, 6, 3)
        assert image_HWC[0, 0].tolist() == [label % 256, 10, 10]
        assert record == {"caption": f"caption {label}"}
        assert key == KEYS[label % len(KEYS)].format(label)


def tar_with(path: Path, form: int, names: Iterable[str]) -> None:
    """A tar in one of tarfile's formats, with members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            data = f"{number} {name}".encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@leaves_files_open
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"])
def test_keys_with_folders_dots_and_long_names_are_webdatasets(tmp_path: Path, form: int) -> None:
    keys_here = ["a", "b/c", "d.e/f", "x" * 90, "y" * 60 + "/" + "z" * 80, "./g", "./h/i"]
    if form != tarfile.USTAR_FORMAT:
        keys_here += ["w" * 100, "x" * 95, "v" * 98, "u" * 300, ("t" * 70 + "/") * 5 + "s"]
    names = [f"{key}.{suffix}" for key in keys_here for suffix in ("txt", "seg.png", "cls")]
    tar_with(tmp_path / "set" / "0.tar", form, names)
    tar_with(tmp_path / "set" / "1.tar", form, ["only.txt"])
    wds_tools("index", tmp_path / "set")
    theirs = as_webdataset_reads(tmp_path / "set")
    expected = {key.removeprefix("./"): sample for key, sample in theirs.items()}  # as docs/format.md says
    assert len(expected) == len(keys_here) + 1
    found = {sample["__key__"]: members(sample) for sample in ShardDataset(str(tmp_path / "set"))}
    assert found == expected


@pytest.mark.parametrize(
    "change",
    [
        {"sources": None},
        {"sources": [{}]},
        {"sources": [1]},
        {"spec": None},
        {"spec": []},
        {"position": 1 << 62},
        {"position": 1 << 70},
        {"spec": {"lanes_per_sample": 7.5}},
        {"spec": {"block_bytes": 1 << 70, "chunk_bytes": 1 << 70}},
    ],
    ids=str,
)
def test_a_state_that_was_edited_is_refused(url: str, change: dict[str, Any]) -> None:
    made = loader(url)
    state = made.state_dict()
    (begun,) = state["generations"]
    if isinstance(change.get("spec"), dict):
        change = {**change, "spec": begun["spec"] | change["spec"]}
    with pytest.raises(UsageError):
        made.load_state_dict({**state, **change} if "position" in change else {**state, "generations": [begun | change]})


def test_a_small_source_of_a_long_mixture_may_have_any_number_of_epochs(url: str, tmp_path: Path) -> None:
    make_dataset(tmp_path / "tiny", map(text_sample, range(5)))
    sources = Source(url, weight=0.9), Source(str(tmp_path / "tiny"), weight=0.1)
    made = loader(url, sources=sources, stop_at=10**12)
    made.load_state_dict({**made.state_dict(), "position": 10**11})
    assert len(next(iter(made))["__key__"]) == 8


def test_documents_and_pairs_mix_under_torchs_own_loader(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [image_sample(1), text_sample(2), image_sample(3)])
    stock = torch.utils.data.DataLoader(ShardDataset(str(tmp_path / "set")), batch_size=None, num_workers=1)
    found = {sample["__key__"]: sample for sample in stock}
    assert "codes" not in found[text_sample(2).key]
    assert found[image_sample(1).key]["codes"].tolist() == image_sample(1).codes["vqcode_512"].tolist()

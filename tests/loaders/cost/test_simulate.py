"""wds-tools simulate: what it foretells is what a real process does, from manifests alone."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import wds_tools
from factory import image_sample, make_dataset, text_sample

from loaders import LoaderConfig, Source, World, build_loader
from loaders.cost.simulate import Mixing, Simulation, imagined_source, measure_mixing, opening_s, simulate
from loaders.order.partition import BatchPartition
from loaders.order.samples import OpenSource, SampleOrder, open_source, order_spec
from loaders.reading.planner import PositionRange
from loaders.reading.reader import ReadAhead, open_reader
from wds_tools.cli.main import main
from wds_tools.errors import UsageError

MB = 1 << 20


def config(*sources: Source, batch_size: int = 64, **settings: Any) -> LoaderConfig:
    return LoaderConfig(sources=sources or (Source("imagined"),), batch_size=batch_size, **settings)


def imagine(samples: int, world_size: int = 1, *, shard_samples: int = 10_000, **settings: Any) -> Simulation:
    """Of samples of 4 KiB."""
    return simulate([imagined_source(samples, 4096, shard_samples)], config(**settings), world_size)


@pytest.fixture
def no_small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of a few MB are planned and read as large ones are."""
    monkeypatch.setattr("loaders.order.plan.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.reading.planner.SMALL_BYTES", 0)


def real_counts(opened: OpenSource, config: LoaderConfig, world: World) -> dict[str, int]:
    """Of a reader that fetches, over an epoch."""
    order = SampleOrder([opened], order_spec([opened], config))
    steps = BatchPartition(order.length, 0, config.batch_size, config.last_batch, world.world_size)
    numbers = range(0, len(steps), max(config.num_workers, 1))
    low, high = steps.part(0, world.rank)
    reader = open_reader(order, config, high - low, numbers.step * config.batch_size)
    read_ahead = ReadAhead(reader)

    def parts(numbers: range) -> Iterator[PositionRange]:
        return (PositionRange(0, *steps.part(number, world.rank)) for number in numbers)

    for at, part in enumerate(parts(numbers)):
        read_ahead.read(part, parts(numbers[at + 1 :]))
    return reader.counts()


@pytest.mark.parametrize(("world_size", "workers", "batch_size"), [(1, 0, 16), (2, 0, 16), (4, 2, 16), (3, 2, 12), (2, 3, 16)])
def test_what_is_foretold_is_what_a_real_process_fetches(
    no_small_sets: None, world_size: int, workers: int, batch_size: int
) -> None:
    url = f"memory://simulate-{world_size}-{workers}-{batch_size}"
    make_dataset(url, (image_sample(number, side=32) for number in range(4000)), shard_samples=1000)
    opened = open_source(Source(url))
    wanted = config(opened.source, batch_size=batch_size, num_workers=workers)
    cost = simulate([opened], wanted, world_size).process
    real = real_counts(opened, wanted, World(rank=0, world_size=world_size))
    assert cost.is_whole
    assert cost.requests + cost.index_requests == pytest.approx(real["requests"], rel=0.1)
    assert cost.bytes + cost.index_bytes == pytest.approx(real["bytes"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "memory"), [(16, 40), (16, 6), (4, 40)])
def test_the_memory_that_is_foretold_is_what_a_real_process_takes(
    no_small_sets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch_size: int, memory: int
) -> None:
    """Traced by Python: the store is a folder whose files are read, not mapped."""
    monkeypatch.setattr("loaders.reading.source.LocalStore", OpenSource)
    make_dataset(tmp_path / "set", (image_sample(number, side=32) for number in range(8000)), shard_samples=1000)
    opened = open_source(Source(str(tmp_path / "set")))
    wanted = config(opened.source, batch_size=batch_size, memory_bytes=memory * MB, scarce_memory=True)
    foretold = simulate([opened], wanted, as_remote=True).process.peak_bytes
    tracemalloc.start()
    try:
        real_counts(opened, wanted, World())
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert foretold == pytest.approx(taken, rel=0.2)


def test_steps_and_what_is_dropped_are_those_of_the_loader(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    make_dataset(url, (text_sample(number) for number in range(103)), shard_samples=10)
    for last_batch in ("drop", "short", "wrap"):
        wanted = config(Source(url), batch_size=10, last_batch=last_batch)
        found = simulate([open_source(Source(url))], wanted, 5)
        loader = build_loader(wanted, World(rank=2, world_size=5))
        assert (found.num_steps, found.epoch_samples) == (len(loader), loader.num_samples)
        assert found.num_dropped == (3 if last_batch == "drop" else 0)


def test_neither_shards_nor_indices_are_read(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    make_dataset(url, (text_sample(number) for number in range(100)), shard_samples=10)
    for path in (*Path(url).glob("*.tar"), *Path(url).glob("*.index")):
        path.unlink()
    local = simulate([open_source(Source(url))], config(batch_size=10))
    assert (local.process.requests, local.process.bytes) == (0, 0)
    remote = simulate([open_source(Source(url))], config(batch_size=10), as_remote=True)
    assert (remote.process.requests, remote.process.bytes) == (10, remote.total_bytes)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (8, 0), (8, 2), (16, 4), (64, 8)])
def test_a_process_with_lanes_of_its_own_fetches_each_byte_about_once(world_size: int, workers: int) -> None:
    """Of a set that fits memory it fetches whole chunks, of which the ends of its lanes share some with others."""
    found = imagine(100_000, world_size, num_workers=workers, last_batch="short")
    assert found.process.is_whole
    assert 0.999 < found.process.amplification < 1.15
    in_pieces = imagine(100_000, world_size, num_workers=workers, last_batch="short", memory_bytes=500 * MB).process
    assert 1 <= in_pieces.amplification < 1.05  # a group at the ends of a lane belongs to two
    assert in_pieces.evicted == 0
    assert found.process.evicted == 0
    assert found.process.lanes == 512 // world_size // max(workers, 1)
    assert not any("lanes" in warning and "processes" in warning for warning in found.warnings)


def test_what_fits_memory_is_fetched_whole_where_pieces_would_be_as_many_bytes() -> None:
    """Two workers, each of half of the lanes: the ends of short lanes are as long as the rest, those of long ones are not."""
    short = imagine(200_000, batch_size=1024, num_workers=2, last_batch="short")
    assert short.process.is_whole
    assert short.process.amplification == pytest.approx(2, rel=0.02)
    assert short.process.bytes / short.process.requests > 4 * MB
    assert imagine(200_000, batch_size=64, num_workers=2, last_batch="short").process.amplification < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4000, 600])
def test_what_is_not_replayed_is_extrapolated(
    monkeypatch: pytest.MonkeyPatch, steps: int, lanes_per_sample: Callable[[int], None]
) -> None:
    lanes_per_sample(1)
    whole = imagine(400_000, 8, num_workers=1, memory_bytes=32 * MB).process
    monkeypatch.setattr("loaders.cost.replay._WINDOW_STEPS", steps)
    part = imagine(400_000, 8, num_workers=1, memory_bytes=32 * MB).process
    assert (whole.is_whole, part.is_whole, part.is_rough) == (True, False, steps == 600)
    assert part.replayed_steps <= steps < whole.replayed_steps
    for name in ("samples", "requests", "bytes", "peak_bytes", "peak_blocks"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.2), name
    assert part.amplification == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "world_size", "warning"),
    [
        (
            {"num_workers": 3},
            8,
            r"num_workers=3, .* the 512 lanes .* read by 3\.0 processes, .*num_workers of 1, 2, 4, 8 keep each",
        ),
        ({"num_workers": 8, "batch_size": 512}, 8, r"read by 2\.0 processes, which fetch as many times .* of 1, 2, 4 keep each"),
        ({}, 7, "7 ranks do not divide batch_size=64"),
        ({"memory_bytes": 8 * MB}, 1, "memory_bytes=8388608 is too little for 512 lanes a process"),
        ({"memory_bytes": 8 * MB}, 1, r"a process fetches \d+\.\d times the bytes of its samples"),
        ({"batch_size": 8192, "num_workers": 2}, 8, r"requests of \d+ KiB are dear on object storage"),
    ],
)
def test_costly_settings_are_warned_of(settings: dict[str, Any], world_size: int, warning: str) -> None:
    found = imagine(100_000, world_size, **settings)
    assert any(re.search(warning, one) for one in found.warnings), found.warnings


def test_indices_that_are_large_beside_what_is_read_are_warned_of() -> None:
    found = imagine(4_000_000, 64, shard_samples=1_000_000, num_workers=8, check_crc=True)
    assert any("indices are" in warning for warning in found.warnings)
    without = imagine(4_000_000, 64, shard_samples=1_000_000, num_workers=8)
    assert not any("indices are" in warning for warning in without.warnings)
    assert without.process.index_bytes < found.process.index_bytes / 10


def test_the_first_batches_take_as_many_round_trips_as_their_requests_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,024 samples from as many lanes: 64 and then 128 at a time, behind those of manifest and offsets."""
    monkeypatch.setattr("loaders.cost.replay._WINDOW_STEPS", 100)
    cost = imagine(2_000_000, batch_size=1024).process
    first, *others = opening_s(cost, 0.1, 128)
    assert 900 < cost.first_requests[0] <= 1024 + 8
    assert first == pytest.approx(0.1 * (2 + 1 + math.ceil((cost.first_requests[0] - 64) / 128)))
    assert len(others) == 3
    for seconds, requests in zip(others, cost.first_requests[1:], strict=True):
        assert seconds == pytest.approx(0.1 * math.ceil(requests / 128))
    assert opening_s(cost, 0.1, 1)[0] == pytest.approx(0.1 * (2 + cost.first_requests[0]))


@pytest.mark.slow
def test_batches_that_fit_well_are_not_warned_of() -> None:
    assert imagine(4_000_000, 8, num_workers=2).warnings == ()


def mixed(samples: int, sample_bytes: int = 4096, shard_samples: int = 10_000, **settings: Any) -> tuple[SampleOrder, Mixing]:
    wanted = config(**settings)
    order = SampleOrder(sources := [imagined_source(samples, sample_bytes, shard_samples)], order_spec(sources, wanted))
    return order, measure_mixing(order, wanted.batch_size)


@pytest.mark.slow
def test_neighbours_are_as_far_apart_as_the_order_puts_them() -> None:
    _, plain = mixed(50_000, shuffle=False)
    assert (plain.neighbours_median, plain.neighbours_p5) == (1, 1)
    assert plain.batch_chunks < 5
    order, large = mixed(4_000_000)
    block = order.spec.block_bytes // 4096
    assert block > 100
    assert large.neighbours_median == pytest.approx(order.spec.lanes * block * (1 - 0.5**0.5), rel=0.1)
    assert 60 < large.batch_chunks <= 64
    assert 50 < large.batch_shards <= 64
    _, small = mixed(10_000)
    assert small.neighbours_median == pytest.approx(10_000 * (1 - 0.5**0.5), rel=0.1)  # any permutation's
    _, alone = mixed(2_000_000, 5 * MB, 100)
    assert alone.neighbours_median is None


def test_mixtures_are_simulated_too() -> None:
    sources = [imagined_source(100_000, 4096), imagined_source(20_000, 20_000)]
    weighted = tuple(Source(f"imagined-{number}", weight=weight) for number, weight in enumerate((0.7, 0.3)))
    opened = [replace(one, source=source) for one, source in zip(sources, weighted, strict=True)]
    found = simulate(opened, config(*weighted), 4)
    assert found.epoch_samples == pytest.approx(20_000 / 0.3, rel=0.03)
    sample_bytes = found.process.bytes / found.process.samples / found.process.amplification
    assert sample_bytes == pytest.approx(0.7 * 4096 + 0.3 * 20_000, rel=0.02)


def test_a_run_that_goes_on_has_its_lanes_and_the_data_that_has_grown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = ({"folder": tmp_path / name, "count": count} for name, count in (("before", 200), ("after", 300)))
    for made in (before, after):
        make_dataset(made["folder"], (text_sample(number) for number in range(made["count"])), shard_samples=10)
    loader = build_loader(config(Source(str(before["folder"])), batch_size=5), World())
    next(iter(loader))
    (tmp_path / "state.json").write_text(json.dumps(loader.state_dict()))
    changed = config(Source(str(after["folder"])), batch_size=20)
    loader = build_loader(changed, World())
    loader.load_state_dict(json.loads((tmp_path / "state.json").read_bytes()), change="future")
    while not loader.epoch:
        list(loader)
    (tmp_path / "ids.txt").write_text(f"{text_sample(7).key}\n")
    words = ["simulate", str(after["folder"]), "--batch-size", "20", "--remote", "--state", str(tmp_path / "state.json")]
    assert main([*words, "--exclude", str(tmp_path / "ids.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epoch_samples"], found["num_steps"]) == (300, len(loader)) == (300, 15)
    assert found["num_lanes"] == 5 * found["lanes_per_sample"]
    assert found["process"]["bytes"] == pytest.approx(found["total_bytes"], rel=0.01)
    assert any(warning.startswith("1 samples are excluded") for warning in found["warnings"])
    assert main(["simulate", str(after["folder"]), "--batch-size", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_lanes"] == 20 * found["lanes_per_sample"]


def test_settings_that_no_loader_would_take_are_refused() -> None:
    with pytest.raises(UsageError, match="less than one sample for each of 65 ranks"):
        imagine(1000, 65)
    with pytest.raises(UsageError, match="an epoch of 10 samples is less than a batch of 64"):
        imagine(10)
    with pytest.raises(UsageError, match="expected 1 or more of each"):
        imagined_source(0, 1)


@pytest.mark.slow
def test_the_command_prints_the_cost_of_a_dataset_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["simulate", "--samples", "1e8", "--sample-bytes", "4100", "--batch-size", "4096", "--world", "512", "--workers", "4"]
    assert main([*args, "--latency-ms", "50"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "data 100,000,000 samples, 410 GB, 10,000 shards" in said
    assert "epoch 100,000,000 samples: 24,414 steps of 4,096, 256 samples left over" in said
    assert "order 16,384 lanes, 4 for each sample of the batch; " in said
    assert "process one of 2,048: 48,832 samples an epoch, from 8 lanes; replayed in full" in said
    assert re.search(r"1\.0\d x those of its samples", said)
    assert "comes after 0.15 s at 50 ms a request, bandwidth and computing aside, then each of 3 that open lanes" in said
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 24_414


def test_the_command_takes_datasets_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("a", 200), ("b", 50)):
        make_dataset(tmp_path / name, (text_sample(number) for number in range(count)), shard_samples=10)
    urls = [str(tmp_path / name) for name in "ab"]
    assert main(["simulate", *urls, "--batch-size", "10"]) == 0
    assert "250 samples: 25 steps of 10" in capsys.readouterr().out
    assert main(["simulate", *urls, "--batch-size", "10", "--weights", "0.5", "0.5", "--remote"]) == 0
    loader = build_loader(config(*(Source(url, weight=0.5) for url in urls), batch_size=10), World())
    assert f"{loader.num_samples} samples: {len(loader)} steps of 10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "name datasets, or give --samples"),
        (["SET", "--latency-ms", "-1"], 2, "--latency-ms -1: 0 or more milliseconds"),
        (["SET", "--samples", "5"], 2, "not both"),
        (["--samples", "5", "--state", "state.json"], 2, "of datasets that exist"),
        (["SET", "--weights", "1", "2"], 2, "2 weights for 1 datasets"),
        (["SET", "--world", "11"], 2, "less than one sample for each of 11 ranks"),
        (["SET", "--world", "0"], 2, "--world 0"),
        (["nowhere"], 1, "nowhere: there is no such folder, or nothing is in it"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_arguments(tmp_path: Path, args: list[str], status: int, message: str) -> None:
    make_dataset(tmp_path / "set", (text_sample(number) for number in range(20)))
    words = [str(tmp_path / "set") if word == "SET" else word for word in args]
    said = wds_tools("simulate", *words, "--batch-size", "10", status=status).stderr
    assert message in said

"""wds-tools audit: receipts of real runs, told apart from receipts of runs that lost or repeated samples."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import last_line
from factory import make_dataset, random_codes, text_sample
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from loaders import Loader, LoaderConfig, Source, World, build_loader
from loaders.order.partition import BatchPartition
from loaders.order.samples import SampleOrder, open_source, order_spec
from loaders.proof.audit import Audit, audit, num_positions, read_receipts
from loaders.proof.coverage import Coverage, SampleRange
from loaders.proof.receipt import RECEIPT_VERSION, Receipt, SampleHash, parse_receipt, total_of
from loaders.proof.state import Start, state_to_json
from wds_tools.cli.main import main
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.format.schema import Sample

SHARD_SAMPLES = 9


def make_texts(folder: Path, count: int = 100, name: str = "set") -> str:
    make_dataset(folder / name, (text_sample(number) for number in range(count)), shard_samples=SHARD_SAMPLES)
    return str(folder / name)


def config(*sources: str | Source, batch_size: int = 8, **settings: Any) -> LoaderConfig:
    opened = tuple(source if isinstance(source, Source) else Source(source) for source in sources)
    return LoaderConfig(sources=opened, batch_size=batch_size, **settings)


def batches(loader: Loader) -> Iterable[dict[str, Any]]:
    """Endlessly, epoch after epoch."""
    return chain.from_iterable(repeat(loader))


def train(
    config: LoaderConfig, world_size: int, steps: int, state: dict[str, Any] | None = None, run: str = "a"
) -> tuple[list[dict[str, Any]], dict[str, Any], list[list[str]]]:
    """All ranks of a world, for so many steps: their receipts, the state behind them, and each rank's keys."""
    loaders = [build_loader(config, World(rank=rank, world_size=world_size)) for rank in range(world_size)]
    keys = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
        keys.append([key for batch in islice(batches(loader), steps) for key in batch["__key__"]])
    receipts = [loader.receipt() | {"run": f"{run}-{rank}"} for rank, loader in enumerate(loaders)]
    return json.loads(json.dumps(receipts)), loaders[0].state_dict(), keys


def read(receipts: Iterable[dict[str, Any]]) -> list[Receipt]:
    return [parse_receipt(json.dumps(one).encode(), f"receipt-{number}.json") for number, one in enumerate(receipts)]


def write(folder: Path, receipts: Iterable[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(receipts, len(list(folder.iterdir()))):
        (folder / f"receipt-{number}.json").write_text(json.dumps(one))
    return str(folder)


def audited(*receipts: dict[str, Any], **options: Any) -> Audit:
    return audit(read(receipts), **options)


def rows_of(keys: Iterable[str]) -> list[tuple[str, int]]:
    """Where make_texts puts the samples of these keys."""
    numbers = [int(key.removeprefix("text-")) for key in keys]
    return sorted((f"shard-000000-{number // SHARD_SAMPLES:04d}.tar", number % SHARD_SAMPLES) for number in numbers)


def rows_in(ranges: Sequence[SampleRange]) -> list[tuple[str, int]]:
    return sorted((one.shard, row) for one in ranges for row in range(one.first, one.last))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 10), (4, 20), (7, 7), (3, 10), (5, 13)])
@pytest.mark.parametrize("last_batch", ["drop", "short", "wrap"])
def test_two_complete_epochs_are_exact_on_any_world(tmp_path: Path, world_size: int, batch_size: int, last_batch: Any) -> None:
    wanted = config(make_texts(tmp_path), batch_size=batch_size, last_batch=last_batch)
    steps = len(BatchPartition(100, 0, batch_size, last_batch, world_size))
    receipts, _, keys = train(wanted, world_size, 2 * steps)
    found = audited(*receipts, complete=True)
    assert found.is_exact()
    assert found.totals_compared == 2
    assert found.absent == ()
    left = 100 % batch_size
    for one in found.epochs:
        assert one.dropped == (left if last_batch == "drop" else 0)
        assert one.wrapped == ((batch_size - left) % batch_size if last_batch == "wrap" else 0)
        assert one.handed_over == one.expected - one.dropped == 100 - one.dropped
        assert one.unseen == 0
    assert sum(one.handed_over + one.wrapped for one in found.epochs) == sum(map(len, keys))


def test_a_run_resumed_on_other_worlds_and_batch_sizes_is_exact(tmp_path: Path) -> None:
    url = make_texts(tmp_path)
    receipts, state, _ = train(config(url, batch_size=12), 4, 3)
    for run, (world_size, batch_size, steps) in enumerate([(1, 5, 2), (7, 9, 4), (3, 3, 20)]):
        more, state, _ = train(config(url, batch_size=batch_size), world_size, steps, state, run=f"resumed-{run}")
        receipts += more
    found = audited(*receipts)
    assert found.is_exact()
    assert [(one.epoch, one.handed_over, one.dropped, one.unseen) for one in found.epochs] == [(0, 100, 0, 0), (1, 42, 0, 58)]


def test_what_a_lost_rank_had_is_missing_by_position_and_by_row(tmp_path: Path) -> None:
    receipts, _, keys = train(config(make_texts(tmp_path), batch_size=20), 4, 5)
    lost = 2
    found = audited(*receipts[:lost], *receipts[lost + 1 :], show=100)
    (one,) = found.epochs
    assert not found.is_exact()
    assert one.missing.num_samples == 25
    assert one.missing.positions == tuple((20 * step + 10, 20 * step + 15) for step in range(5))
    assert rows_in(one.missing.sample_ranges) == rows_of(keys[lost])
    assert one.repeated.num_samples == 0
    assert found.absent == ("no receipt of rank 2 of 4 for epoch 0 from position 0",)
    assert found.problems == ()


def test_steps_done_twice_are_repeated_and_both_receipts_are_named(tmp_path: Path) -> None:
    wanted = config(make_texts(tmp_path), batch_size=10)
    early, state, _ = train(wanted, 2, 4)
    on, _, _ = train(wanted, 2, 3, state)
    late, _, keys = train(wanted, 2, 6, state, run="b")
    found = audited(*early, *on, *late, show=100)
    (one,) = found.epochs
    assert not found.is_exact()
    assert (one.repeated.num_samples, one.repeated.positions, one.missing.num_samples) == (30, ((40, 70),), 0)
    assert rows_in(one.repeated.sample_ranges) == rows_of(key for rank in keys for key in rank[:15])
    assert one.repeated_by == (("receipt-2.json", "receipt-4.json"),)
    assert one.handed_over == one.expected + one.repeated.num_samples


def test_a_killed_runs_last_steps_count_only_where_its_receipt_has_them(tmp_path: Path) -> None:
    wanted = config(make_texts(tmp_path), batch_size=10)
    at_checkpoint, state, _ = train(wanted, 2, 4)
    when_killed, _, _ = train(wanted, 2, 6)
    resumed, _, _ = train(wanted, 2, 6, state, run="b")
    assert audited(*at_checkpoint, *resumed).is_exact()
    (one,) = audited(*when_killed, *resumed).epochs
    assert one.repeated.positions == ((40, 60),)


def test_of_the_receipts_of_one_loader_the_last_counts(tmp_path: Path) -> None:
    wanted = config(make_texts(tmp_path), batch_size=10)
    receipts = [train(wanted, 2, steps)[0] for steps in (3, 7, 10, 13)]
    found = audited(*chain.from_iterable(receipts))
    assert found.is_exact()
    assert found.num_receipts == 2
    assert {earlier for earlier, _ in found.superseded} == {f"receipt-{number}.json" for number in range(6)}
    assert {later for _, later in found.superseded} == {"receipt-6.json", "receipt-7.json"}


def test_a_restart_from_the_same_place_is_no_later_receipt_of_the_same_loader(tmp_path: Path) -> None:
    wanted = config(make_texts(tmp_path), batch_size=10)
    first, _, _ = train(wanted, 2, 3)
    again, _, _ = train(wanted, 2, 7, run="b")
    (one,) = audited(*first, *again).epochs
    assert one.repeated.positions == ((0, 30),)


def test_a_rest_that_a_larger_batch_drops_after_a_resume_is_dropped(tmp_path: Path) -> None:
    url = make_texts(tmp_path)
    receipts, state, _ = train(config(url, batch_size=10), 2, 9)
    resumed, _, _ = train(config(url, batch_size=25), 5, 4, state, run="b")
    found = audited(*receipts, *resumed)
    assert found.is_exact()
    assert [(one.handed_over, one.dropped) for one in found.epochs] == [(90, 10), (100, 0)]


def test_an_epoch_that_is_not_there_at_all_is_missing(tmp_path: Path) -> None:
    wanted = config(make_texts(tmp_path), batch_size=10)
    receipts, state, _ = train(wanted, 1, 10)
    later, _, _ = train(wanted, 1, 10, state | {"position": 200}, run="b")
    found = audited(*receipts, *later, show=100)
    assert [one.missing.positions for one in found.epochs] == [(), ((0, 100),), ()]
    assert rows_in(found.epochs[1].missing.sample_ranges) == rows_of(f"text-{number}" for number in range(100))


def test_epochs_before_all_receipts_are_missing_too(tmp_path: Path) -> None:
    wanted = config(make_texts(tmp_path), batch_size=10)
    _, state, _ = train(wanted, 1, 10)
    later, _, _ = train(wanted, 1, 10, state, run="b")
    found = audited(*later, complete=True)
    assert [one.missing.positions for one in found.epochs] == [((0, 100),), ()]
    assert not found.is_exact()


def test_an_unfinished_epoch_is_no_failure_unless_it_should_be_complete(tmp_path: Path) -> None:
    receipts, _, _ = train(config(make_texts(tmp_path), batch_size=10), 2, 3)
    (one,) = audited(*receipts).epochs
    assert one.is_exact
    assert (one.handed_over, one.unseen) == (30, 70)
    (one,) = audited(*receipts, complete=True).epochs
    assert not one.is_exact
    assert one.missing.positions == ((30, 100),)


def test_substituted_samples_are_listed_by_reason_and_are_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.order.plan.SMALL_BYTES", 0)
    url = make_texts(tmp_path)
    shard = Path(url) / "shard-000000-0001.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"document 13"', b'"document_13"').replace(b'{"data_type', b"['data_type", 1))
    wanted = config(url, batch_size=10, on_error="substitute", check_crc=True)
    receipts, _, _ = train(wanted, 2, 10)
    found = audited(*receipts, complete=True)
    assert found.is_exact()
    assert found.totals_compared == 1
    (one,) = found.epochs
    assert one.substituted == {"crc32": 2}
    assert rows_in(one.substituted_ranges.sample_ranges) == [("shard-000000-0001.tar", 0), ("shard-000000-0001.tar", 4)]
    for receipt in receipts:
        receipt["substitutions"] = receipt["substitutions"][1:]
    assert audited(*receipts).problems != ()


@pytest.mark.parametrize("change", [{"hash_total": f"{7:032x}"}, {"num_samples": 49}])
def test_a_receipt_that_does_not_add_up_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    receipts, _, _ = train(config(make_texts(tmp_path), batch_size=10), 2, 10)
    receipts[1] |= change
    found = audited(*receipts)
    assert not found.is_exact()
    (problem,) = found.problems
    assert problem.startswith("receipt-1.json: it")
    assert audited(*receipts, quick=True).is_exact() == ("hash_total" in change)


def test_a_run_that_read_codes_by_name_is_audited(tmp_path: Path) -> None:
    codes = {"vqcode_512-other": random_codes(1, 2, 2)}
    make_dataset(tmp_path / "set", (Sample(key=f"{n}", data_type="image_text", text="", codes=codes) for n in range(20)))
    receipts, _, _ = train(config(Source(str(tmp_path / "set"), code_set="other"), batch_size=4), 2, 5)
    assert audited(*receipts).is_exact()


def test_a_mixture_is_compared_over_the_epochs_of_its_sources(tmp_path: Path) -> None:
    sources = Source(make_texts(tmp_path, 60, "a"), weight=3), Source(make_texts(tmp_path, 30, "b"), weight=1)
    wanted = config(*sources, batch_size=4, stop_at=50, schedule=((20, (1.0, 1.0)),), last_batch="short")
    receipts, state, _ = train(wanted, 2, 40)
    more, _, _ = train(config(*sources, batch_size=6, stop_at=50, schedule=((20, (1.0, 1.0)),), last_batch="short"), 3, 40, state)
    found = audited(*receipts, *more)
    assert found.is_exact()
    assert found.totals_compared == 8  # 3 epochs of a, 5 of b
    assert all(one.expected == 50 for one in found.epochs)
    without = audited(*receipts[1:], *more)
    assert [one.missing.num_samples for one in without.epochs[:2]] == [25, 25]
    assert without.totals_compared < 8


def test_repeats_shares_and_sources_without_weights_are_understood(tmp_path: Path) -> None:
    a, b = make_texts(tmp_path, 40, "a"), make_texts(tmp_path, 20, "b")
    receipts, _, _ = train(config(a, Source(b, repeat=3), batch_size=10), 2, 20)
    found = audited(*receipts, complete=True)
    assert (found.is_exact(), found.totals_compared, found.epochs[0].expected) == (True, 2, 100)
    receipts, _, _ = train(config(Source(a, fraction=0.5), batch_size=10), 2, 4)
    found = audited(*receipts, complete=True)
    assert (found.is_exact(), found.totals_compared, found.epochs[0].expected) == (True, 0, 20)
    assert audited(*train(config(a, shuffle=False), 2, 5)[0], complete=True).is_exact()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "seed"), 43, "receipt-1.json is of another run than receipt-0.json: seed is 43, not 42"),
        (("spec", "sources", 0, "repeat"), 2, "repeat of source 0 is 2, not 1"),
        (("sources", 0, "fingerprint"), "sha256:00", "fingerprint of source 0 is 'sha256:00', not"),
    ],
)
def test_receipts_of_different_runs_are_refused_with_what_differs(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    receipts, _, _ = train(config(make_texts(tmp_path)), 2, 2)
    *parents, last = path
    target = receipts[1]["generations"][0]
    for name in parents:
        target = target[name]
    target[last] = value
    with pytest.raises(UsageError, match=message):
        audited(*receipts)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"order_version": 0}, UsageError, "order version 0; this release reads"),
        ({"version": 9}, UsageError, "version 9"),
        ({"rank": 5}, FormatError, r"rank=5 is not in 0 \.\.\. world_size"),
        ({"last_batch": "cut"}, FormatError, "last_batch is 'cut', expected 'drop' or"),
        ({"spans": [[0, 0, 15, 10]]}, FormatError, "does not end with a step"),
        ({"spans": [[0, 95, 105, 10]]}, FormatError, "does not end with a step"),
        ({"spans": [[0, 0, 1, 1]]}, FormatError, "is not a span"),
        ({"spans": [[0, 0, "x", 1]]}, FormatError, "can't be|not the receipt"),
        ({"hash_total": "x"}, FormatError, "not the receipt of a loader"),
        ({"generations": [{"spec": {"length": 100}}]}, FormatError, r"spec\.seed is missing"),
        ({"generations": [{}, {}]}, FormatError, "spec is missing"),
        ({"substitutions": [{"epoch": 0, "source": 0, "shard": 99, "sample_index": 0, "reason": "x"}]}, FormatError, "shard 99"),
    ],
)
def test_a_receipt_that_can_not_be_is_refused(tmp_path: Path, change: dict[str, Any], error: Any, message: str) -> None:
    receipts, _, _ = train(config(make_texts(tmp_path), batch_size=10), 2, 2)
    with pytest.raises(error, match=message):
        audited(receipts[0] | change)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"version": 5, "order_version": 3}', b"\xff"])
def test_what_is_no_receipt_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(FormatError, match="x: not the receipt of a loader"):
        parse_receipt(data, "x")


def test_moved_data_is_found_by_its_fingerprint_and_changed_data_refused(tmp_path: Path) -> None:
    url = make_texts(tmp_path)
    receipts, _, _ = train(config(url, batch_size=10), 2, 10)
    moved, other = str(tmp_path / "moved"), make_texts(tmp_path, 50, "other")
    shutil.move(url, moved)
    with pytest.raises(NotFound, match="say where with --source"):
        audited(*receipts)
    assert audited(*receipts, moved=[moved], complete=True).is_exact()
    with pytest.raises(UsageError, match="not data of the run"):
        audited(*receipts, moved=[other])
    shutil.move(other, url)
    with pytest.raises(UsageError, match="is not the data of the run"):
        audited(*receipts)


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> SampleOrder:
    """Over 61 samples."""
    source = Source(make_texts(tmp_path_factory.mktemp("small"), 61))
    sources = [open_source(source)]
    return SampleOrder(sources, order_spec(sources, config(source)))


def receipt_of(
    order: SampleOrder, world: World, last_batch: Any, span: tuple[int, int, int, int], name: str = "receipt"
) -> Receipt:
    """As a loader would write it."""
    epoch, low, high, batch_size = span
    steps = BatchPartition(order.length, low, batch_size, last_batch, world.world_size)
    count = min(-((low - high) // batch_size), len(steps))
    parts = [np.arange(*steps.part(step, world.rank)) for step in range(count)]
    located = order.locate(epoch, np.concatenate(parts))
    total = total_of([SampleHash(fingerprint) for fingerprint in order.fingerprints], *located[:3])
    record = {
        **state_to_json(order, 0, 0, [Start(0, 0, batch_size, world.world_size, last_batch)]),
        "version": RECEIPT_VERSION,
        "run": "",
        "rank": world.rank,
        "world_size": world.world_size,
        "last_batch": last_batch,
        "spans": [span],
        "num_samples": len(located.source),
        "hash_total": f"{total:032x}",
        "substitutions": [],
    }
    return parse_receipt(json.dumps(record).encode(), name)


SPANS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)))


@tries(50)
@given(SPANS, st.sampled_from(["drop", "short", "wrap"]), st.integers(1, 70), st.booleans())
def test_any_spans_of_any_ranks_are_counted_as_one_by_one(
    order: SampleOrder, spans: list[tuple[int, int, int, int, int]], last_batch: Any, chunk: int, complete: bool
) -> None:
    receipts, handed = [], [Counter[int](), Counter[int]()]
    for number, (epoch, low, count, batch_size, world_size) in enumerate(spans):
        world = World(rank=number % world_size, world_size=world_size)
        steps = BatchPartition(order.length, low, batch_size * world_size, last_batch, world_size)
        count = min(count, len(steps))
        if low < order.length and count:
            span = (epoch, low, steps.end(count - 1), steps.batch_size)
            receipts.append(receipt_of(order, world, last_batch, span))
            for step in range(count):
                handed[epoch].update(range(*steps.part(step, world.rank)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loaders.proof.coverage._WINDOW", chunk)
        coverage = Coverage(order, receipts, show=100)
        for epoch, times in enumerate(handed):
            found = coverage.epoch(epoch, may_end_early=not complete)
            inside = [times[position] for position in range(order.length)]
            due = order.length - found.dropped - found.unseen
            assert [at for low, high in found.missing.positions for at in range(low, high)] == [
                position for position in range(due) if not inside[position]
            ]
            assert [at for low, high in found.repeated.positions for at in range(low, high)] == [
                position for position, count in enumerate(inside) if count > 1
            ]
            assert found.missing.num_samples == inside[:due].count(0)
            assert found.repeated.num_samples == sum(count - 1 for count in inside if count)
            assert not any(inside[due:])
            assert found.wrapped == sum(times.values()) - sum(inside)
            assert found.handed_over == sum(inside)
            assert (
                found.handed_over
                == found.expected - found.missing.num_samples - (found.dropped + found.unseen) + found.repeated.num_samples
            )
            assert len(rows_in(found.missing.sample_ranges)) == found.missing.num_samples
        assert coverage.problems() == []
        assert all(total == expected for _, total, expected in coverage.complete_epochs())


def test_more_ranges_than_are_shown_are_counted(order: SampleOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.proof.coverage._WINDOW", 7)
    monkeypatch.setattr("loaders.proof.coverage._TRACED_SAMPLES", 9)
    world = World(rank=0, world_size=4)
    coverage = Coverage(order, [receipt_of(order, world, "short", (0, 0, 61, 8))], show=3)
    missing = coverage.epoch(0, may_end_early=False).missing
    assert missing.num_samples == 61 - 15  # two of each step of eight, one of the last five
    assert (missing.num_position_ranges, missing.positions) == (8, ((2, 8), (10, 16), (18, 24)))
    assert (missing.num_untraced, len(missing.sample_ranges)) == (61 - 15 - 9, min(missing.num_sample_ranges, 3))


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("steps", [5, 13, 30])
def test_the_progress_of_an_audit_ends_where_it_was_to_end(tmp_path: Path, steps: int, complete: bool) -> None:
    receipts, _, _ = train(config(make_texts(tmp_path), last_batch="drop"), 2, steps)
    found: list[int] = []
    audited(*receipts, complete=complete, on_counted=found.append)
    assert sum(found) == num_positions(read(receipts), complete=complete)
    assert num_positions(read(receipts), complete=complete) > 0


def test_the_command_says_what_is_missing_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = make_texts(tmp_path)
    receipts, _, keys = train(config(url, batch_size=20), 4, 5)
    folder = write(tmp_path / "receipts", receipts)
    assert main(["audit", folder, "--complete"]) == 0
    said = capsys.readouterr().out
    assert "100 expected, 100 handed over, 0 missing, 0 repeated, 0 dropped, 0 skipped, 0 wrapped, 0 substituted: exact" in said
    assert last_line(said) == "audit: all is well"
    (tmp_path / "receipts/receipt-1.json").unlink()
    assert main(["audit", folder, "--show", "2"]) == 1
    said = capsys.readouterr().out
    assert "ABSENT    no receipt of rank 1 of 4 for epoch 0 from position 0" in said
    assert "MISSING   epoch 0: 25 samples\n          position 5 to 9\n          position 25 to 29\n" in said
    assert "and 3 more ranges of positions" in said
    shard, row = rows_of(keys[1])[0]
    assert f"{url}/{shard} sample {row}" in said
    assert last_line(said) == "audit: 1 epoch not exact, 0 wrong totals"
    assert main(["audit", f"{folder}/receipt-0.json", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert not record["is_exact"]
    assert record["epochs"][0]["missing"]["num_samples"] == 75


def test_the_command_reports_one_epoch_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = config(make_texts(tmp_path), batch_size=10)
    receipts, state, _ = train(wanted, 1, 10)
    later, _, _ = train(wanted, 1, 5, state | {"position": 110}, run="b")
    folder = write(tmp_path / "receipts", receipts + later)
    assert main(["audit", folder]) == 1
    assert main(["audit", folder, "--epoch", "0"]) == 0
    assert main(["audit", folder, "--epoch", "1", "--quick"]) == 1
    capsys.readouterr()
    assert main(["audit", folder, "--epoch", "2"]) == 2
    assert "no epoch 2 in these receipts; they have 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("empty", 2, "no .json files"),
        ("nowhere.json", 1, "nowhere.json"),
        ("set/manifest.json", 1, "not the receipt of a loader"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_arguments(
    tmp_path: Path, name: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_texts(tmp_path, 3)
    (tmp_path / "empty").mkdir()
    assert main(["audit", str(tmp_path / name)]) == status
    assert message in last_line(capsys.readouterr().err)


def test_receipts_are_read_from_files_and_folders(tmp_path: Path) -> None:
    receipts, _, _ = train(config(make_texts(tmp_path)), 3, 2)
    folder = write(tmp_path / "receipts", receipts)
    assert [one.name for one in read_receipts([folder])] == [f"{folder}/receipt-{rank}.json" for rank in range(3)]
    assert read_receipts([f"{folder}/receipt-1.json"])[0].rank == 1

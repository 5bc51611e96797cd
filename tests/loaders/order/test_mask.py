"""A mask: samples that are taken down from a run under way, on any topology, and the proof of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import tar_bytes
from hypothesis import given
from hypothesis import strategies as st
from trainings import Training, config, make

from loaders import Source, World, build_loader
from loaders.cost.simulate import simulate
from loaders.order.mask import Mask, read_mask
from loaders.order.samples import open_source
from loaders.proof.audit import audit
from loaders.proof.receipt import parse_receipt
from loaders.testing import Topology, check_resume
from wds_tools.cli.main import main
from wds_tools.errors import DataError, FormatError, NotFound, UsageError
from wds_tools.format.manifest import parse_manifest
from wds_tools.storage import open_store


def ids(folder: Path, *numbers: int, name: str = "ids.txt") -> str:
    (folder / name).write_text("".join(f"a-{number:04d}\n" for number in numbers))
    return str(folder / name)


def test_what_is_excluded_is_never_handed_over_and_the_order_stays(tmp_path: Path) -> None:
    url = make(tmp_path, "a", 20)
    plain = [key for batch in build_loader(config(Source(url)), World()) for key in batch["__key__"]]
    out = {f"a-{number:04d}" for number in (3, 8, 9, 10, 11, 19)}  # 8 ... 11 are a whole shard
    masked = config(Source(url, exclude=ids(tmp_path, 3, 8, 9, 10, 11, 19)))
    loader = build_loader(masked, World())
    found = [key for batch in loader for key in batch["__key__"]]
    stand_ins = {"a-0003": "a-0000", "a-0019": "a-0016", **dict.fromkeys(("a-0008", "a-0009", "a-0010", "a-0011"), "a-0012")}
    assert found == [stand_ins.get(key, key) for key in plain]
    assert not out & set(found)
    assert (loader.stats()["excluded"], loader.stats()["bad"]) == (6, 0)
    assert (
        check_resume(
            lambda topology, world: build_loader(
                config(Source(url, exclude=ids(tmp_path, 3, 8, 9, 10, 11, 19)), batch_size=topology.batch_size), world
            ),
            [Topology(4), Topology(6, 3)],
        )
        == found
    )
    opened = [open_source(source) for source in masked.sources]
    assert simulate(opened, masked).warnings[0].startswith("6 samples are excluded:")
    substitutions = parse_receipt(json.dumps(loader.receipt()).encode(), "receipt.json").substitutions
    substituted = {(bad.shard, bad.sample_index, bad.reason) for bad in substitutions}
    assert substituted == {(number // 4, number % 4, "excluded") for number in (3, 8, 9, 10, 11, 19)}


def test_a_mask_begins_and_grows_within_a_run_and_the_audit_proves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(tmp_path, "a", 20), make(tmp_path, "b", 30)

    def masked(*numbers: int) -> Any:
        exclude = ids(tmp_path, *numbers) if numbers else None
        return config(Source(a, weight=0.5, exclude=exclude), Source(b, weight=0.5), stop_at=30)

    run = Training()
    run.train(masked(), 3)
    assert not {"a-0002", "a-0005"} & set(run.train(masked(5, 2), 12))
    assert not {"a-0002", "a-0005", "a-0007"} & set(run.train(masked(5, 2, 7), 12, world_size=2))
    assert run.state is not None
    assert [held[:3] for held in run.state["masks"]] == [[0, 12, 2], [0, 58, 3]]
    for smaller in (masked(), masked(5), masked(2, 5, 7)):
        with pytest.raises(UsageError, match=r"excluded 3 keys of source 0 since position 58.*grows at its end"):
            run.train(smaller, 1)
    exclude = ids(tmp_path, 5, 2, 7)
    found = run.audited(exclude=exclude)
    assert found.is_exact()
    assert found.excluded == ((a, 12, 2), (a, 58, 3))
    assert found.totals_compared > 0
    with pytest.raises(UsageError, match=r"first 2 keys of .*a differ"):
        run.audited(exclude=ids(tmp_path, 2, 5, 7, name="other.txt"))
    assert "1 samples of" in run.audited(exclude=ids(tmp_path, 5, 2, 7, 9, name="more.txt")).problems[0]
    for number, receipt in enumerate(run.receipts):
        (tmp_path / f"{number}.json").write_text(json.dumps(receipt))
    names = [str(tmp_path / f"{number}.json") for number in range(len(run.receipts))]
    assert main(["audit", *names, "--exclude", exclude, "--quiet"]) == 0
    assert f"3 samples of {a}: compared with what was handed over from position 58 on" in capsys.readouterr().out


def test_the_audit_finds_what_was_handed_over_all_the_same(tmp_path: Path) -> None:
    url = make(tmp_path, "a", 20)
    exclude = ids(tmp_path, 5, 6)
    run = Training()
    run.train(config(Source(url, exclude=exclude)), 5)
    plain = Training()
    plain.train(config(Source(url)), 5)
    forged = plain.receipts[0] | {"masks": run.receipts[0]["masks"]}
    found = audit([parse_receipt(json.dumps(forged).encode(), "forged.json")], exclude=exclude)
    assert not found.is_exact()
    assert len(found.problems) == 2
    assert "epoch 0 handed over" in found.problems[0]
    assert "which is excluded" in found.problems[0]
    stand_in = run.receipts[0] | {
        "substitutions": [bad | {"substitute_index": bad["sample_index"]} for bad in run.receipts[0]["substitutions"]]
    }
    assert len(audit([parse_receipt(json.dumps(stand_in).encode(), "x.json")], exclude=exclude).problems) == 2
    with pytest.raises(UsageError, match="positions only"):
        audit([parse_receipt(json.dumps(forged).encode(), "x.json")], exclude=exclude, quick=True)


def test_a_stand_in_that_can_not_be_read_is_an_error_or_replaced_itself(tmp_path: Path) -> None:
    url = make(tmp_path, "a", 8)
    shard = sorted(Path(url).glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    at = data.index(b"document 2")
    data[at - 30 : at] = b"{" * 30  # the json of sample 2
    shard.write_bytes(data)
    exclude = ids(tmp_path, 1)
    with pytest.raises(FormatError, match="sample 2 at byte"):
        list(build_loader(config(Source(url, exclude=exclude)), World()))
    loader = build_loader(config(Source(url, exclude=exclude), on_error="substitute", max_bad=1), World())
    keys = [key for batch in loader for key in batch["__key__"]]
    assert sorted(keys) == [f"a-{number:04d}" for number in (0, 3, 3, 3, 4, 5, 6, 7)]
    with pytest.raises(DataError, match=r"1 unreadable samples, max_bad=0: \{'"):
        list(build_loader(config(Source(url, exclude=exclude), on_error="substitute", max_bad=0), World()))


def test_keys_are_found_by_bisection_or_by_a_look_at_all_and_what_is_missing_is_said(tmp_path: Path) -> None:
    url = make(tmp_path, "a", 300, 60)
    store = open_store(url)
    manifest = parse_manifest(store.read("manifest.json"), "m")
    (tmp_path / "ids.txt").write_text("a-0007\n\nother\ta-0001\nmine\ta-0299\r\na-0007\n")
    mask = read_mask(str(tmp_path / "ids.txt"), store, manifest, {"mine"})
    assert list(mask.ids) == ["a-0007", "a-0299"]
    assert mask.rows(2).tolist() == [7, (4 << 32) + 59]
    with pytest.warns(UserWarning, match="1 of 2 keys of .* are not in .*a: nobody"):
        read_mask(_write(tmp_path, "nobody\na-0100\n"), store, manifest, ())
    with pytest.raises(UsageError, match="excludes all 300 samples"):
        read_mask(ids(tmp_path, *range(300)), store, manifest, ())
    with pytest.raises(UsageError, match="exclude=7 is a int, expected a string"):
        Source(url, exclude=7)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        read_mask(str(tmp_path / "absent.txt"), store, manifest, ())


@pytest.mark.parametrize(
    "line", ["mine\ta-0003", "URL/\ta-0003", "file://URL\ta-0003", "\ufeffa-0003\r", "other\tx\nmine\ta-0003"]
)
def test_a_key_holds_however_its_line_is_written_and_the_audit_knows_it(tmp_path: Path, line: str) -> None:
    url = make(tmp_path, "a", 20)
    exclude = _write(tmp_path, line.replace("URL", url) + "\n")
    run = Training()
    assert "a-0003" not in run.train(config(Source(url, name="mine", exclude=exclude)), 5)
    assert run.audited(exclude=exclude).excluded == ((url, 0, 1),)
    Path(exclude).write_bytes("a-0003\n".encode("utf-16"))
    with pytest.raises(UsageError, match="line 1: expected KEY, or DATASET<tab>KEY, in UTF-8"):
        build_loader(config(Source(url, exclude=exclude)), World())


def test_all_samples_of_a_key_that_third_party_tars_repeat_are_excluded(tmp_path: Path) -> None:
    for number in range(3):
        members = [(f"{key}.txt", f"{key} of {number}".encode()) for key in "abcd"]
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(members))
    assert main(["index", str(tmp_path)]) == 0
    exclude = _write(tmp_path, "c\nnobody\nb\n")
    run = Training()
    with pytest.warns(UserWarning, match="1 of 3 keys"):
        keys = run.train(config(Source(str(tmp_path), exclude=exclude)), 3)
    assert set(keys) == {"a", "d"}
    with pytest.warns(UserWarning, match="1 of 3 keys"):
        assert run.audited(exclude=exclude).excluded == ((str(tmp_path), 0, 6),)


def test_a_file_that_names_other_datasets_only_is_said(tmp_path: Path) -> None:
    url = make(tmp_path, "a", 8)
    with pytest.warns(UserWarning, match="excludes nothing of .*: all its lines are of other datasets, such as other"):
        build_loader(config(Source(url, exclude=_write(tmp_path, "other\ta-0001\n"))), World())


def test_a_dataset_that_is_almost_called_like_the_source_is_said(tmp_path: Path) -> None:
    url = make(tmp_path, "laion", 8)
    lines = f"{url}\tlaion-0001\n{url}n\tlaion-0002\nother\tb\n"
    with pytest.warns(UserWarning, match="lines of .*/laionn are passed over, which is much like .*/laion: a misspelling"):
        build_loader(config(Source(url, exclude=_write(tmp_path, lines))), World())


def _write(folder: Path, text: str) -> str:
    (folder / "some.txt").write_text(text)
    return str(folder / "some.txt")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_what_stands_in_is_the_next_that_is_allowed(samples: list[int], data: st.DataObject) -> None:
    rows = [(shard, index) for shard, count in enumerate(samples) for index in range(count)]
    chosen = data.draw(st.sets(st.sampled_from(rows), max_size=len(rows) - 1)) if rows else set()
    codes = np.array([(shard << 32) + index for shard, index in chosen], np.int64)
    mask = Mask([str(code) for code in codes], codes, np.array(samples))
    for shard, index in chosen:
        own = [(shard, (index + step) % samples[shard]) for step in range(1, samples[shard])]
        others = [(shard + step) % len(samples) for step in range(1, len(samples))]
        following = [own, *([(number, at) for at in range(samples[number])] for number in others)]
        allowed = [[row for row in group if row not in chosen] for group in following]
        assert list(mask.after(shard, index)) == next(group for group in allowed if group)

"""wds-tools at and seen: the batch of a step, and the steps of a sample, from a file that a run saved."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from factory import image_sample, make_dataset, text_sample
from tokens import PROVENANCE, write_tokenizer
from viewer import CODES, small_codes

from loaders import LoaderConfig, Source, World, build_loader
from wds_tools.cli.main import main
from wds_tools.pack.rows import PackConfig, pack

HOSTILE = "<script>alert(1)</script>"


def run_of(folder: Path, *sources: Source, steps: int = 3, **settings: Any) -> tuple[str, list[list[str]]]:
    """A state after some steps of two ranks, and the keys of each step."""
    config = LoaderConfig(sources=sources, **{"batch_size": 4, **settings})
    loaders = [build_loader(config, World(rank=rank, world_size=2)) for rank in range(2)]
    batches = [[batch["__key__"] for batch in islice(loader, steps)] for loader in loaders]
    (folder / "state.json").write_text(json.dumps(loaders[0].state_dict()))
    return str(folder / "state.json"), [[*first, *second] for first, second in zip(*batches, strict=True)]


def asked(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> Any:
    capsys.readouterr()
    assert main([*args, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_at_says_keys_texts_sources_and_damage_and_seen_finds_the_step_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [text_sample(n)._replace(provenance={"source": "web.jsonl", "line": n + 1}) for n in range(20)]
    make_dataset(tmp_path / "text", samples, shard_samples=6)
    state, steps = run_of(tmp_path, Source(str(tmp_path / "text"), name="web"))
    found = asked(capsys, "at", state, "--step", "1")
    assert [sample["key"] for sample in found["samples"]] == steps[1]
    assert [sample["rank"] for sample in found["samples"]] == [0, 0, 1, 1]
    for sample in found["samples"]:
        number = int(sample["key"][-8:])
        assert (sample["source"], sample["text"]) == ("web", f"document {number}")
        assert (sample["shard"], sample["sample_index"]) == (f"shard-000000-{number // 6:04d}.tar", number % 6)
        assert sample["provenance"] == {"source": "web.jsonl", "line": str(number + 1)}
        assert sample["intact"]
    assert (found["epoch"], found["position"], found["is_to_come"], found["world_size"]) == (0, 4, False, 2)
    assert [one["key"] for one in asked(capsys, "at", state, "--step", "1", "--rank", "1")["samples"]] == steps[1][2:]
    key = steps[2][3]
    (one,) = asked(capsys, "seen", key, "--state", state)["samples"]
    assert one["seen"] == [{"sample": 0, "epoch": 0, "step": 2, "rank": 1, "world_size": 2}]
    shard = tmp_path / "text" / one["shard"]
    shard.write_bytes(shard.read_bytes().replace(b"document", b"d0cument"))
    moved = (tmp_path / "text").rename(tmp_path / "moved")
    assert main(["at", state, "--step", "2"]) == 1
    assert "say where with --source" in capsys.readouterr().err
    assert main(["at", state, "--step", "2", "--source", str(moved)]) == 0
    assert "its bytes are damaged" in capsys.readouterr().out


def test_a_save_is_asked_as_its_state_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "text", map(text_sample, range(8)))
    loader = build_loader(LoaderConfig(sources=(Source(str(tmp_path / "text")),), batch_size=2), World())
    keys = next(iter(loader))["__key__"]
    loader.save(tmp_path / "run")
    save = str(tmp_path / "run/loader-000001.json")
    assert [sample["key"] for sample in asked(capsys, "at", save, "--step", "0")["samples"]] == keys
    (one,) = asked(capsys, "seen", keys[1], "--state", save)["samples"]
    assert one["seen"][0]["step"] == 0


def test_keys_that_several_datasets_have_need_their_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        make_dataset(tmp_path / name, map(text_sample, range(8)), shard_samples=3)
    a, b = (Source(str(tmp_path / name), weight=0.5) for name in "ab")
    state, _ = run_of(tmp_path, a, b, steps=6)
    assert main(["seen", "text-00000003", "--state", state]) == 2
    assert "keys are of several inputs" in capsys.readouterr().err
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{b.url}\ttext-00000003\n{a.url}\ttext-00000001\n")
    found = asked(capsys, "seen", "--keys", str(keys), "--state", state)["samples"]
    assert [(one["source"], one["key"]) for one in found] == [(a.url, "text-00000001"), (b.url, "text-00000003")]
    for one in found:
        for seen in one["seen"]:
            batch = asked(capsys, "at", state, "--step", str(seen["step"]), "--rank", str(seen["rank"]))["samples"]
            assert (one["source"], one["key"]) in [(sample["source"], sample["key"]) for sample in batch]
    keys.write_text(f"c\ttext-00000003\n{a.url}\tnone\n{b.url}\ttext-00000002\n")
    assert main(["seen", "--keys", str(keys), "--state", state]) == 1
    said = capsys.readouterr()
    assert "1 line is of other datasets, such as c" in said.err
    assert "1 key is of no sample, such as none" in said.err
    assert f"text-00000002 of {b.url}" in said.out
    assert main(["seen", "none", "--state", state]) == 1
    assert capsys.readouterr() == ("", "wds-tools: seen: 1 key is of no sample, such as none\n")
    assert main(["seen", "--state", state]) == 2


def test_the_page_shows_texts_as_text_and_codes_where_no_tokenizer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "pairs", (image_sample(n)._replace(text=f"{HOSTILE} {n}") for n in range(12)), shard_samples=5)
    state, steps = run_of(tmp_path, Source(str(tmp_path / "pairs")))
    page = tmp_path / "batch.html"
    assert main(["at", state, "--step", "0", "--html", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    html = page.read_text()
    assert "<script" not in html
    assert html.count("data:image/png;base64,iVBOR") == 4
    assert "does not say which tokenizer" in html
    assert all(key in html for key in steps[0])
    assert main(["at", state, "--step", "0", "--html", str(tmp_path / "pairs" / "batch.html")]) == 2


@pytest.mark.slow
def test_the_page_has_the_pictures_that_the_codes_decode_to(tmp_path: Path) -> None:
    make_dataset(tmp_path / "pairs", (small_codes(image_sample(n)) for n in range(8)), codes=CODES)
    state, _ = run_of(tmp_path, Source(str(tmp_path / "pairs")), steps=2, batch_size=2)
    page = tmp_path / "batch.html"
    assert main(["at", state, "--step", "1", "--html", str(page), "--device", "cpu"]) == 0
    assert page.read_text().count("<figcaption></figcaption>") == 2  # no reason why one could not be decoded


@pytest.mark.slow
def test_rows_packed_ahead_are_asked_about_with_texts_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    make_dataset(tmp_path / "pairs", (image_sample(n) for n in range(30)), codes=PROVENANCE)
    given = {"input": (str(tmp_path / "pairs"),), "max_length": 64, "output": str(tmp_path / "rows"), "quiet": True}
    pack(PackConfig(**given, tokenizer=str(tmp_path / "tokenizer"), shard_samples=5))
    state, steps = run_of(tmp_path, Source(str(tmp_path / "rows")), steps=2, batch_size=2)
    args = ("at", state, "--step", "1", "--text-tokenizer", str(tmp_path / "tokenizer"))
    found = asked(capsys, *args, "--html", str(tmp_path / "batch.html"))
    assert [sample["key"] for sample in found["samples"]] == steps[1]
    assert "caption" in (tmp_path / "batch.html").read_text()
    (one,) = asked(capsys, "seen", steps[1][0], "--state", state)["samples"]
    assert {seen["step"] for seen in one["seen"]} == {1}

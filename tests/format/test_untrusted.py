"""Documents that anybody may have written: whatever stands in them, a reader gives a value or an error of this project.

Each reader gets a valid document with some changes: types swapped, fields removed, numbers huge, nesting deep.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pytest
import torch
from factory import image_sample, make_dataset, text_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import LoaderConfig, ShardDataset, Source, build_loader
from loaders.order.samples import OpenSource, SampleOrder, order_spec
from loaders.proof.audit import audit
from loaders.proof.receipt import parse_receipt
from loaders.tokens.lanes import parse_lanes
from wds_tools.check.stats.describe import StatsConfig, stats
from wds_tools.check.stats.report import render
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.main import main
from wds_tools.cli.summary import print_dataset
from wds_tools.dataset import lease
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.errors import FormatError, Reject, UsageError, WdsToolsError
from wds_tools.format.index import parse_index, serialize_index
from wds_tools.format.manifest import ShardInfo, parse_manifest
from wds_tools.format.shard import ShardBuilder
from wds_tools.format.typed_json import MAX_DEPTH, Count, read_json, shape
from wds_tools.jobs.finalize import FinalizeConfig, finalize
from wds_tools.sequences.prompts import read_prompts
from wds_tools.sequences.tokenizer import _special_names
from wds_tools.sources.tables import saved_files
from wds_tools.storage import open_store
from wds_tools.terminal import say
from wds_tools.view.rejects import Rejects
from wds_tools.vq.huggingface import _scaled, _weight_files

Read = Callable[[bytes], object]


def nested(depth: int) -> Any:
    """Lists and objects in one another."""
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"source": value}
    return value


ODD = [
    *(None, True, -1, 0, 1, 1.5, 1 << 31, 1 << 40, 1 << 52, 1 << 53, (1 << 64) - 1, 1e300, -1e300),
    *("", "x", "\0", "\x1b[31m\n", "1" * 5000, [], {}, [[]], [1, "x"], {"x": 1}, [{}], [None] * 3),
    *(nested(depth) for depth in (3, MAX_DEPTH + 1, 240, 900)),
]


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> bytes:
    """The document with one to three changes, or what is no document at all."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if change == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif change == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[f"{key}x"] = copy.deepcopy(holder[key])
    return json.dumps(changed).encode()


def _places(value: Any, depth: int = 0) -> Any:
    if depth > 8:
        return
    for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
        yield value, key
        yield from _places(value[key], depth + 1)


NO_DOCUMENTS = [b"", b"null", b"[]", b"1", b'"x"', b"{", b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 5000, b'{"a":' * 5000]


class Pair(NamedTuple):
    name: str
    number: Count


def test_a_named_tuple_is_the_list_of_its_fields() -> None:
    assert read_json(Pair, b'["a", 3]', "p: odd") == Pair("a", 3)
    for data in (b'["a"]', b'["a", -1]', b'[3, "a"]', b'{"name": "a", "number": 3}'):
        with pytest.raises(FormatError, match=r"^p: odd \("):
            read_json(Pair, data, "p: odd")


def check(document: Any, read: Read, examples: int = 60) -> None:
    """The document is read; what is no document and any change is read, or an error of this project."""
    read(json.dumps(document).encode())
    for data in NO_DOCUMENTS:
        with pytest.raises(WdsToolsError):
            read(data)

    @given(mutated(document))
    @settings(max_examples=examples, deadline=None, database=None)
    def fuzz(data: bytes) -> None:
        try:
            read(data)
        except WdsToolsError:
            pass

    fuzz()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 24 samples in three shards."""
    path = tmp_path_factory.mktemp("untrusted") / "set"
    codes = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": 8192, "stride": 16, "weights_hash": "x", "precision": "fp32"}}
    make_dataset(path, map(image_sample, range(24)), shard_samples=8, codes=codes)
    return path


# --- The reader ----------------------------------------------------------------------------------------------------


def test_a_message_names_the_document_the_field_the_value_and_what_was_expected() -> None:
    row = {"name": "a.tar", "samples": 1, "bytes": 512, "xxh128": "0" * 32, "members": ["json"], "data_types": {}}
    for name, value, message in (
        ("samples", "many", "m: odd (samples is 'many', expected a whole number from 0 to 4294967295)"),
        ("members", ["json", 5], "m: odd (members[1] is 5, expected text)"),
        ("data_types", {"image_text": 1.5}, "m: odd (data_types.image_text is 1.5, expected a whole number"),
        ("text_chars", None, "m: odd (text_chars is None, expected a whole number"),
    ):
        with pytest.raises(FormatError) as failure:
            shape(ShardInfo, {**row, "text_chars": 1, "num_codes": 1, name: value}, "m: odd")
        assert str(failure.value).startswith(message)
    with pytest.raises(FormatError, match=r"m: odd \(text_chars is missing\)"):
        shape(ShardInfo, row, "m: odd")


def test_depth_and_size_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = {"x": nested(MAX_DEPTH)}
    assert read_json(dict[str, Any], json.dumps(deep), "m") == deep
    with pytest.raises(UsageError, match="nested deeper than 100 levels"):
        read_json(dict[str, Any], json.dumps({"x": nested(MAX_DEPTH + 1)}), "m", UsageError)
    monkeypatch.setattr("wds_tools.format.typed_json.MAX_BYTES", 10)
    with pytest.raises(FormatError, match="it has 11 bytes, at most 10 are read"):
        read_json(dict[str, Any], b'{"a": 1234}', "m")


# --- All readers ---------------------------------------------------------------------------------------------------


def test_manifests(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_bytes())
    del document["manifest_hash"], document["rejects_hash"]
    document["source"] |= {"input": {"url": "a", "source": {"input": {}}}, "counts": {"tokens": 1}, "inputs": [{"url": "a"}]}
    described = stats(StatsConfig(input=str(folder), quiet=True))

    def read(data: bytes) -> None:
        manifest = parse_manifest(data)
        print_dataset("set", manifest)
        render(described.__class__(**{**vars(described), "manifest": manifest}))
        source = Source("set")
        opened = OpenSource(source, open_store("memory://set"), manifest)
        if manifest.bytes < 1 << 30:  # larger ones are planned too, but not within a test
            SampleOrder([opened], order_spec([opened], LoaderConfig(sources=(source,), batch_size=4))).locate(0, np.arange(1))

    check(document, read)


def test_working_files() -> None:
    store = open_store("memory://working")
    Output(store, OutputSpec(num_tasks=1, source={"command": "test"}), overwrite=True).begin()
    with TaskWriter(store, 0, ShardLimits()) as writer:
        writer.add(text_sample(1))
        writer.reject(Reject("bad_json", "x"), source="a", line=2)
        writer.finish(2)
    files = {name: bytes(store.read(name)) for name in ("_work/plan.json", "_work/task-000000.json")}
    for name, data in files.items():

        def read(data: bytes, name: str = name) -> None:
            store.delete("manifest.json")
            for other, valid in files.items():
                store.put(other, data if other == name else valid)
            finalize(FinalizeConfig(output=store.url, max_rejects="100%"))

        check(json.loads(data), read, 40)


def test_leases() -> None:
    facts = {"host": "a", "pid": 1, "process": ["boot", "pid:[1]", "5"], "since": "2026", "beats": 3}

    @given(mutated(facts) | st.sampled_from(NO_DOCUMENTS))
    @settings(max_examples=100, deadline=None, database=None)
    def fuzz(data: bytes) -> None:
        assert lease._lives(data) in (None, False, True)
        assert lease._who(data).startswith("process ")

    fuzz()


def test_indices() -> None:
    builder = ShardBuilder()
    for number in range(3):
        builder.add(image_sample(number))
    packed = serialize_index(builder.finish("a.tar")[1])
    begin = 8 + int.from_bytes(packed[:8], "little")
    head = json.loads(packed[8:begin])
    metadata = json.loads(head["__metadata__"]["wds_tools_index"])

    def read(data: bytes) -> None:
        parse_index(len(data).to_bytes(8, "little") + data + packed[begin:])

    def read_metadata(data: bytes) -> None:
        own = {"wds_tools_index": data.decode(errors="replace")}
        read(json.dumps({**head, "__metadata__": own}).encode())

    check(head, read)
    check(metadata, read_metadata)


def parsed(data: bytes) -> Any:
    """What a checkpoint would hold."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return data


def test_states(folder: Path) -> None:
    loader = build_loader(LoaderConfig(sources=(Source(str(folder)),), batch_size=4))
    next(iter(loader))
    check(loader.state_dict(), lambda data: loader.load_state_dict(parsed(data)))
    dataset = ShardDataset(str(folder))
    check(dataset.state_dict(), lambda data: dataset.load_state_dict(parsed(data)), 20)
    lanes = [[0, [1, 2, [[0, 5], [1, 6]]]], [3, [2, 2, []]]]

    def read_lanes(data: bytes) -> None:
        document = parsed(data)
        parse_lanes(document.get("lanes") if isinstance(document, dict) else None, 8, 0)

    check({"lanes": lanes}, read_lanes)


def test_a_state_may_hold_numbers_that_no_json_has(folder: Path) -> None:
    loader = build_loader(LoaderConfig(sources=(Source(str(folder)),), batch_size=4))
    state = loader.state_dict()
    big = {"generations": [{"spec": {"length": 10**5000}}]}
    for change in ({"position": 10**5000}, {"version": 10**5000}, big, {"generations": [{"sources": [{1: 2}]}]}):
        with pytest.raises(UsageError, match=r"^not the state of a loader"):
            loader.load_state_dict({**state, **change})


def test_the_state_behind_an_epoch_that_was_filled_up_goes_on_with_the_next(folder: Path) -> None:
    settings: dict[str, Any] = {"rank": 0, "world_size": 5, "last_batch": "wrap"}
    dataset = ShardDataset(str(folder), **settings)
    assert len(list(dataset)) == 5
    dataset.load_state_dict(dataset.state_dict())
    following = ShardDataset(str(folder), epoch=1, **settings)
    assert [sample["__key__"] for sample in dataset] == [sample["__key__"] for sample in following]


def test_receipts(folder: Path) -> None:
    loader = build_loader(LoaderConfig(sources=(Source(str(folder)),), batch_size=4))
    for _ in loader:
        pass
    document = loader.receipt()
    document["substitutions"] = [{"epoch": 0, "source": 0, "shard": 1, "sample_index": 3, "reason": "crc32"}]
    valid = parse_receipt(json.dumps(loader.receipt()).encode(), "valid")

    def read(data: bytes) -> None:
        receipt = parse_receipt(data, "receipt")
        if (
            sum(high - low for _, low, high, _ in receipt.spans) < 10_000
            and max((span[0] for span in receipt.spans), default=0) < 9
        ):
            asdict(audit([receipt]))
            audit([valid, receipt], complete=True)

    check(document, read)


def test_exports(tmp_path: Path) -> None:
    state = {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": None, "_split": "train"}

    def read_as(name: str) -> Read:
        def read(data: bytes) -> None:
            (tmp_path / name).write_bytes(data)
            list(saved_files(str(tmp_path), {path.name: path.stat().st_size for path in tmp_path.iterdir()}))

        return read

    (tmp_path / "a.arrow").write_bytes(b"")
    check(state, read_as("state.json"))
    with pytest.raises(UsageError, match="holds the splits train, test"):
        read_as("dataset_dict.json")(b'{"splits": ["train", "test"]}')

    @given(mutated({"splits": ["train", "test"]}))
    @settings(max_examples=30, deadline=None, database=None)
    def fuzz(data: bytes) -> None:
        with pytest.raises(WdsToolsError):
            read_as("dataset_dict.json")(data)

    fuzz()


def test_tokenizer_folders_and_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")

    def read_as(name: str, then: Callable[[Path], object]) -> Read:
        def read(data: bytes) -> None:
            (tmp_path / name).write_bytes(data)
            then(tmp_path)

        return read

    prompts = {"draw": ["\nPaint."], "size": "{width} x {height}", "human": ["User: ", "\n"]}
    check(prompts, read_as("prompts.json", lambda path: read_prompts(str(path / "prompts.json"))))
    check({"bos_token": "<s>", "eos_token": {"content": "</s>"}}, read_as("tokenizer_config.json", _special_names))

    def scaled(folder: Path) -> object:
        return _scaled(torch.nn.Identity(), folder / "preprocessor_config.json")

    check({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, read_as("preprocessor_config.json", scaled))
    check({"weight_map": {"a": "a.safetensors"}}, read_as("model.safetensors.index.json", _weight_files))


def test_lines_of_rejects(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [text_sample(1)])
    store = open_store(str(tmp_path / "set"))
    line = {"source": "a.jsonl", "line": 5, "reason": "bad_json", "detail": "no JSON"}

    @given(st.lists(mutated(line) | st.sampled_from(NO_DOCUMENTS), min_size=1, max_size=4))
    @settings(max_examples=60, deadline=None, database=None)
    def fuzz(lines: list[bytes]) -> None:
        store.put("rejects/task-000000.jsonl", b"\n".join(lines) + b"\n")
        assert orjson.dumps(Rejects(store).read("", 0, 0, 10))
        assert any("rejects/" in problem for problem in verify(VerifyConfig(input=store.url, quiet=True)).problems)

    fuzz()


@given(st.lists(st.text() | st.sampled_from(["\x1b[2J", "\x9b1m", "a\nb", "\u202egnp.exe", "\ud800", "ä 猫"])))
def test_no_line_that_is_said_acts_on_a_terminal(lines: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        say("first", *lines)
    said = out.getvalue().removesuffix("\n").split("\n")
    assert len(said) == len(lines) + 1
    assert all(line.isprintable() for line in said)


# --- The whole way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", ["1e18", "1e300", "inf", "nan", "0", "-5", "1e15"])
def test_impossible_numbers_of_samples_are_refused_in_a_sentence(samples: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--samples", samples, "--batch-size", "64"]) == 2
    assert re.fullmatch(r"wds-tools: .* samples .*\n", capsys.readouterr().err)

"""`stats` counts what is there: against plain Python over the same samples, on any number of processes, in its three outputs."""

from __future__ import annotations

import json
import math
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from commands import last_line, wds_tools
from factory import CODEBOOK_SIZE, image_sample, make_dataset, multi_sample, text_sample
from hypothesis import given
from hypothesis import strategies as st
from memory import grown_mb

from wds_tools.check.stats.describe import Stats, StatsConfig, sample_stats, stats
from wds_tools.check.stats.duplicates import HashSet
from wds_tools.check.stats.histogram import Histogram, bins_of, edges
from wds_tools.check.stats.report import render, to_json
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import SampleReader
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store

CODES = {
    column: {"codebook_size": CODEBOOK_SIZE, "tokenizer": "test", "precision": "fp32"}
    for column in ("vqcode_512", "vqcode_multi768")
}


def conversation(number: int) -> Sample:
    turns = [{"from": "human", "value": f"<image>what is it? {number}"}, {"from": "gpt", "value": "a cat"}]
    return Sample(key=f"talk-{number:08d}", data_type="visual_sft", text="", conversations=turns)


def mixed() -> list[Sample]:
    return [
        *(image_sample(number) for number in range(40)),
        *(image_sample(number)._replace(key=f"twin-{number:08d}") for number in range(10)),
        *(multi_sample(number) for number in range(20)),
        *(text_sample(number, "x" * (number * 37 % 900 + 1)) for number in range(30)),
        *(conversation(number) for number in range(5)),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats") / "set"
    make_dataset(folder, mixed(), shard_samples=25, codes=CODES)
    return folder


def described(folder: Path, **settings: int) -> Stats:
    return stats(StatsConfig(input=str(folder), quiet=True, **settings))


def chars_of(sample: Sample) -> int:
    return len(sample.text) + sum(len(turn["value"]) for turn in sample.conversations or ())


def test_lengths_types_grids_and_turns_are_those_of_the_samples(folder: Path) -> None:
    samples, found = mixed(), to_json(described(folder))
    chars = [chars_of(sample) for sample in samples]
    assert (found["samples"], found["counted"]) == (105, 105)
    assert found["text_chars"]["count"] == len(chars)
    assert (found["text_chars"]["least"], found["text_chars"]["most"]) == (min(chars), max(chars))
    assert found["text_chars"]["mean"] == pytest.approx(sum(chars) / len(chars))
    assert found["data_types"] == {"image_text": 50, "image_text_multi": 20, "text_pretrain": 30, "visual_sft": 5}
    assert found["grids"] == {"4 x 4": 50, "2 x 6": 20}
    assert (found["turns"]["count"], found["turns"]["least"], found["turns"]["most"]) == (5, 2, 2)


def test_codebook_use_and_entropy_are_those_of_the_codes(folder: Path) -> None:
    counts = Counter(int(code) for sample in mixed() for code in sample.codes.get("vqcode_512", np.zeros(0)).ravel())
    total = counts.total()
    entropy = -sum(count / total * math.log2(count / total) for count in counts.values())
    found = to_json(described(folder))["codes"]["vqcode_512"]
    assert (found["codes"], found["used"], found["codebook_size"]) == (total, len(counts), CODEBOOK_SIZE)
    assert found["entropy_bits"] == pytest.approx(entropy)
    assert found["perplexity"] == pytest.approx(2**entropy)
    assert dict(found["most_frequent"]).items() <= counts.items()


def test_duplicates_are_found_by_text_and_by_codes(folder: Path) -> None:
    found = described(folder)
    texts = Counter(sample.text or str(sample.conversations) for sample in mixed())
    assert found.text_repeats.extra == sum(count - 1 for count in texts.values())
    assert (found.text_repeats.samples, found.text_repeats.share_kept) == (105, 1.0)
    assert (found.code_repeats.extra, found.code_repeats.groups, found.code_repeats.samples) == (10, 10, 70)
    assert found.largest["codes"][0][:2] == (2, "image-00000000")


def test_the_result_is_the_same_on_any_number_of_processes(folder: Path) -> None:
    assert to_json(described(folder)) == to_json(described(folder, workers=2))


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=200), st.integers(1, 199))
def test_histograms_add_up_and_quantiles_are_within_a_sixteenth(values: list[int], cut: int) -> None:
    whole, left, right = Histogram(), Histogram(), Histogram()
    whole.add(values)
    left.add(values[:cut])
    right.add(values[cut:])
    left.merge(right)
    assert left.bars() == whole.bars()
    assert (left.least, left.most, left.mean) == (min(values), max(values), sum(values) / len(values))
    ordered = sorted(values)
    for share in (0.05, 0.5, 0.95):
        exact = ordered[max(math.ceil(share * len(values)) - 1, 0)]
        assert abs(whole.quantile(share) - exact) <= exact / 16


@given(st.integers(0, (1 << 53) - 1))
def test_every_value_lies_in_its_bin(value: int) -> None:
    low, high = edges(int(bins_of(np.array([value]))[0]))
    assert low <= value < high


@given(st.lists(st.integers(0, 30), max_size=120), st.randoms(use_true_random=False))
def test_repeats_do_not_depend_on_order_and_are_exact_within_the_limit(contents: list[int], random: object) -> None:
    hashes = np.array([content * 0x9E3779B97F4A7C15 % (1 << 64) for content in contents], np.uint64)
    whole, parts = HashSet(limit=1000), HashSet(limit=1000)
    whole.add(hashes, np.arange(len(hashes)))
    for at in reversed(range(len(hashes))):
        parts.add(hashes[at : at + 1], np.array([at]))
    counts = Counter(contents)
    assert whole.repeats() == parts.repeats()
    assert whole.repeats().extra == sum(count - 1 for count in counts.values())
    assert whole.repeats().groups == sum(count > 1 for count in counts.values())


def test_above_the_limit_shares_are_estimated_from_whole_groups() -> None:
    generator = np.random.default_rng(7)
    contents = generator.integers(0, 1 << 64, 60_000, np.uint64)
    hashes = np.concatenate([contents, contents[:20_000], contents[:20_000]])  # a third of the contents three times
    found = HashSet(limit=10_000)
    for at in range(0, len(hashes), 7_000):
        found.add(hashes[at : at + 7_000], np.arange(at, min(at + 7_000, len(hashes))))
    repeats = found.repeats()
    assert repeats.samples <= 10_000
    assert repeats.share_kept == 1 / 16
    assert repeats.share == pytest.approx(0.4, abs=0.02)
    assert {copies for copies, _ in repeats.largest} == {3}


def test_a_shard_of_other_texts_and_codes_stands_out(tmp_path: Path) -> None:
    def odd(number: int) -> Sample:
        codes = {"vqcode_512": (np.arange(256).reshape(16, 16) * 64 % CODEBOOK_SIZE).astype("<u2")}
        return image_sample(number)._replace(text="y" * 3000, codes=codes)

    plain = (image_sample(number, side=16)._replace(text="z" * (20 + number % 7)) for number in range(400))
    make_dataset(tmp_path / "set", [*plain, *(odd(number) for number in range(400, 500))], shard_samples=100, codes=CODES)
    found = described(tmp_path / "set")
    assert [shard.is_odd for shard in found.shards] == [False, False, False, False, True]
    assert found.shards[4].text_distance > 0.7
    assert found.shards[4].code_distance > 0.7
    assert max(shard.code_distance for shard in found.shards[:4]) < 0.25


def test_a_glance_reads_a_part_and_says_so(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", (text_sample(number) for number in range(500)), shard_samples=100)
    store = open_store(str(tmp_path / "set"))
    reader = SampleReader(store, read_manifest(store))
    found = sample_stats("here", reader, blocks=4, block_samples=20)
    reader.close()
    assert found.count.samples == 80
    assert "From 80 of 500 samples" in render(found)


class _Page(HTMLParser):
    """What a browser would fetch or run, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_that_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    samples = [image_sample(number)._replace(text=hostile) for number in range(60)]
    provenance = {"vqcode_512": {**CODES["vqcode_512"], "tokenizer": "</pre><script>alert(3)</script>"}}
    make_dataset(tmp_path / "set", samples, shard_samples=20, codes=provenance)
    report = tmp_path / "report.html"
    said = wds_tools("stats", tmp_path / "set", "--html", report)
    page = _Page()
    page.feed(report.read_text())
    assert page.tags["script"] == 0
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert hostile in page.text
    assert page.tags["svg"] >= 4
    assert last_line(said.stdout) == f"report: {report}"


@pytest.mark.slow
def test_the_table_and_json_say_the_same(folder: Path) -> None:
    table = wds_tools("stats", folder, "--quiet").stdout
    found = json.loads(wds_tools("stats", folder, "--json", "--quiet").stdout)
    use = found["codes"]["vqcode_512"]
    assert f"{use['used']:,} of 8,192 codes in use" in table
    assert f"entropy {use['entropy_bits']:.3f} bits" in table
    assert f"{found['duplicates']['codes']['extra']} of 70 samples repeat an earlier one" in table
    assert f"{found['text_chars']['most']:,}" in table


def test_an_empty_dataset_is_described(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [])
    found = described(tmp_path / "set")
    assert to_json(found)["counted"] == 0
    assert "All 0 samples" in render(found)
    assert "samples" in wds_tools("stats", tmp_path / "set").stdout


def test_wrong_settings_and_lost_parts_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--hashes 10"):
        StatsConfig(input="x", hashes=10)
    with pytest.raises(NotFound, match="no such folder"):
        described(tmp_path)
    make_dataset(tmp_path / "set", [image_sample(1)], codes={"vqcode_512": {"codebook_size": 16}})
    with pytest.raises(FormatError, match="the codebook has 16 entries"):
        described(tmp_path / "set")
    next((tmp_path / "set").glob("*.index")).unlink()
    with pytest.raises(NotFound, match="wds-tools index"):
        described(tmp_path / "set")


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    text = "words " * 2000
    for name, count in (("small", 500), ("large", 5000)):  # 6 MB and 60 MB, in one shard each
        make_dataset(tmp_path / name, (text_sample(number, text + str(number)) for number in range(count)))
    setup = "from wds_tools.check.stats.describe import StatsConfig, stats"
    grown = {name: grown_mb(setup, f"stats(StatsConfig(input={str(tmp_path / name)!r}))") for name in ("small", "large")}
    assert grown["large"] < grown["small"] + 40

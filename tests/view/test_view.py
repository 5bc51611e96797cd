"""The viewer over HTTP: it says what the samples say, reads only what it shows, and gives nothing to those it is not for."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import tarfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import image_bytes, last_line, read_rejects, read_samples, session, start, wait_until, wds_tools
from factory import CODEBOOK_SIZE, image_sample, make_dataset, text_sample
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from properties import tries
from s3 import S3Server
from viewer import CODES, HOSTILE, TINY, ask, conversation, fetch, samples, serving, small_codes, write_set

from wds_tools.check.stats.describe import StatsConfig, stats
from wds_tools.check.stats.report import render
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import SampleReader
from wds_tools.errors import FormatError, NotFound, TokenizerError
from wds_tools.format.codes import join_grids
from wds_tools.format.manifest import serialize_manifest
from wds_tools.format.schema import Sample, SourceImage
from wds_tools.jobs.index_tars import index_tars
from wds_tools.storage import LocalStore, open_store
from wds_tools.view import browse, rejects
from wds_tools.view.filters import Tables
from wds_tools.view.pages import PagesConfig, Request
from wds_tools.view.server import IDLE_S, MAX_CONNECTIONS, ViewConfig, ViewServer
from wds_tools.vq import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("view") / "set")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ViewServer]:
    (folder.parent / "secret.txt").write_text("the secret")
    with serving(folder) as server:
        yield server


# ---- what it says ----


def test_pages_show_all_samples_in_order_across_shards(server: ViewServer) -> None:
    cards = [card for first in range(0, 70, 24) for card in ask(server, f"/api/samples?first={first}&count=24")["samples"]]
    expected = samples()
    assert [card["number"] for card in cards] == list(range(70))
    assert [card["key"] for card in cards] == [sample.key for sample in expected]
    assert [card["type"] for card in cards] == [sample.data_type for sample in expected]
    assert all(card["text"] == sample.text[:400] for card, sample in zip(cards, expected, strict=True) if sample.text)
    assert not any("problem" in card for card in cards)


def test_a_sample_is_shown_in_full(server: ViewServer) -> None:
    for number in (3, 7, 33, 41, 69):
        shown, sample = ask(server, f"/api/sample/{number}"), samples()[number]
        assert (shown["key"], shown["text"], shown["length"]) == (sample.key, sample.text, sample.length)
        assert shown["turns"] == (sample.conversations or [])
        assert shown["intact"] is True
        for column, grid_hw in sample.codes.items():
            (grid,) = [grid for grid in shown["grids"] if grid["column"] == column]
            assert (grid["height"], grid["width"]) == grid_hw.shape
            assert grid["codes"] == grid_hw.ravel().tolist()
    assert ask(server, "/api/sample/7")["provenance"] == {"url": "javascript:alert(3)", "deep": '{"a":[1]}'}


def test_the_dataset_is_described(server: ViewServer) -> None:
    found = ask(server, "/api/set")
    assert (found["samples"], found["inputs"], found["rejects"]) == (70, 82, {"bad_json": 8, "empty_text": 4})
    assert found["columns"] == ["vqcode_512", "vqcode_multi768"]


@pytest.mark.slow
def test_the_picture_is_what_the_tokenizer_makes_of_the_codes(server: ViewServer) -> None:
    tokenizer = load_tokenizer("tiny", device="cpu")
    for number, column in ((2, "vqcode_512"), (31, "vqcode_multi768")):
        codes = torch.from_numpy(samples()[number].codes[column].astype(np.int64))[None]
        expected = tokenizer.decode(codes)[0].numpy().astype(int)
        _, headers, body = fetch(server, f"/picture/{number}/{column}.png")
        found = np.asarray(Image.open(io.BytesIO(body))).astype(int)
        assert headers["Content-Type"] == "image/png"
        assert found.shape == expected.shape
        assert abs(found - expected).max() <= 1  # sums of another number of threads
        small = Image.open(io.BytesIO(fetch(server, f"/picture/{number}/{column}.png?small=1")[2]))
        assert small.size == (expected.shape[1] // 2, expected.shape[0] // 2)


def test_equal_codes_have_equal_colours_on_the_map(server: ViewServer) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(fetch(server, "/codes/2/vqcode_512.png")[2])))
    codes = samples()[2].codes["vqcode_512"]
    assert pixels.shape == (8, 8, 3)
    colours = {int(code): tuple(pixel) for code, pixel in zip(codes.ravel(), pixels.reshape(-1, 3).tolist(), strict=True)}
    assert all(colours[int(codes[y, x])] == tuple(pixels[y, x].tolist()) for y in range(8) for x in range(8))


def test_the_original_is_served_byte_for_byte(server: ViewServer) -> None:
    status, headers, body = fetch(server, "/image/4")
    assert (status, headers["Content-Type"], body) == (200, "image/jpeg", samples()[4].image)


def test_a_tiff_is_shown_as_png(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [image_sample(1)._replace(image=image_bytes(1, kind="TIFF"), image_extension="tif")])
    with serving(tmp_path / "set") as server:
        _, headers, body = fetch(server, "/image/0")
    assert headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(body)).size == (40, 32)


def test_how_often_codes_are_used_is_counted_over_the_set(server: ViewServer) -> None:
    found = ask(server, "/api/usage/2/vqcode_512")
    every = np.concatenate([sample.codes["vqcode_512"].ravel() for sample in samples() if "vqcode_512" in sample.codes])
    assert found["total"] == len(every)
    assert found["counts"] == [int((every == code).sum()) for code in samples()[2].codes["vqcode_512"].ravel()]


def test_the_statistics_page_is_the_report(server: ViewServer) -> None:
    status, headers, body = fetch(server, "/stats")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"All 70 samples" in body
    assert b"<style" not in body
    assert b"<script>" not in body
    assert b"<title>Statistics \xc2\xb7 set</title>" in body
    assert fetch(server, "/marks")[2].split(b"<header")[1].split(b"</header>")[0] in body  # one frame


def test_duplicates_in_the_statistics_lead_to_their_samples(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [text_sample(0), text_sample(1, HOSTILE), text_sample(2, HOSTILE)])
    with serving(tmp_path / "set") as server:
        body = fetch(server, "/stats")[2].decode()
    assert '<td>2</td><td><a href="/sample/1">text-00000001</a></td><td>&lt;script&gt;' in body
    assert "<a href" not in render(stats(StatsConfig(input=str(tmp_path / "set"), quiet=True)))  # a file leads nowhere


def test_text_tokens_are_counted_where_a_tokenizer_is_given(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "cat": 1, "[?]": 2}, unk_token="[?]"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    make_dataset(tmp_path / "set", [text_sample(0, "a cat, a dog")])
    with serving(tmp_path / "set", text_tokenizer=str(tmp_path / "tokenizer.json")) as server:
        assert ask(server, "/api/sample/0")["tokens"] == 5
    with pytest.raises(TokenizerError, match=r"manifest\.json"):
        ViewServer(ViewConfig(input=str(tmp_path / "set"), port=0, text_tokenizer=str(tmp_path / "set" / "manifest.json")))


def test_rejects_come_in_order_and_by_reason(server: ViewServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [reject["detail"] for reject in read_rejects(folder)]
    assert [reject["detail"] for reject in ask(server, "/api/rejects")["rejects"]] == expected
    monkeypatch.setattr(rejects, "PIECE_BYTES", 300)  # so that pieces end inside lines
    found: list[dict[str, str]] = []
    place = [0, 0]
    while place:
        answer = ask(server, f"/api/rejects?reason=empty_text&file={place[0]}&byte={place[1]}")
        found += answer["rejects"]
        place = answer["next"]
    assert [reject["detail"] for reject in found] == [detail for number, detail in enumerate(expected) if number % 3 == 0]


# ---- finding ----


def reader_of(folder: Path) -> SampleReader:
    store = open_store(str(folder))
    return SampleReader(store, read_manifest(store))


def search_all(reader: SampleReader, query: browse.Query, limit: int, budget_s: float) -> list[int]:
    found: list[int] = []
    after: int | None = 0
    calls = 0
    while after is not None:
        answer = browse.search(reader, Tables(reader), query, after, limit, budget_s)
        assert len(answer["samples"]) <= limit
        assert answer["next"] is None or answer["next"] > after
        found += [card["number"] for card in answer["samples"]]
        after = answer["next"]
        calls += 1
        assert calls < 1000
    return found


@tries(25)
@given(
    text=st.sampled_from(["", "DOCUMENT 2", "caption 1", "number 3?", "answer", "nothing of the kind", "<script>"]),
    data_type=st.sampled_from(["", "text_pretrain", "visual_sft", "image_text"]),
    limit=st.integers(1, 30),
    budget_s=st.sampled_from([0.0, 10.0]),
)
def test_a_search_finds_every_match_once_however_it_is_cut(
    folder: Path, text: str, data_type: str, limit: int, budget_s: float
) -> None:
    def matches(sample: Sample) -> bool:
        texts = [sample.text, *(turn["value"] for turn in sample.conversations or ())]
        return data_type in ("", sample.data_type) and any(text.lower() in one.lower() for one in texts)

    reader = reader_of(folder)
    expected = [number for number, sample in enumerate(samples()) if matches(sample)]
    assert search_all(reader, browse.Query(text=text, data_type=data_type), limit, budget_s) == expected
    reader.close()


def test_a_hit_far_inside_a_text_is_shown_with_what_is_around_it(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [text_sample(0, "word " * 5000 + "needle" + " word" * 5000)])
    reader = reader_of(tmp_path / "set")
    (card,) = browse.search(reader, Tables(reader), browse.Query(text="NEEDLE"), 0, 10)["samples"]
    reader.close()
    assert "needle" in card["text"]
    assert len(card["text"]) < 500


def test_keys_are_found_by_bisection_with_few_reads(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", (text_sample(2 * number) for number in range(3000)), shard_samples=500)
    store = Counting(str(tmp_path / "set"))
    reader = SampleReader(store, read_manifest(store))
    assert reader.find_key("text-00001234") == 617
    assert reader.find_key("text-0000123") == 615
    assert reader.find_key("text-00001235") is None
    assert reader.find_key("zebra") is None
    assert reader.find_key("a") is None
    assert store.num_reads < 5 * 16
    assert store.num_bytes < 5 * 16 * 1024
    reader.close()


def test_keys_that_do_not_ascend_are_found_by_search(tmp_path: Path) -> None:
    order = [5, 1, 4, 0, 3, 2]
    make_dataset(tmp_path / "set", (text_sample(number) for number in order))
    reader = reader_of(tmp_path / "set")
    for place, number in enumerate(order):
        assert reader.find_key(f"text-{number:08d}") in (None, place)
        assert search_all(reader, browse.Query(key=f"{number:08d}"), 10, 0.0) == [place]
    reader.close()


# ---- what it reads ----


class Counting(LocalStore):
    """Counts what is read of shards."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_reads = self.num_bytes = 0

    def read_range(self, name: str, start: int, end: int, size: int | None = None) -> bytes:
        if name.endswith(".tar"):
            self.num_reads += 1
            self.num_bytes += end - start
        return super().read_range(name, start, end, size)


def test_a_page_reads_the_samples_it_shows_and_not_their_images(tmp_path: Path) -> None:
    image = os.urandom(300_000)
    sets = {
        "codes": (small_codes(image_sample(number, side=32)) for number in range(1000)),
        "images": (image_sample(number)._replace(codes={}, image=image, image_extension="jpg") for number in range(60)),
    }
    most = {"codes": (1, 24 * 4096), "images": (24, 24 * 2048)}
    for name, content in sets.items():
        make_dataset(tmp_path / name, content, codes={"vqcode_512": TINY})
        store = Counting(str(tmp_path / name))
        reader = SampleReader(store, read_manifest(store))
        assert len(browse.page(reader, 30, 24)["samples"]) == 24
        assert (store.num_reads, store.num_bytes) <= most[name]
        assert store.num_bytes <= most[name][1]
        reader.close()


def test_shards_without_the_type_asked_for_are_not_read(tmp_path: Path) -> None:
    kinds = [*(text_sample(number) for number in range(100)), *(image_sample(number) for number in range(100))]
    make_dataset(tmp_path / "set", kinds, shard_samples=50)
    store = Counting(str(tmp_path / "set"))
    reader = SampleReader(store, read_manifest(store))
    assert search_all(reader, browse.Query(data_type="image_text"), 50, 10.0) == list(range(100, 200))
    assert store.num_bytes < 2 * 100 * 2048
    reader.close()


def test_large_members_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browse, "MAX_MEMBER_BYTES", 5000)
    make_dataset(tmp_path / "set", [text_sample(0), text_sample(1, "x" * 10_000), text_sample(2)])
    reader = reader_of(tmp_path / "set")
    cards = browse.page(reader, 0, 10)["samples"]
    reader.close()
    assert [card["number"] for card in cards if "problem" in card] == [1]
    assert "larger than" in cards[1]["problem"]


@pytest.mark.slow
def test_it_works_over_s3(s3: S3Server) -> None:
    url = f"s3://{s3.bucket}/view/set"
    make_dataset(url, (small_codes(image_sample(number)) for number in range(50)), shard_samples=20, codes=CODES)
    with serving(url) as server:
        assert [card["number"] for card in ask(server, "/api/samples?first=10&count=24")["samples"]] == list(range(10, 34))
        assert ask(server, "/api/find?key=image-00000031") == {"number": 31}
        assert [card["number"] for card in ask(server, "/api/search?text=CAPTION%2042")["samples"]] == [42]
        assert fetch(server, "/picture/31/vqcode_512.png")[0] == 200
        assert ask(server, "/api/rejects") == {"rejects": [], "next": None}


@pytest.mark.slow
def test_a_conversation_shows_the_codes_and_images_of_all_its_pictures(tmp_path: Path) -> None:
    grids = [np.arange(height * 4, dtype="<u2").reshape(height, 4) + 100 * height for height in (2, 4, 6)]
    codes, shapes = join_grids(grids, np.dtype("<u2"))
    talk = conversation(0)._replace(
        codes={"vqcode_512": codes},
        grids={"vqcode_512": shapes},
        more_images=tuple(SourceImage(image_bytes(number, kind="PNG"), "png") for number in (1, 2)),
    )
    alone = conversation(1)._replace(codes={"vqcode_512": grids[0]}, grids={"vqcode_512": shapes[:1]})
    none, no_shapes = join_grids([], np.dtype("<u2"))
    bare = conversation(2)._replace(codes={"vqcode_512": none}, grids={"vqcode_512": no_shapes}, image=None, image_extension=None)
    make_dataset(tmp_path / "set", [talk, alone, bare], codes={"vqcode_512": TINY})
    with serving(tmp_path / "set", device="cpu") as server:
        shown = ask(server, "/api/sample/0")
        assert [(grid["image"], grid["codes"]) for grid in shown["grids"]] == [
            (at, g.ravel().tolist()) for at, g in enumerate(grids)
        ]
        assert shown["images"] == ["jpg", "1.png", "2.png"]
        assert [fetch(server, f"/image/0?image={at}")[2] for at in range(3)] == [image.data for image in talk.images]
        assert [Image.open(io.BytesIO(fetch(server, f"/codes/0/vqcode_512.png?image={at}")[2])).size for at in range(3)] == [
            (4, 2),
            (4, 4),
            (4, 6),
        ]
        assert ask(server, "/codes/0/vqcode_512.png?image=3", 422)["error"] == "sample 0 has 3 grids in vqcode_512"
        assert Image.open(io.BytesIO(fetch(server, "/picture/0/vqcode_512.png?image=2")[2])).size == (64, 96)
        cards = ask(server, "/api/samples")["samples"]
        assert [card["columns"] for card in cards] == [{"vqcode_512": [2, 4]}, {"vqcode_512": [2, 4]}, {}]
        assert not any("problem" in card for card in cards)
        assert server.pages.answer("/stats", Request(query={})) is not None


def test_tars_of_others_are_shown_member_by_member(tmp_path: Path) -> None:
    members = {
        "JPG": image_bytes(0),
        "left.png": image_bytes(1, kind="PNG"),
        "txt": b"a caption",
        "json": b'{"score": 0.5}',
        "cls": b"7",
        "html": HOSTILE.encode(),
        "bin": bytes(range(256)),
        "gz": b"\x1f\x8b\x08",
        "TXT2": "\u202emore \u05d0".encode(),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(5):
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"./some/where/{number:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index_tars(open_store(str(tmp_path)))
    with serving(tmp_path) as server:
        card = ask(server, "/api/samples")["samples"][3]
        assert (card["key"], card["text"], card["images"]) == ("some/where/003", 'a caption\n{"score": 0.5}', ["JPG", "left.png"])
        assert ask(server, "/api/sample/3")["members"] == [
            {"suffix": "JPG", "bytes": len(members["JPG"]), "image": 0},
            {"suffix": "left.png", "bytes": len(members["left.png"]), "image": 1},
            *(
                {"suffix": name, "bytes": len(members[name]), "text": members[name].decode()}
                for name in ("txt", "json", "cls", "html")
            ),
            {"suffix": "bin", "bytes": 256},
            {"suffix": "gz", "bytes": 3},
            {"suffix": "TXT2", "bytes": len(members["TXT2"]), "text": members["TXT2"].decode()},
        ]
        for image, suffix in enumerate(("JPG", "left.png")):
            _, headers, body = fetch(server, f"/image/3?image={image}")
            assert (headers["Content-Type"], body) == (("image/jpeg", "image/png")[image], members[suffix])
        assert len(ask(server, "/api/search?text=caption&key=004")["samples"]) == 1
        assert len(ask(server, "/api/search?where=score+%3E+0.4")["samples"]) == 5
        assert fetch(server, "/stats")[0] == 200


# ---- who may ask ----


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "", "0x7f.1"]
)
def test_a_foreign_host_name_is_refused(server: ViewServer, host: str) -> None:
    status, _, body = fetch(server, "/api/samples", headers={"Host": host})
    assert status == 421
    assert b"caption" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8765", "127.0.0.1:1", "[::1]:8765", "192.168.0.7"])
def test_localhost_and_addresses_in_numbers_are_answered(server: ViewServer, host: str) -> None:
    assert fetch(server, "/api/set", headers={"Host": host})[0] == 200


def test_a_name_that_was_allowed_is_answered(folder: Path) -> None:
    with serving(folder, allow_host=("data.example",)) as server:
        assert fetch(server, "/api/set", headers={"Host": "data.example"})[0] == 200
        assert fetch(server, "/api/set", headers={"Host": "other.example"})[0] == 421


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites_get_nothing_but_people_may_follow_their_links(server: ViewServer, site: str) -> None:
    embedded = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert fetch(server, "/image/4", headers=embedded)[0] == 403
    followed = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert fetch(server, "/sample/4", headers=followed)[0] == 200
    assert fetch(server, "/sample/4", headers={**followed, "Sec-Fetch-Dest": "iframe"})[0] == 403


@pytest.mark.parametrize("path", ["/", "/api/set", "/image/4", "/static/main.js", "/stats", "/nothing", "/api/sample/999"])
def test_every_answer_carries_the_policy(server: ViewServer, path: str) -> None:
    _, headers, _ = fetch(server, path)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FROB"])
def test_nothing_can_be_changed(server: ViewServer, method: str) -> None:
    status, headers, body = fetch(server, "/api/set", method=method)
    assert status == 501
    assert "error" in json.loads(body)
    assert "Content-Security-Policy" in headers


def test_head_is_answered_without_a_body(server: ViewServer) -> None:
    status, headers, body = fetch(server, "/image/4", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(samples()[4].image or b"")


WAYS = ["../", "..%2f", "%2e%2e/", "..\\", "//"]
OUTSIDE = ["secret.txt", "set/manifest.json", "../secret.txt", "etc/passwd"]


@pytest.mark.parametrize(
    "path",
    [
        *(f"/{prefix}{way}{name}" for prefix in ("", "static/", "image/") for way in WAYS for name in OUTSIDE),
        "/static/../server.py",
        "/static/index.html",
        "/static/%2e%2e%2fserver.py",
        "/static/main.js%00.png",
        "/image/0/../../secret.txt",
        "/picture/0/../secret.png",
        "/manifest.json",
        "/shard-000000-0000.tar",
        "/image/-1",
        "/image/1e3",
        "/image/٣",
        "http://127.0.0.1/etc/passwd",
        "//evil.example/",
        "*",
        "",
    ],
)
def test_no_path_leads_anywhere_but_to_the_pages(server: ViewServer, path: str) -> None:
    port = server.server_address[1]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert re.match(rb"HTTP/1\.[01] 4\d\d |\{", answer), answer[:200]
    assert b"the secret" not in answer
    assert b"root:" not in answer
    assert b'"format": "wds-tools"' not in answer


@tries(60)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60))
def test_any_address_is_answered_with_a_sentence_or_a_page(server: ViewServer, text: str) -> None:
    for path in (f"/{text}", f"/api/{text}", f"/api/samples?{text}", f"/api/search?text={urllib.parse.quote(text)}&limit=1"):
        status, _, _ = fetch(server, path)
        assert status in (200, 400, 404, 422)


def test_a_manifest_that_names_shards_outside_the_set_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    shutil.copy(copy / "shard-000000-0000.tar", tmp_path / "outside.tar")
    text = (copy / "manifest.json").read_text()
    for name in ("../outside.tar", "/etc/passwd", "a\\..\\..\\outside.tar"):
        (copy / "manifest.json").write_text(text.replace("shard-000000-0000.tar", json.dumps(name)[1:-1]))
        with pytest.raises(FormatError, match="not a plain relative path"):
            ViewServer(ViewConfig(input=str(copy), port=0))


def test_with_strict_links_symlinks_out_of_the_set_are_not_followed(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret\n")
    for name in ("shard-000000-0000.tar", "shard-000000-0001.tar.index", "rejects/task-000000.jsonl"):
        (copy / name).unlink()
        (copy / name).symlink_to(secret)
    with serving(copy, strict_links=True) as server:
        for path in ("/api/samples", "/api/sample/20", "/image/3", "/api/rejects", "/api/search?text=e", "/stats"):
            status, _, body = fetch(server, path)
            assert b"the secret" not in body
            assert status in (404, 422, 502) or path == "/api/rejects"


# ---- what is broken ----


def test_a_damaged_sample_is_shown_as_one_and_its_neighbours_as_usual(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    path = copy / "shard-000000-0000.tar"
    data = path.read_bytes()
    at = data.index(b'"text":"caption 3"')
    path.write_bytes(data[:at] + b'"test"' + data[at + 6 :])
    with serving(copy) as server:
        cards = ask(server, "/api/samples")["samples"]
        assert [card["number"] for card in cards if "problem" in card] == [3]
        assert ask(server, "/api/sample/3")["intact"] is False
        assert ask(server, "/api/sample/4")["intact"] is True


@pytest.mark.slow
def test_why_a_picture_can_not_be_decoded_is_said_and_its_codes_are_still_shown(tmp_path: Path) -> None:
    faults = {
        "unknown tokenizer": {**TINY, "tokenizer": "../../evil"},
        "needs weights": {**TINY, "tokenizer": "chameleon"},
        "made with the weights": {**TINY, "weights_hash": "sha256:0000"},
        "does not say which tokenizer": {"codebook_size": 4096},
        "outside the codebook": TINY,
    }
    grid_hw = np.full((4, 4), 5000, np.uint16)
    columns = {f"vqcode_{number}": why for number, why in enumerate(faults)}
    sample = image_sample(1)._replace(codes=dict.fromkeys(columns, grid_hw))
    provenance = {column: {**faults[why], "codebook_size": CODEBOOK_SIZE} for column, why in columns.items()}
    make_dataset(tmp_path / "set", [sample], codes=provenance)
    with serving(tmp_path / "set", device="cpu") as server:
        for column, why in columns.items():
            status, _, body = fetch(server, f"/picture/0/{column}.png")
            assert why in json.loads(body)["error"]
            assert status in (404, 422)
            assert fetch(server, f"/codes/0/{column}.png")[0] == 200


def test_what_is_not_there_is_said(server: ViewServer) -> None:
    assert "has 70" in ask(server, "/api/sample/70", 404)["error"]
    assert "has 0 source images" in ask(server, "/image/69", 422)["error"]
    assert "has 0 grids in vqcode_512" in ask(server, "/codes/69/vqcode_512.png", 422)["error"]
    assert "whole number" in ask(server, "/api/samples?first=x", 404)["error"]


@pytest.mark.parametrize("path", ["/nothing", "/sample/70", "/stats/<b>", "/image/69", "/static/none.js"])
def test_a_person_gets_a_page_where_there_is_nothing_and_a_script_a_sentence(server: ViewServer, path: str) -> None:
    status, headers, body = fetch(server, path, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (status, headers["Content-Type"]) == (fetch(server, path)[0], "text/html; charset=utf-8")
    assert b"There is nothing to show here" in body
    assert b'<a href="/">All samples</a>' in body
    assert b"<b>" not in body
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "error" in json.loads(fetch(server, path)[2])
    status, headers, body = fetch(server, path, headers={"Accept": "text/html", "Host": "evil.example"})
    assert (status, headers["Content-Type"]) == (421, "application/json; charset=utf-8")  # not with the dataset's name in it


def test_a_dataset_of_a_hostile_name_is_shown_by_it(tmp_path: Path) -> None:
    folder = tmp_path / '<b>"$main \u202e&amp;'
    make_dataset(folder, [text_sample(0)])
    with serving(folder) as server:
        for path in ("/", "/stats", "/nothing"):
            body = fetch(server, path, headers={"Accept": "text/html"})[2].decode()
            assert "&lt;b&gt;&quot;$main \\u202e&amp;amp;</title>" in body
            assert '<b>"' not in body


def test_a_lost_index_names_the_command_that_brings_it_back(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    (copy / "shard-000000-0000.tar.index").unlink()
    with serving(copy) as server:
        assert "wds-tools index" in ask(server, "/api/samples", 404)["error"]
        assert len(ask(server, "/api/samples?first=15&count=10")["samples"]) == 10


def test_an_earlier_pass_that_rejected_is_named_whatever_the_manifest_says(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    manifest = read_manifest(open_store(str(copy)))
    for source, expected in (
        ({"input": {"url": "raw", "rejects": {"too_small": 3}}}, [{"url": "raw", "rejects": {"too_small": 3}}]),
        (
            {"inputs": [{"url": "a", "rejects": {"dark": 1}, "source": {"input": {"url": "c", "rejects": {}}}}, {"rejects": {}}]},
            [{"url": "a", "rejects": {"dark": 1}}, {"url": "", "rejects": {}}, {"url": "c", "rejects": {}}],
        ),
        ({"inputs": [{"url": "pairs.jsonl", "bytes": 3}]}, []),
        ({"input": {"rejects": {}, "source": {"inputs": 2}}}, [{"url": "", "rejects": {}}]),
        ({"input": [1]}, []),
        ({"input": {"rejects": 5, "source": "x"}}, []),
    ):
        (copy / "manifest.json").write_bytes(serialize_manifest(replace(manifest, source=source)))
        with serving(copy) as server:
            assert ask(server, "/api/set")["earlier"] == expected


def test_many_at_once_are_answered(server: ViewServer) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda at=at: answers.append(fetch(server, f"/api/samples?first={at}")[0])) for at in range(60)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 60


def half_open(server: ViewServer) -> socket.socket:
    """A connection that has begun to ask."""
    connection = socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: ")
    return connection


def deaf(server: ViewServer) -> socket.socket:
    """A connection that asks and asks, and takes no answer."""
    connection = socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20)
    connection.setblocking(False)
    with suppress(BlockingIOError):
        while connection.send(b"GET /app.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100):
            pass
    return connection


@pytest.mark.parametrize("rude", [half_open, pytest.param(deaf, marks=pytest.mark.slow)])
def test_who_keeps_connections_open_locks_nobody_out(folder: Path, rude: Callable[[ViewServer], socket.socket]) -> None:
    with serving(folder) as server, ExitStack() as opened:
        for _ in range(MAX_CONNECTIONS + 16):
            opened.enter_context(rude(server))
        begun = time.monotonic()
        assert fetch(server, "/")[0] == 200
        assert time.monotonic() - begun < IDLE_S / 2


def test_a_request_that_drips_in_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wds_tools.view.server.IDLE_S", 0.3)
    with serving(folder) as server, half_open(server) as connection:
        connection.settimeout(0.1)
        for _ in range(100):
            with suppress(TimeoutError):  # until it says something, or ends
                connection.recv(1)
                return
            connection.sendall(b"x")
    raise AssertionError("it was listened to for ten seconds")


def test_pictures_that_nobody_waits_for_are_not_made(server: ViewServer) -> None:
    answer = server.pages.answer("/picture/9/vqcode_512.png", Request(query={}, is_wanted=lambda: False))
    assert answer is not None
    assert answer.length == 0


# ---- the command ----


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted_and_leaves_nothing(folder: Path) -> None:
    for ending in (signal.SIGINT, signal.SIGTERM):
        process = start("view", folder, "--port", "0")
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert url is not None, line
        connection = http.client.HTTPConnection("127.0.0.1", int(url[1]), timeout=60)
        connection.request("GET", "/picture/1/vqcode_512.png")
        assert connection.getresponse().status == 200
        connection.close()
        assert session(process.pid)
        process.send_signal(ending)
        _, errors = process.communicate(timeout=200)
        expected = {signal.SIGINT: (0, ""), signal.SIGTERM: (143, "wds-tools: stopped by SIGTERM\n")}
        assert (process.returncode, errors) == expected[ending]
        wait_until(lambda pid=process.pid: not session(pid), "its processes are still there")


@pytest.mark.slow
def test_killed_it_takes_its_process_along(folder: Path) -> None:
    process = start("view", folder, "--port", "0")
    assert process.stdout is not None
    port = int(re.findall(r":(\d+)/", process.stdout.readline())[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/picture/1/vqcode_512.png")
    assert connection.getresponse().read()
    connection.close()
    process.kill()
    process.communicate(timeout=200)
    wait_until(lambda: not session(process.pid), "its processes are still there")


@pytest.mark.slow
def test_wrong_arguments_are_one_line(folder: Path, server: ViewServer, tmp_path: Path) -> None:
    taken = wds_tools("view", folder, "--port", server.server_address[1], status=2)
    assert "--port 0 takes a free one" in last_line(taken.stderr)
    assert "there is no such folder, or nothing is in it" in last_line(wds_tools("view", tmp_path, status=1).stderr)
    assert "--port 70000: 0 to 65535" in wds_tools("view", folder, "--port", "70000", status=2).stderr


def test_only_this_machine_is_listened_to_by_default(server: ViewServer) -> None:
    assert ViewConfig(input="x").host == "127.0.0.1"
    assert server.server_address[0] == "127.0.0.1"


def test_an_empty_dataset_and_none_at_all(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [])
    with serving(tmp_path / "set") as server:
        assert ask(server, "/api/samples") == {"first": 0, "total": 0, "samples": []}
        assert fetch(server, "/stats")[0] == 200
        assert ask(server, "/api/search?text=x")["next"] is None
        assert ask(server, "/api/find?key=x") == {"number": None}
    with pytest.raises(NotFound, match=r"manifest\.json"):
        ViewServer(ViewConfig(input=str(tmp_path), port=0))


def test_the_settings_reach_the_pages() -> None:
    assert {"weights", "device", "text_tokenizer"} == set(PagesConfig.__dataclass_fields__)


def test_samples_are_those_of_the_reader(folder: Path) -> None:
    assert [sample.key for sample in read_samples(folder)] == [sample.key for sample in samples()]

"""The viewer in a real browser: what people see and press, that nothing in the data runs, and that nothing leaves the machine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import Watched, keys_shown, until
from commands import image_bytes, read_samples, start, tar_bytes
from factory import answer_sample, image_sample, make_dataset, page_sample, text_sample
from viewer import CODES, HOSTILE, fetch, samples, serving, small_codes

from wds_tools.dataset.reader import read_manifest
from wds_tools.format.schema import SourceImage
from wds_tools.jobs.index_tars import index_tars
from wds_tools.select.select import SelectConfig, select
from wds_tools.storage import open_store
from wds_tools.view.server import ViewServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.mark.slow
def test_pages_are_turned_by_keys_and_buttons_and_the_address_follows(watched: Watched) -> None:
    page, expected = watched.open("/"), [sample.key for sample in samples()]
    assert keys_shown(page) == expected[:24]
    page.keyboard.press("n")
    page.wait_for_url("**/?first=24")
    assert keys_shown(page) == expected[24:48]
    page.get_by_role("button", name="Next").click()
    page.wait_for_url("**/?first=48")
    assert keys_shown(page) == expected[48:]
    assert page.get_by_role("button", name="Next").is_disabled()
    page.go_back()
    assert keys_shown(page) == expected[24:48]
    page.keyboard.press("p")
    page.wait_for_url("**/?first=0")
    page.get_by_label("place in the dataset").fill("48")
    page.wait_for_url("**/?first=48")


@pytest.mark.slow
def test_a_sample_is_opened_left_and_linked_to(watched: Watched) -> None:
    page = watched.open("/")
    keys_shown(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/sample/1")
    assert page.locator("h1").inner_text() == samples()[1].key
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/sample/2")
    until(page, f"document.querySelector('h1').textContent === '{samples()[2].key}'")
    page.reload()
    assert page.locator("h1").inner_text() == samples()[2].key
    page.keyboard.press("k")
    page.wait_for_url("**/sample/1")
    page.keyboard.press("Escape")
    page.wait_for_url(re.compile(r"/(\?first=0)?$"))
    page.keyboard.press("g")
    page.keyboard.type("41")
    page.keyboard.press("Enter")
    page.wait_for_url("**/sample/41")
    until(page, "document.querySelectorAll('.turn').length === 2")


@pytest.mark.slow
def test_samples_are_opened_at_random_by_key_and_button(watched: Watched) -> None:
    page = watched.open("/")
    keys_shown(page)
    page.evaluate("() => { let turn = 0; Math.random = () => [0.5, 0.999, 0][turn++]; }")
    count = len(samples())
    page.get_by_role("button", name="Random").click()
    page.wait_for_url(f"**/sample/{count // 2}")
    for number in (count - 1, 0):
        page.keyboard.press("r")
        page.wait_for_url(f"**/sample/{number}")
        until(page, f"document.querySelector('h1').textContent === '{samples()[number].key}'")


@pytest.mark.slow
def test_the_decoded_picture_the_original_and_the_codes_stand_side_by_side(watched: Watched) -> None:
    page = watched.open("/sample/3")
    page.wait_for_selector(".pane img[alt='the picture decoded from its codes']")
    page.wait_for_selector(".pane img[alt='the source image']")
    sizes = page.locator(".pane img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert sizes == [128, 40]
    colours = """canvas => { const {width, height} = canvas;
        return new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, width, height).data.buffer)).size; }"""
    cells = page.locator("canvas.cells")
    assert cells.evaluate(colours) > 8
    cells.hover(position={"x": 5, "y": 5})
    code = int(samples()[3].codes["vqcode_512"][0, 0])
    assert f"row 0, column 0 · code {code:,}" in page.locator(".readout").inner_text()
    cells.focus()
    page.keyboard.press("ArrowRight")
    assert "row 0, column 1" in page.locator(".readout").inner_text()
    page.get_by_role("button", name="rarity").click()
    until(page, "document.querySelector('.readout').textContent.includes('rarer')")
    assert cells.evaluate(colours) >= 1


@pytest.mark.slow
def test_nothing_in_the_data_runs_and_all_of_it_is_text(watched: Watched) -> None:
    for path in ("/", "/sample/7", "/sample/41", "/rejects", "/stats", f"/?text={HOSTILE.split()[0]}"):
        page = watched.open(path)
        page.wait_for_load_state("networkidle")
        assert page.locator("img[src='x']").count() == 0
        assert page.locator("script:not([src])").count() == 0
    page = watched.open("/sample/7")
    assert page.locator(".prose").inner_text() == HOSTILE
    assert "javascript:alert(3)" in page.locator(".facts").inner_text()
    assert page.locator("a[href^='javascript']").count() == 0
    watched.open("/sample/41")
    assert HOSTILE in page.locator(".turn").first.inner_text()


@pytest.mark.slow
def test_the_policy_stops_what_would_get_through(browser: Browser, server: ViewServer) -> None:
    watched = Watched(browser, server)
    page = watched.open("/sample/3")
    page.wait_for_selector(".prose")
    inject = """() => { window.ran = false; const script = document.createElement('script');
        try { script.textContent = 'window.ran = true'; document.body.append(script); } catch (error) { return 'refused'; }
        return window.ran; }"""
    assert page.evaluate(inject) in ("refused", False)
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    assert page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    watched.context.close()


def test_a_search_shows_what_it_finds_and_says_when_there_is_nothing(watched: Watched) -> None:
    page = watched.open("/")
    keys_shown(page)
    page.keyboard.press("/")
    page.keyboard.type("Document 1")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card mark")
    until(page, "document.querySelector('.progress').textContent.includes('11 found in 70 samples')")
    assert page.locator(".card").count() == 11
    assert page.locator(".card mark").first.inner_text() == "document 1"
    page.locator("#search").fill("no such thing")
    page.locator("#search").press("Enter")
    page.wait_for_selector("text=Nothing found")
    page.get_by_label("type").select_option("visual_sft")
    page.wait_for_selector("text=Nothing found")
    page.locator("#search").fill("")
    page.locator("#search").press("Enter")
    until(page, "document.querySelectorAll('.card').length === 5")


def test_a_key_leads_to_its_sample(watched: Watched) -> None:
    page = watched.open("/")
    page.get_by_label("search in").select_option("key")
    page.locator("#search").fill("image-00000011")
    page.locator("#search").press("Enter")
    page.wait_for_url("**/sample/11")
    assert page.locator("h1").inner_text() == "image-00000011"


def test_rejects_are_listed_by_reason(watched: Watched) -> None:
    page = watched.open("/rejects")
    until(page, "document.querySelectorAll('tbody tr').length === 12")
    page.get_by_role("link", name="empty_text 4").click()
    until(page, "document.querySelectorAll('tbody tr').length === 4")
    assert HOSTILE in page.locator("tbody tr").first.inner_text()


def test_light_and_dark_are_a_key_apart_and_stay(watched: Watched) -> None:
    page = watched.open("/")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    before = page.evaluate(background)
    page.keyboard.press("d")
    after = page.evaluate(background)
    assert before != after
    page.keyboard.press("2")
    page.wait_for_url("**/stats")
    assert page.evaluate(background) == after
    assert page.locator("svg.plot").count() >= 4


@pytest.mark.slow
def test_help_is_a_key_away(watched: Watched) -> None:
    page = watched.open("/")
    keys_shown(page)
    page.keyboard.press("?")
    assert page.get_by_role("heading", name="Keyboard").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("heading", name="Keyboard").is_visible()


@pytest.mark.slow
def test_codes_stand_in_for_pictures_that_can_not_be_decoded(browser: Browser, tmp_path: Path) -> None:
    codes = {"vqcode_512": {"tokenizer": "chameleon", "codebook_size": 4096, "precision": "fp32"}}
    make_dataset(tmp_path / "set", [small_codes(image_sample(number)) for number in range(3)], codes=codes)
    with serving(tmp_path / "set") as server:
        watched = Watched(browser, server)
        page = watched.open("/")
        until(page, "document.querySelectorAll('.thumb img.map').length === 3")
        assert "chameleon needs weights" in page.locator(".notice").inner_text()
        watched.open("/sample/0")
        page.wait_for_selector(".frame p:has-text('chameleon needs weights')")
        watched.context.close()


@pytest.mark.slow
def test_pictures_stand_in_their_places_in_documents_and_answers(browser: Browser, tmp_path: Path) -> None:
    encoded = [small_codes(sample(0, (4, 4), (2, 6), (4, 4))) for sample in (page_sample, answer_sample)]
    bare = answer_sample(1, (4, 4), (4, 4))._replace(codes={}, grids=None, image=image_bytes(1), image_extension="jpg")
    bare = bare._replace(more_images=(SourceImage(image_bytes(2, kind="PNG"), "png"),))
    make_dataset(tmp_path / "set", [*encoded, bare], codes=CODES)
    with serving(tmp_path / "set", device="cpu") as server:
        assert fetch(server, "/picture/0/vqcode_512.png")[0] == 200  # the tokenizer is loaded
        watched = Watched(browser, server)
        page = watched.open("/sample/0")
        until(page, "document.querySelectorAll('.prose .image img').length === 3")
        nodes = "text => [...text.childNodes].map(node => node.textContent || node.firstChild.alt)"
        texts = [f"page 0, part {part}." for part in range(4)]
        assert page.locator(".prose").evaluate(nodes) == [
            *(f"{texts[0]} ", "image 1", f" {texts[1]} ", "image 2", f" {texts[2]} ", "image 3", f" {texts[3]}")
        ]
        watched.open("/sample/1")
        until(page, "document.querySelectorAll('.turn .image img').length === 3")
        assert [page.locator(f".turn{who} .image img").count() for who in (":not(.answer)", ".answer")] == [1, 2]
        sizes = page.locator(".turn .image img").evaluate_all(
            "all => all.map(image => [image.naturalHeight, image.naturalWidth])"
        )
        assert sizes == [[32, 32], [16, 48], [32, 32]]
        watched.open("/sample/2")
        until(page, "document.querySelectorAll('.turn .image img').length === 2")
        assert page.locator(".turn.answer .image img").evaluate("image => image.naturalWidth") == 40
        watched.context.close()
        assert watched.problems == []


@pytest.mark.slow
def test_fields_choose_and_order_samples_and_what_they_lack_is_said(watched: Watched) -> None:
    page = watched.open("/")
    keys_shown(page)
    page.get_by_label("search in").select_option("where")
    page.locator("#search").fill("text_chars > 2500")
    page.locator("#search").press("Enter")
    until(page, "document.querySelector('.progress').textContent.includes('4 found in 70 samples')")
    assert keys_shown(page) == [f"text-{number:08d}" for number in range(21, 25)]
    assert page.title() == "text_chars > 2500 · set"
    page.get_by_label("sort by").fill("-text_chars")
    page.get_by_label("sort by").press("Enter")
    until(page, "document.querySelector('.progress').textContent === '4 by -text_charsStop'")
    assert keys_shown(page) == [f"text-{number:08d}" for number in range(24, 20, -1)]
    page.locator("#search").fill("")
    page.locator("#search").press("Enter")
    until(page, "document.querySelector('.progress').textContent.startsWith('70 by')")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Next").click()
    page.wait_for_url("**first=24")
    page.get_by_label("sort by").fill("width")
    page.get_by_label("sort by").press("Enter")
    until(page, "document.querySelector('.progress').textContent.includes(' · 60 have no number or text there')")
    page.get_by_label("sort by").fill("")
    page.get_by_label("sort by").press("Enter")
    page.wait_for_url(re.compile(r"/\?$"))
    page.get_by_label("search in").select_option("where")
    page.locator("#search").fill("aesthetic >= 5.5")
    page.locator("#search").press("Enter")
    page.wait_for_selector("text=No sample looked at has a field aesthetic; the fields are key, shard")
    page.locator("#search").fill("aesthetic >=")
    page.locator("#search").press("Enter")
    page.wait_for_selector("text=not an expression")
    watched.problems.clear()  # the refusal


@pytest.mark.slow
def test_marks_are_kept_and_become_a_file_that_select_takes(watched: Watched, folder: Path, tmp_path: Path) -> None:
    page = watched.open("/")
    keys_shown(page)
    page.locator(".cell .mark").nth(3).click()
    watched.open("/sample/41")
    page.get_by_role("button", name="mark talk-").click()
    page.reload()
    page.wait_for_selector(".mark[aria-pressed=true]")
    assert page.locator(".mark[aria-pressed=true]").count() == 1
    watched.open("/marks")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download keys").click()
    download.value.save_as(tmp_path / "marks.txt")
    keys = [samples()[3].key, samples()[41].key]
    assert (tmp_path / "marks.txt").read_text().splitlines() == [f"{folder.resolve()}\t{key}" for key in keys]
    config = SelectConfig(input=(str(folder),), keys=str(tmp_path / "marks.txt"), output=str(tmp_path / "out"), quiet=True)
    select(config)
    assert [one.key for one in read_samples(tmp_path / "out")] == keys
    config = replace(config, keys=None, exclude=str(tmp_path / "marks.txt"), output=str(tmp_path / "others"))
    select(config)
    assert [one.key for one in read_samples(tmp_path / "others")] == [one.key for one in samples() if one.key not in keys]
    page.get_by_role("button", name="take the mark off sample 3", exact=True).click()
    assert page.locator("tbody a").all_inner_texts() == keys[1:]
    page.get_by_role("button", name="Take all marks off").click()
    page.wait_for_selector("text=Nothing is marked")
    place = f"'marks {read_manifest(open_store(str(folder))).fingerprint()[7:23]}'"
    page.evaluate(f"localStorage.setItem({place}, JSON.stringify([...Array(10000).keys()].map(at => [at + 100, 'key'])))")
    watched.open("/sample/3")
    page.locator(".mark").click()
    assert page.locator(".mark").inner_text() == "full"
    page.evaluate(f"localStorage.setItem({place}, 'nothing that this page wrote')")
    watched.open("/marks")
    page.wait_for_selector("text=Nothing is marked")


@pytest.mark.slow
def test_until_the_first_picture_is_there_the_page_says_what_it_waits_for(watched: Watched) -> None:
    watched.page.route("**/api/set", lambda _: None)
    page = watched.open("/")
    page.wait_for_selector("[role=status] >> text=Loading")
    page.unroute_all(behavior="ignoreErrors")
    page.route("**/picture/**", lambda _: None)
    page = watched.open("/")
    page.wait_for_selector(".thumb.waiting >> text=loading the tokenizer")
    assert page.locator(".thumb.waiting").count() == 24
    page.unroute_all(behavior="ignoreErrors")
    watched.open("/")
    until(page, "document.querySelectorAll('.thumb.waiting').length === 0")


@pytest.mark.slow
def test_the_window_is_called_by_the_page_and_the_dataset(watched: Watched) -> None:
    for path, title in {
        "/": "set",
        "/?text=caption": "caption · set",
        "/sample/3": "image-00000003 · sample 3 · set",
        "/rejects?reason=bad_json": "Rejects · bad_json · set",
        "/marks": "Marks · set",
        "/stats": "Statistics · set",
        "/sample/99": "Nothing here · set",
    }.items():
        page = watched.open(path)
        page.wait_for_load_state("networkidle")
        assert page.title() == title
        assert page.locator(".bar nav a").all_inner_texts() == ["Samples", "Statistics", "Rejects", "Marks"]
        here = "Samples" if path.startswith(("/?", "/sample")) or path == "/" else title.split()[0]
        assert page.locator(".bar nav a[aria-current=page]").all_inner_texts() == [here]
        page.get_by_role("button", name="keyboard").click()
        assert page.get_by_role("heading", name="Keyboard").is_visible()
    watched.problems.clear()  # the status of the last


@pytest.mark.slow
def test_a_sample_of_others_is_shown_member_by_member(browser: Browser, tmp_path: Path) -> None:
    pictures = {"JPG": image_bytes(0), "mask.png": image_bytes(1, kind="PNG")}
    members = {**pictures, "txt": HOSTILE.encode(), "json": b'{"a": 1}', "bin": b"\0"}
    named = {f"\u202ekey.{suffix}": data for suffix, data in members.items()} | {"tab\tkey.txt": b"a"}
    (tmp_path / "a.tar").write_bytes(tar_bytes(named.items()))
    index_tars(open_store(str(tmp_path)))
    with serving(tmp_path) as server:
        watched = Watched(browser, server)
        page = watched.open("/sample/0")
        until(page, "document.querySelectorAll('.pane img').length === 2")
        names = "nodes => nodes.map(node => node.querySelector('header, h2').textContent)"
        assert page.locator(".side:first-child > *").evaluate_all(names) == list(members)
        assert page.locator(".prose").inner_text() == HOSTILE
        assert page.locator("h1").inner_text() == r"\u202ekey"
        assert "1 bytes, not shown" in page.locator(".side:first-child > :last-child").inner_text()
        assert page.locator(".mark").is_enabled()
        watched.open("/sample/1")
        page.wait_for_selector(".prose")
        assert page.locator("h1").inner_text() == r"tab\u0009key"
        assert page.locator(".mark").is_disabled()  # a line of keys can't hold it
        watched.context.close()
        assert watched.problems == []


@pytest.mark.slow
def test_pages_turn_while_pictures_are_being_made(watched: Watched) -> None:
    page, expected = watched.open("/"), [sample.key for sample in samples()]
    for key, first in (("n", 24), ("n", 48), ("p", 24), ("p", 0), ("n", 24)):
        keys_shown(page)
        page.keyboard.press(key)
        page.wait_for_url(f"**/?first={first}")
    assert keys_shown(page) == expected[24:48]
    until(page, "document.querySelectorAll('.thumb.waiting').length === 0")


@pytest.mark.slow
def test_an_empty_set_a_missing_sample_and_a_viewer_that_has_ended_are_said(browser: Browser, tmp_path: Path) -> None:
    make_dataset(tmp_path / "empty", [])
    with serving(tmp_path / "empty") as server:
        watched = Watched(browser, server)
        page = watched.open("/")
        page.wait_for_selector("text=This dataset is empty")
    make_dataset(tmp_path / "set", [text_sample(number) for number in range(60)])
    process = start("view", tmp_path / "set", "--port", "0")
    assert process.stdout is not None
    address = re.findall(r"http://\S+", process.stdout.readline())[0]
    page = watched.page
    page.goto(address + "sample/99")
    page.wait_for_selector("text=there is no sample 99")
    page.goto(address)
    keys_shown(page)
    process.kill()
    process.communicate()
    page.keyboard.press("n")
    page.wait_for_selector("text=is `wds-tools view` still running?")
    watched.context.close()

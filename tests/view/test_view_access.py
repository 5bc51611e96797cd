"""The viewer for everyone, in a real browser: contrast, names for a screen reader, narrow screens, the keyboard alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import Watched, keys_shown, until
from commands import WAIT_S
from viewer import HOSTILE, samples

PAGES = ("/", "/?where=text_chars+%3E+100", "/?by=-text_chars", "/?where=aesthetic", "/sample/3", "/sample/41", "/sample/69")
OTHER_PAGES = ("/rejects", "/marks", "/stats", "/sample/70")
WIDGETS = {"button", "link", "textbox", "searchbox", "combobox", "slider", "image", "progressbar", "checkbox", "dialog"}
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


def settle(watched: Watched, path: str) -> None:
    """Open a page, and wait until all of it is there."""
    watched.open(path)
    until(watched.page, "!document.querySelector('.waiting, .stale') && !document.body.textContent.includes('Loading')", WAIT_S)
    watched.page.wait_for_load_state("networkidle")
    until(watched.page, "!document.getAnimations().length")


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(watched: Watched, theme: str) -> None:
    watched.page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]  # of a parameter
    for path in PAGES + OTHER_PAGES:
        settle(watched, path)
        looked, found = watched.page.evaluate(CONTRAST, 4.5)
        assert looked > 8, path
        assert found == [], path
    watched.problems.clear()  # the status of the page that is not there


def test_the_check_of_contrast_finds_what_is_pale(watched: Watched) -> None:
    page = watched.open("/marks")
    page.wait_for_selector(".state b")
    assert page.evaluate(CONTRAST, 4.5)[1] == []
    page.evaluate("document.querySelector('.state b').style.opacity = 0.5")
    (found,) = page.evaluate(CONTRAST, 4.5)[1]
    assert found.startswith('B "Nothing is marked": ')


@pytest.mark.slow
def test_a_screen_reader_has_a_name_for_everything_that_can_be_used(watched: Watched) -> None:
    session = watched.context.new_cdp_session(watched.page)
    for path in PAGES + OTHER_PAGES:
        settle(watched, path)
        nodes = [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
        widgets = [(role, name) for role, name in named if role in WIDGETS]
        assert len(widgets) > 6, path
        assert [one for one in widgets if sum(map(str.isalpha, one[1])) < 2] == [], path
        assert {"main", "banner", "navigation"} <= {role for role, _ in named}, path
        assert watched.page.locator("html[lang=en]").count() == 1
    watched.problems.clear()


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_narrow_screen(watched: Watched, width: int) -> None:
    watched.page.set_viewport_size({"width": width, "height": 740})
    for path in (*PAGES, *OTHER_PAGES, "/?text=caption", f"/?text={HOSTILE.split()[0]}"):
        page = watched.open(path)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    watched.problems.clear()


@pytest.mark.slow
def test_the_keyboard_alone_reaches_a_sample_marks_it_and_comes_back(watched: Watched) -> None:
    page = watched.open("/")
    keys_shown(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("x")
    assert page.locator(".mark[aria-pressed=true]").count() == 1
    page.keyboard.press("Enter")
    page.wait_for_url("**/sample/0")
    until(page, "document.title.startsWith('image-00000000')")
    assert page.locator(".mark").get_attribute("aria-pressed") == "true"
    page.keyboard.press("j")
    until(page, "document.title.startsWith('image-00000001')")
    page.keyboard.press("x")
    page.keyboard.press("4")
    page.wait_for_url("**/marks")
    assert page.locator("tbody a").all_inner_texts() == [samples()[0].key, samples()[1].key]
    page.keyboard.press("1")
    page.wait_for_url("**/")
    page.keyboard.press("f")
    page.keyboard.type("text_chars > 2800")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.card').length === 1")
    assert keys_shown(page) == ["text-00000024"]
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("r")
    page.wait_for_url("**/sample/*")

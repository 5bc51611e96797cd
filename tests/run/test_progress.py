"""Progress: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import os
import pty
from types import SimpleNamespace

import pytest

from wds_tools.run import progress
from wds_tools.run.progress import Advance, Progress


@pytest.fixture
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines come at every report instead of every ten seconds."""
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)


@pytest.mark.usefixtures("every_time")
def test_plain_lines_say_samples_rejects_rate_share_and_time_left() -> None:
    out = io.StringIO()
    with Progress("convert documents", 200, stream=out) as report:
        report(Advance(units=50, samples=1234))
        report(Advance(units=50, rejects=7))
    first, second, last = out.getvalue().splitlines()
    assert first.startswith("convert documents: 1,234 samples, ")
    assert "samples/s, 25 % done, about 00:00 left" in first
    assert second.startswith("convert documents: 1,234 samples, 7 rejects, ")
    assert "50 % done" in second
    assert last.startswith("convert documents: 1,234 samples, 7 rejects, ")


@pytest.mark.usefixtures("every_time")
def test_images_a_second_and_the_share_of_time_that_devices_waited_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    clock = iter(range(1000))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with Progress("encode", 10, stream=out) as report:
        report(Advance(units=1, samples=1, images=3, device_s=2.0, waited_s=0.5))
        report(Advance(units=9, samples=9, images=500, device_s=2.0, waited_s=0.7))
    first, *_, last = out.getvalue().splitlines()
    assert first.startswith("encode: 1 samples, 1 images/s, device waited 25%, 10 % done, about ")
    assert last.startswith("encode: 10 samples, ")
    images_a_second = int(last.split(", ")[1].removesuffix(" images/s"))
    assert 10 < images_a_second < 503
    assert ", device waited 30%, 100 % done" in last


@pytest.mark.usefixtures("every_time")
def test_a_slow_run_is_not_told_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with Progress("encode", 10, stream=out) as report:
        report(Advance(units=2, samples=2))
    assert out.getvalue().startswith("encode: 2 samples, 0.095 samples/s, 20 % done")  # 21 s on this clock


@pytest.mark.usefixtures("every_time")
def test_an_unknown_total_promises_no_time() -> None:
    out = io.StringIO()
    with Progress("encode", 0, stream=out) as report:
        report(Advance(units=5, samples=5))
    assert "left" not in out.getvalue()
    assert "%" not in out.getvalue()


@pytest.mark.usefixtures("every_time")
@pytest.mark.parametrize("is_terminal", [False, True])
def test_quiet_shows_nothing(is_terminal: bool) -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        out = terminal if is_terminal else io.StringIO()
        with Progress("encode", 10, quiet=True, stream=out) as report:
            report(Advance(units=5, samples=5))
        os.write(follower, b".")
        assert os.read(leader, 100) == b"."
        if isinstance(out, io.StringIO):
            assert out.getvalue() == ""
    os.close(leader)


def test_a_terminal_gets_a_bar() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, Progress("encode", 10, stream=terminal) as report:
        report(Advance(units=5, samples=5, rejects=1))
        report(Advance(units=5, samples=5))
        shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "encode" in shown
    assert "left" in shown
    assert "|" in shown


def test_a_short_run_prints_no_line_at_all() -> None:
    out = io.StringIO()
    with Progress("encode", 10, stream=out) as report:
        report(Advance(units=10, samples=10))
    assert out.getvalue() == ""

"""Tests here write many small datasets, most of whose time a busy disk would take to flush them; tests/storage holds that."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)

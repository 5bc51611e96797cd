"""Documents as anybody may have written them: readers and changes of tests/format/test_untrusted.py, with seeds of our own."""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT

_TESTS = ROOT / "tests/format/test_untrusted.py"


class Documents:
    """See the module. A case is one reader, and some 40 to 120 documents for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = re.split(r"^def (test_\w+)", _TESTS.read_text(), flags=re.MULTILINE)[1:]
        self._tests = [name for name, body in zip(found[::2], found[1::2], strict=True) if re.search(r"\b(check|fuzz)\(", body)]
        assert len(self._tests) >= 9, "the tests that change documents are not found"

    def plan(self, rng: random.Random, number: int) -> tuple[str, Callable[[], None]]:
        name = self._tests[number % len(self._tests)]
        seed = rng.randrange(1 << 30)
        return f"{name.removeprefix('test_')}, --hypothesis-seed={seed}", lambda: self._check(name, seed)

    def _check(self, name: str, seed: int) -> None:
        words = [
            f"{_TESTS}::{name}",
            f"--hypothesis-seed={seed}",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:faulthandler",
            "--timeout=0",
        ]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = pytest.main([*words, f"--rootdir={ROOT}", f"--basetemp={self._folder}"])
        assert status == 0, said.getvalue()

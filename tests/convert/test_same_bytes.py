"""Every conversion makes the same bytes however the work is shared, and whatever stops it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from commands import disturb, tree, wds_tools
from conversions import CONVERSIONS, Words, conversion

SEED = 20261126


@pytest.fixture(scope="module", params=list(CONVERSIONS))
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Words, Path, float]:
    """The command line, what it makes, and for how long it works."""
    folder = tmp_path_factory.mktemp("input")
    args = conversion(request.param, folder / "in")
    begun = time.monotonic()
    wds_tools(*args, "--output", folder / "out")
    work_s = time.monotonic() - begun
    names = tree(folder / "out")
    assert sum(name.endswith(".tar") for name in names) >= 3, "one task would prove little"
    assert any(name.startswith("rejects/task") for name in names)
    return args, folder / "out", work_s


@pytest.mark.slow
def test_in_parts(undisturbed: tuple[Words, Path, float], tmp_path: Path) -> None:
    args, expected, _ = undisturbed
    for part in ("2/2", "1/2"):
        wds_tools(*args, "--output", tmp_path / "out", "--part", part)
    wds_tools("finalize", "--output", tmp_path / "out", "--max-rejects", "50%")
    assert tree(tmp_path / "out") == tree(expected)


@pytest.mark.slow
def test_on_several_workers_that_are_killed(undisturbed: tuple[Words, Path, float], tmp_path: Path) -> None:
    args, expected, work_s = undisturbed
    rng = random.Random(f"{SEED} {args[1]}")
    disturb([str(word) for word in args], tmp_path / "out", workers=2, num_kills=1, work_s=work_s, rng=rng)
    assert tree(tmp_path / "out") == tree(expected)

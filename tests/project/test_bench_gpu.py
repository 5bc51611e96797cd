"""`make bench-gpu` runs where it will have to: its stages in a reduced size, with no package that a bare CUDA machine lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment

from benchmarks.gpu import Report, run

MISSING = ("ray", "datasets", "boto3", "botocore", "s3fs", "aiohttp", "lightning", "megatron", "torchdata", "xdist")
"""Of our development environment; a bare machine has none of them."""
STAGES = {"bare", "whole", "shapes", "codes", "faults", "others", "compiles"}


def test_a_stage_that_fails_says_so_and_the_next_one_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def bad():  # type: ignore[no-untyped-def]
        yield "first", {"images_per_s": 2.0}
        raise RuntimeError("CUDA error: an illegal memory access")

    def good():  # type: ignore[no-untyped-def]
        yield "second", {"images_per_s": 3.0}

    report = Report(tmp_path / "gpu.json", {"device": "none"})
    run([bad, good], report)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["what"] for row in written["rows"]] == ["first", "failed", "second"]
    assert "illegal memory access" in written["rows"][1]["error"]
    assert written["end"] == "unfinished", "what was measured is there before the end"
    assert "good: second: images_per_s 3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_every_stage_runs_in_a_reduced_size_without_packages_that_a_bare_machine_lacks(tmp_path: Path) -> None:
    names = repr(dict.fromkeys(MISSING))
    code = f"import sys; sys.modules.update({names}); from benchmarks.gpu import main; main(sys.argv[1:])"
    arguments = ["--device", "cpu", "--quick", "--minutes", "30", "--out", str(tmp_path)]  # other work may be going on here
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["end"] == "complete", done.stdout
    failed = [row for row in written["rows"] if row["what"] == "failed"]
    assert not failed, failed
    assert {row["stage"] for row in written["rows"]} == STAGES
    rows = {row["what"]: row for row in written["rows"]}
    assert rows["out of memory at batch 4"]["went_on_with"] == 2
    assert rows["out of memory at batch 4"]["equal_codes"] == 1
    assert "gave NaN or infinite numbers" in rows["NaN"]["error"]
    assert rows["codes of tiny, fp32"]["equal_to_cpu_fp32"] == 1
    assert all(row["images_per_s"] > 0 for row in rows.values() if "images_per_s" in row)


@pytest.mark.slow
def test_it_ends_when_its_time_is_up_with_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--minutes", "0.02", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert "minutes are over" in done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["end"] == "time was up"

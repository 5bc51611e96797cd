"""Every block of the documentation that is marked `python` or `bash` runs, page by page, in a folder such as the pages speak of;
commands in `text` are parsed.

That of the README is the path of a newcomer: in a folder with pictures and captions, what it says, in its order, nothing else.
Quick tests go as far as the first batch. An `output` block is what the block before it prints, but for `…`, which stands for
anything on its line.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import webdataset as wds
from commands import ROOT, image_bytes, write_documents, write_jsonl
from factory import image_sample, make_dataset, text_sample
from plugin import write_example
from tokens import write_tokenizer

from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.storage import open_store

PAGES = sorted(
    page.relative_to(ROOT).as_posix() for folder in (ROOT, ROOT / "docs", ROOT / "docs/decisions") for page in folder.glob("*.md")
)
TINY = 4096
"""Codes of the bundled tokenizer."""
TO_A_BATCH = 4
"""Blocks of the README that a newcomer begins with."""
SCALING = "docs/scaling.md"
"""Its blocks run too, but clusters are not at hand: Ray, Slurm, ssh and pip are stand-ins, and our commands are parsed only."""
CLUSTER = {
    "pip": "true",
    "ray": "true",
    "ssh": 'shift; exec sh -c "$*"',
    "sbatch": 'for word; do last=$word; done; case $last in wds-tools*) exec sh -c "$last";; *) echo 7;; esac',
}
PARSE_ONLY = """
import sys
from wds_tools.cli import main
for words in main.COMMANDS:
    if words == tuple(sys.argv[1 : 1 + len(words)]):
        main.load_command(words).run = lambda config: 0
status = main.main()
with open("refused" if status else "parsed", "a") as file:
    print(*sys.argv[1:], file=file)
sys.exit(status)
"""
END_OF_BLOCK = "\x1e"
"""What a page's program prints after each of its blocks."""
_BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of a page's blocks."""
    return _BLOCK.findall((ROOT / page).read_text())


def script(of_page: Sequence[tuple[str, str]]) -> str:
    """A program that runs blocks of a page in their order: Python here, bash in a shell."""
    lines = ["import subprocess as _subprocess"]
    for language, content in of_page:
        if language == "python":
            lines.append(content)
        elif language == "bash":
            lines.append(f"_subprocess.run(['bash', '-euc', {content!r}], check=True)")
        else:
            continue
        lines.append(f"print({END_OF_BLOCK!r}, flush=True)")
    return "\n".join(lines)


def shown_outputs(of_page: Sequence[tuple[str, str]]) -> dict[int, str]:
    """Number of a block that runs -> what the page says it prints, as a pattern."""
    outputs: dict[int, str] = {}
    number = -1
    for language, content in of_page:
        if language == "output":
            outputs[number] = re.escape(content).replace("…", ".*")
        number += language in ("python", "bash")
    return outputs


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages use of `make demo`."""
    folder = tmp_path_factory.mktemp("demo") / "demo-out"
    made = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": TINY, "stride": 16, "precision": "fp32"}}
    samples = [image_sample(number, side=32) for number in range(20)]
    samples = [sample._replace(codes={name: grid % TINY for name, grid in sample.codes.items()}) for sample in samples]
    make_dataset(folder / "pairs-512", samples, codes=made)
    make_dataset(folder / "dclm", [text_sample(number) for number in range(20)])
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Pictures with captions, and our command line: all that the README begins with. `pip install` is a stand-in."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / f"photos/{number:04d}.jpg").write_bytes(image_bytes(number, 600, 520))
        (tmp_path / f"photos/{number:04d}.txt").write_text(f"picture {number}\n")
    (tmp_path / "bin").mkdir()
    for name, does in {"wds-tools": f'exec "{sys.executable}" -m wds_tools "$@"', "pip": "true"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def place(start: Path, demo: Path) -> Path:
    """Beside them documents, somebody's tars, a Hugging Face folder, and a pair of which half is broken.

    `pip install ./examples/plugin` is a stand-in: the example's package is there.
    """
    tmp_path = start
    write_documents(tmp_path / "dclm/a.jsonl.zst", [{"text": f"document {number}"} for number in range(30)])
    (tmp_path / "laion").mkdir()
    with wds.TarWriter(str(tmp_path / "laion/00000.tar")) as writer:
        for number in range(20):
            fields = {"caption": f"picture {number}", "url": f"https://example.org/{number}", "similarity": 0.25 + number / 100}
            writer.write({"__key__": f"{number:09d}", "jpg": image_bytes(number, 600, 520), "json": fields})
    lines = [{"image_path": f"photos/{number:04d}.jpg", "text": f"picture {number}"} for number in range(0, 24, 3)]
    write_jsonl(tmp_path / "mixed.jsonl", lines)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Noise."}]
    records = [{"id": str(number), "image": f"{number:04d}.jpg", "conversations": turns} for number in range(3)]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    (tmp_path / "any-webdataset-tars").mkdir()
    with wds.TarWriter(str(tmp_path / "any-webdataset-tars/0.tar")) as writer:
        writer.write({"__key__": "0", "txt": "caption"})
    (tmp_path / "demo-out").symlink_to(demo)
    export_hf(ExportConfig(input=(str(demo / "pairs-512"),), output=str(tmp_path / "liquid-data"), num_shards=2, quiet=True))
    write_tokenizer(tmp_path / "gemma", added=())
    write_example(tmp_path)
    return tmp_path


@pytest.mark.timeout(480)
@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != SCALING and any(kind in ("python", "bash") for kind, _ in blocks(page))]
)
def test_every_block_of_a_page_runs(page: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue("start" if page == "README.md" else "place")
    if page != "README.md":
        request.getfixturevalue("s3")
        open_store("s3://bucket").put("made", b"")  # the server makes buckets on the way
    run_blocks(blocks(page), place)


def test_a_newcomer_gets_from_pictures_to_a_batch_as_the_readme_says(start: Path) -> None:
    run_blocks(blocks("README.md")[:TO_A_BATCH], start)


def run_blocks(of_page: Sequence[tuple[str, str]], place: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(place / "cache"),
    }
    program = place / "page.py"
    program.write_text(script(of_page))
    done = subprocess.run([sys.executable, program], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.split(f"{END_OF_BLOCK}\n")
    for number, shown in shown_outputs(of_page).items():
        assert re.fullmatch(shown, printed[number]), f"block {number} printed:\n{printed[number]}"


FRAMEWORKS = {
    "own loop": "train()",
    "transformers": "trainer_of",
    "Accelerate": "Accelerator()",
    "Lightning": "lightning.Trainer",
}
"""What is in the block of each."""
ON_RANKS = """
import multiprocessing

import torch

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    torch.set_num_threads(1)
    if {own_loop!r}:
        torch.distributed.init_process_group("gloo")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_snippet_of_each_framework_runs_on_two_processes_however_workers_are_started(
    framework: str, method: str, place: Path
) -> None:
    page = blocks("docs/training.md")
    python = [content for language, content in page if language == "python"]
    common = python[0].partition("if __name__")[0]
    of_framework = next(block for block in python if FRAMEWORKS[framework] in block).removeprefix(common)
    (before,) = [content for language, content in page if language == "bash" and "vocabulary gemma/" in content]
    (prompts,) = [content for language, content in page if language == "bash" and "prompts.json" in content]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "-euc", before + prompts], cwd=place, env=environment, check=True, capture_output=True)
    head = ON_RANKS.format(method=method, own_loop=framework == "own loop")
    (place / "train.py").write_text("\n".join([head, common, of_framework]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, "train.py"], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
    saves = {"own loop": "run", "transformers": "out/checkpoint-4", "Accelerate": "accelerate-state", "Lightning": "."}
    found = {path.name for path in (place / saves[framework]).iterdir()}
    assert found & {"loader-000001.json", "custom_checkpoint_0.pkl", "last.ckpt"}
    assert "does not know where" not in done.stderr


def parse_only(place: Path) -> Path:
    """A program that takes our commands' arguments and says whether they are right: files `parsed` and `refused`."""
    program = place / "parse_only.py"
    program.write_text(PARSE_ONLY)
    return program


@pytest.mark.slow
def test_the_blocks_about_clusters_run_on_stand_ins_and_their_commands_are_those_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    ours = f'exec "{sys.executable}" "{parse_only(tmp_path)}" "$@"'
    for name, does in {**CLUSTER, "wds-tools": ours}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "hosts").write_text("one\ntwo\n")
    (tmp_path / "page.py").write_text(script(blocks(SCALING)))
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "SLURM_ARRAY_TASK_ID": "64"}
    command = [sys.executable, tmp_path / "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "refused").exists(), done.stderr
    found = (tmp_path / "parsed").read_text().splitlines()
    parts = {line.partition(" --part ")[2] for line in found if " --part " in line}
    assert parts == {"3/64", "64/64", "0/2", "1/2"}
    assert sum(line.startswith("finalize") for line in found) == 2
    assert sum("--executor ray" in line for line in found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(kind == "text" for kind, _ in blocks(page))])
def test_commands_that_are_only_shown_are_those_that_there_are(page: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for line in "".join(content for kind, content in blocks(page) if kind == "text").splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "wds-tools":
            command = [sys.executable, parse_only(tmp_path), *words]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, line + done.stderr
        else:
            assert program == "python", line
            command = [sys.executable, ROOT / words[0], "--help"]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            assert {word for word in words[1:] if word.startswith("--")} <= set(re.findall(r"--[\w-]+", done.stdout)), line


def test_the_readme_begins_with_a_newcomers_path_from_pictures_to_a_batch() -> None:
    section = (ROOT / "README.md").read_text().partition("to a training batch\n")[2].partition("\n## ")[0]
    path = _BLOCK.findall(section)
    assert path == blocks("README.md")[:TO_A_BATCH]
    assert [language for language, _ in path] == ["bash", "output", "python", "output"]


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    readme = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme)
    assert len(readme.splitlines()) <= 200
    assert len(pictures) == 3
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 300_000


def test_what_the_readme_sets_for_a_model_is_what_the_page_on_tokenizers_says() -> None:
    section = (ROOT / "README.md").read_text().partition("Your model wants … → set …\n")[2].partition("\n## ")[0]
    settings = re.findall(r"`--encode ([^`]+)`", section.partition("| your model")[2])
    page = (ROOT / "docs/tokenizers.md").read_text()
    assert len(settings) >= 7
    assert [words for words in settings if f"`--tokenizer {words}`" not in page] == []


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are_and_none_hides_a_command_by_its_indent(page: str) -> None:
    assert {language for language, _ in blocks(page)} <= {"python", "bash", "output", "text", "json", "yaml", "toml"}
    text = _BLOCK.sub("", (ROOT / page).read_text())
    assert re.findall(r"^ {4,}(?:wds-tools|pip|make|python|torchrun) .*$", text, re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_are_there(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / page).read_text())
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_every_test_and_module_that_the_page_on_reliability_names_is_there() -> None:
    page = (ROOT / "docs/reliability.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", page)
    assert len(named) > 60
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert [(file, test) for file, test in named if f"\ndef {test}(" not in tests[file]] == []
    modules = [name for name in re.findall(r"`([\w/]+\.py)`", page) if not name.startswith("test_")]
    places = {name: {"loaders": ROOT, "chaos": ROOT / "tests"}.get(name.split("/")[0], ROOT / "wds_tools") for name in modules}
    assert [name for name, place in places.items() if not (place / name).is_file()] == []


def test_the_page_on_the_flow_says_for_a_dozen_tasks_in_which_files_they_begin() -> None:
    table = (ROOT / "docs/flow.md").read_text().partition("| to add or change | begin in |\n")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w/.]+)`", line.rpartition(" | ")[2]) for line in table.splitlines()[1:]]
    assert len(rows) >= 12
    assert min(map(len, rows)) > 0
    assert [name for row in rows for name in row if not (ROOT / name).is_file()] == []


def test_every_file_of_ours_that_a_page_names_is_there() -> None:
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"`([\w./]+/\w+\.(?:py|js|css|html))`", page.read_text())}
    homes = [ROOT / home for home in ("", "wds_tools", "loaders", "tests")]
    assert {name for name in named if "NAME" not in name and not any((home / name).is_file() for home in homes)} == set()
    assert len(named) > 50


def test_every_row_of_the_page_on_reliability_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
    headers = [row for row in rows if row.endswith("| test |")]
    assert (len(headers), len(rows) > 50) == (5, True)
    assert [row for row in rows if row not in headers and "`test_" not in row.split(" | ")[-1]] == []


def test_every_reason_of_a_reject_is_documented_and_provoked() -> None:
    code = "".join(path.read_text() for folder in ("wds_tools", "loaders") for path in (ROOT / folder).rglob("*.py"))
    table = (ROOT / "docs/flow.md").read_text().partition("| reason | found by |")[2]
    documented = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert len(documented) > 35
    assert set(re.findall(r'Reject\(\s*"(\w+)"', code)) - documented == set()
    assert {name for name in documented if f'"{name}"' not in code} == set()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_docs.py")
    assert {name for name in documented if not re.search(rf"[\"']{name}\b", tests)} == set()

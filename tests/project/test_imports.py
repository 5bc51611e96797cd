"""The floors of the house: every import, also those inside functions, points down. See docs/flow.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# room -> rooms it may import from (beside itself)
BASE = {"wds_tools.errors", "wds_tools.terminal"}
FORMAT = BASE | {"wds_tools.format"}
STORAGE = BASE | {"wds_tools.storage"}
DATASET = FORMAT | STORAGE | {"wds_tools.run", "wds_tools.dataset"}
SOURCES = DATASET | {"wds_tools.sources", "wds_tools.records"}
JOBS = SOURCES | {"wds_tools.jobs"}
BELOW_LOADERS = SOURCES | {"wds_tools.images", "wds_tools.sequences"}
LOADERS = ("config", "world", "order", "reading", "batches", "tokens", "proof", "cost", "workers")
DOORS = BELOW_LOADERS | {f"loaders.{name}" for name in LOADERS}
ALLOWED = {
    "wds_tools": FORMAT | {"wds_tools.select"},
    "wds_tools.__main__": BASE | {"wds_tools.cli"},
    "wds_tools.errors": set(),
    "wds_tools.terminal": set(),
    "wds_tools.plugins": BASE,
    "wds_tools.format": BASE,
    "wds_tools.storage": BASE,
    "wds_tools.images": BASE,
    "wds_tools.vq": FORMAT | {"wds_tools.plugins"},
    "wds_tools.dataset": FORMAT | STORAGE | {"wds_tools.run"},
    "wds_tools.run": BASE,
    "wds_tools.jobs": JOBS,
    "wds_tools.sequences": FORMAT | {"wds_tools.plugins"},
    "wds_tools.records": FORMAT | STORAGE | {"wds_tools.images"},
    "wds_tools.sources": DATASET | {"wds_tools.records", "wds_tools.images"},
    "wds_tools.convert": JOBS | {"wds_tools.images", "wds_tools.plugins"},
    "wds_tools.encode": JOBS | {"wds_tools.images", "wds_tools.plugins", "wds_tools.vq"},
    "wds_tools.select": JOBS,
    "wds_tools.pack": JOBS | {"wds_tools.plugins", "wds_tools.sequences"},
    "wds_tools.export": SOURCES,
    "wds_tools.check": JOBS | {"wds_tools.images", "wds_tools.vq", "wds_tools.sequences", "wds_tools.encode"},
    "wds_tools.view": JOBS | {f"wds_tools.{room}" for room in ("images", "vq", "check", "select", "sequences")},
    "wds_tools.api": JOBS | {f"wds_tools.{room}" for room in ("convert", "encode", "pack", "select", "export", "check")},
    "wds_tools.cli": JOBS
    | {
        f"wds_tools.{room}"
        for room in ("plugins", "convert", "encode", "pack", "select", "sequences", "export", "check", "view", "vq")
    }
    | {"wds_tools"},
    "loaders.config": BELOW_LOADERS,
    "loaders.world": BASE,
    "loaders.order": BELOW_LOADERS | {"loaders.config"},
    "loaders.reading": BELOW_LOADERS | {"loaders.config", "loaders.order"},
    "loaders.batches": BELOW_LOADERS | {"loaders.config", "loaders.order", "loaders.reading"},
    "loaders.tokens": BELOW_LOADERS | {"loaders.config", "loaders.order", "loaders.reading", "loaders.batches"},
    "loaders.proof": BELOW_LOADERS | {"loaders.config", "loaders.world", "loaders.order"},
    "loaders.cost": BELOW_LOADERS | {"loaders.config", "loaders.order", "loaders.reading", "loaders.proof"},
    "loaders.workers": BELOW_LOADERS | {f"loaders.{name}" for name in LOADERS[:-1] if name != "cost"},
    "loaders": DOORS,
    "loaders.trainers": DOORS | {"loaders"},
}
# module -> rooms that it may import from beside those of its own room
ALSO_ALLOWED = {
    "wds_tools.cli.at": DOORS | {"loaders"},
    "wds_tools.cli.audit": DOORS | {"loaders"},
    "wds_tools.cli.seen": DOORS | {"loaders"},
    "wds_tools.cli.simulate": DOORS | {"loaders"},
}

# heavy package -> the only places that import it
HEAVY = {
    "PIL": {"wds_tools.images"},
    "torch": {"wds_tools.vq", "wds_tools.encode", "wds_tools.check", "wds_tools.view", "wds_tools.cli.doctor", "loaders"},
    "diffusers": {"wds_tools.vq"},
    "datasets": {"wds_tools.export"},
    "huggingface_hub": {"wds_tools.export"},
    "pyarrow": {"wds_tools.sources"},
    "webdataset": {"loaders"},
    "obstore": {"wds_tools.storage"},
    "fsspec": {"wds_tools.storage"},
    "ray": {"wds_tools.run"},
    "zstandard": {"wds_tools.sources"},
    "tokenizers": {"wds_tools.sequences"},
    "transformers": {"wds_tools.vq", "wds_tools.sequences", "loaders"},
    "accelerate": set(),
    "lightning": set(),
    "tarfile": set(),
    "pickle": {"wds_tools.run.by_file"},  # from a process to those that it spawns, as multiprocessing itself does; never data
}


def room_of(module: str) -> str:
    """ "wds_tools.format.tar" is in "wds_tools.format", "loaders.order.plan" in "loaders.order", "loaders.tars" in "loaders"."""
    room = ".".join(module.split(".")[:2])
    return room if room in ALLOWED else "loaders" if module.split(".")[0] == "loaders" else room


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module


def modules() -> list[tuple[str, Path]]:
    paths = sorted(path for folder in ("wds_tools", "loaders") for path in (ROOT / folder).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return list(zip(names, paths, strict=True))


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_import_points_down(name: str, path: Path) -> None:
    room = room_of(name)
    allowed = ALLOWED[room] | ALSO_ALLOWED.get(name, set())
    for imported in imports_of(path):
        top = imported.split(".")[0]
        if top in ("wds_tools", "loaders"):
            target = room_of(imported)
            assert target == room or target in allowed, f"{name} imports {imported}: {room} may not use {target}"
        elif top in HEAVY:
            assert {name, room, room.split(".")[0]} & HEAVY[top], f"{name} imports {top}, which only {HEAVY[top] or 'nobody'} may"


def test_the_order_needs_numpy_and_nothing_heavier() -> None:
    imported = {name for file in ("plan.py", "spec.py") for name in imports_of(ROOT / "loaders" / "order" / file)}
    others = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert others == {"numpy", "numpy.typing", "loaders.order.spec", "wds_tools.errors", "wds_tools.format.typed_json"}


def test_only_the_world_and_its_doors_look_at_the_environment_and_at_torch_distributed() -> None:
    """Below them rank, world, seed and epoch are arguments."""
    words = "os.environ", "getenv", "import torch.distributed", "from torch.distributed", "from torch import distributed"
    found = {
        str(path.relative_to(ROOT / "loaders"))
        for _, path in modules()
        if path.is_relative_to(ROOT / "loaders") and any(word in path.read_text() for word in words)
    }
    assert {name for name in found if not name.startswith("trainers/")} == {"world.py"}


def test_every_room_has_a_rule() -> None:
    assert {room_of(name) for name, _ in modules()} == set(ALLOWED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("wds_tools", ("torch", "PIL", "obstore", "zstandard")),
        ("wds_tools.storage", ("torch", "obstore", "fsspec")),
        ("wds_tools.convert.documents", ("torch", "PIL", "datasets", "ray")),
        ("wds_tools.view.server", ("torch", "PIL", "obstore")),
        ("wds_tools.vq", ("diffusers", "transformers")),
        ("loaders", ("PIL", "diffusers", "datasets", "ray")),
    ],
)
def test_importing_a_room_does_not_load_what_it_does_not_need(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted({set(heavy)!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_real_inputs_are_reached_in_one_place() -> None:
    others = [
        path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__) and '"shared" / "data"' in path.read_text()
    ]
    assert others == [ROOT / "tests/commands.py"]


def test_the_folders_of_tests_are_those_of_the_packages() -> None:
    packages = {path.parent.relative_to(ROOT) for _, path in modules()}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {folder for folder in folders if folder not in packages and Path("wds_tools") / folder not in packages} == {
        Path("project")
    }


def test_a_folder_has_ten_modules_at_most_and_a_module_four_hundred_lines() -> None:
    """Not counted: __init__, and cli, with its one file a subcommand."""
    counts = Counter(path.parent.relative_to(ROOT) for _, path in modules() if path.name != "__init__.py")
    assert {str(folder) for folder, count in counts.items() if count > 10} <= {"wds_tools/cli"}
    assert [name for name, path in modules() if len(path.read_text().splitlines()) > 400] == []

"""`wds-tools doctor`: everything that a question to the maintainers should begin with, and no secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated

import torch

from wds_tools import __version__
from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, show
from wds_tools.dataset.files import check_complete
from wds_tools.dataset.layout import MANIFEST, PLAN
from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import FormatError, NotFound, WdsToolsError
from wds_tools.plugins import Names
from wds_tools.storage import Store, open_store, redact
from wds_tools.terminal import counted
from wds_tools.vq.registry import load_tokenizer

EXAMPLE = "wds-tools doctor s3://bucket/pairs"
_VARIABLES = re.compile(r"(AWS|GOOGLE|AZURE|WDS_TOOLS|HF|OMP|NCCL|CUDA|RAY)_\w+|RANK|WORLD_SIZE|LOCAL_RANK|TMPDIR")
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASS|CREDENTIAL|SAS")
_OF_DEVELOPERS = ("dev", "docs")
_SIDE = 512
_PROBE = "wds-tools-doctor"


@dataclass(frozen=True, kw_only=True)
class Config(Printed):
    """Show what is installed, the devices, the speed of a tokenizer, and whether the given places are in order.

    Exit status 1 if it is not, or if a package is missing that every command needs."""

    input: Positional[tuple[str, ...]] = ()
    """Directories or URLs to check: can they be read, is a dataset complete, do all its files have the right size?"""
    tokenizer: Annotated[str, Names("wds_tools.vq.registry:tokenizer_names")] = "tiny"
    """Image tokenizer to load and to time on this machine, in fp32."""
    weights: str | None = None
    """Its weights; all tokenizers except tiny need them."""
    device: str = "auto"
    """Where it runs: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    write: bool = False
    """Also try to write there: a small file is written and deleted."""


@dataclass(frozen=True, kw_only=True)
class _Fact:
    name: str
    text: str
    is_fine: bool = True


def run(config: Config) -> int:
    """Look, and report."""
    facts = [
        *_machine(),
        *_packages(),
        *_devices(),
        _cost(config),
        *_environment(),
        *(_place(url, config.write) for url in config.input),
    ]
    problems = [f"{fact.name}: {fact.text}" for fact in facts if not fact.is_fine]
    width = max(len(fact.name) for fact in facts)
    lines = [f"{fact.name:<{width}}  {'' if fact.is_fine else 'WRONG: '}{fact.text}" for fact in facts]
    verdict = f"doctor: {counted(len(problems), 'problem')}" if problems else "doctor: all is well"
    show(config, {"facts": [asdict(fact) for fact in facts], "problems": problems}, [*lines, verdict])
    return 1 if problems else 0


def _machine() -> Iterator[_Fact]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _Fact(name="wds-tools", text=__version__)
    yield _Fact(name="python", text=f"{platform.python_version()}, {platform.platform()}")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _Fact(name="machine", text=f"{cpus} CPUs, {memory / 2**30:.1f} GiB of memory, {files:,} open files allowed")
    folders = {"temporary": tempfile.gettempdir(), "shared memory": "/dev/shm"}  # noqa: S108  # looked at, not written to
    found = [
        f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB in {folder} ({name})"
        for name, folder in folders.items()
        if Path(folder).is_dir()
    ]
    yield _Fact(name="free", text=", ".join(found))


def _packages() -> Iterator[_Fact]:
    """What this package requires, by extra."""
    try:
        requirements = importlib.metadata.requires("wds-tools") or []
    except importlib.metadata.PackageNotFoundError:
        yield _Fact(name="packages", text="wds-tools runs from its source tree: pip install it to see what it requires")
        return
    groups: dict[str, list[str]] = {"": []}
    for requirement in requirements:
        required = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if required and required[0] != "wds-tools" and not (extra and extra[1] in _OF_DEVELOPERS):
            groups.setdefault(extra[1] if extra else "", []).append(required[0])
    for group, names in groups.items():
        versions = {name: _version(name) for name in names}
        have = ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "nothing"
        missing = ", ".join(name for name, version in versions.items() if not version)
        install = f"pip install 'wds-tools[{group}]'" if group else "pip install wds-tools"
        text = f"no {missing}: {install}; there is {have}" if missing else have
        yield _Fact(name=f"[{group}]" if group else "packages", text=text, is_fine=bool(group) or not missing)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[_Fact]:
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        text = f"cuda:{number} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, {bf16}"
        yield _Fact(name="devices", text=text)
    if not torch.cuda.device_count():
        yield _Fact(name="devices", text="no GPU that torch can use: `encode --device cpu` works, at a few images a second")


def _cost(config: Config) -> _Fact:
    """What encoding takes here, of the best of three images, so that the first may load what it needs."""
    try:
        tokenizer = load_tokenizer(config.tokenizer, weights=config.weights, device=config.device)
        pixels_BHWC = torch.randint(0, 256, (1, _SIDE, _SIDE, 3), dtype=torch.uint8)
        begun = [time.perf_counter()]
        for _ in range(3):
            tokenizer.encode(pixels_BHWC).cpu()
            begun.append(time.perf_counter())
    except WdsToolsError as error:
        return _Fact(name="tokenizer", text=str(error), is_fine=False)
    took_s = min(after - before for before, after in pairwise(begun))
    cost = f"{took_s:.2g} s an image of {_SIDE} x {_SIDE} pixels on {tokenizer.device}, {took_s / 3.6e-3:,.1f} hours a million"
    others = "" if config.weights else "; of others this is measured with --tokenizer NAME --weights PATH"
    return _Fact(name="tokenizer", text=f"{tokenizer.name}: {cost} (measured now, fp32, one at a time){others}")


def _environment() -> Iterator[_Fact]:
    """The variables that decide on storage and processes; of those that may be secret, that they are set."""
    for name in sorted(filter(_VARIABLES.fullmatch, os.environ)):
        value = "set" if _SECRET.search(name) else redact(os.environ[name])
        yield _Fact(name=name, text=value if os.environ[name] else "set, but empty")


def _place(url: str, write: bool) -> _Fact:
    """Whether a place can be read, and written if that is asked."""
    name = redact(url)
    try:
        store = open_store(url)
        writable = ""
        if write:  # first, since some servers make a bucket on the way
            begun = time.monotonic()
            store.put(_PROBE, b"written by wds-tools doctor, to be deleted at once")
            store.delete(_PROBE)
            writable = f"; writable in {1000 * (time.monotonic() - begun):,.0f} ms"
        begun = time.monotonic()
        what = _read(store, write)
        found = f"readable in {1000 * (time.monotonic() - begun):,.0f} ms: {what}{writable}"
    except WdsToolsError as error:
        return _Fact(name=name, text=str(error), is_fine=False)
    return _Fact(name=name, text=found)


def _read(store: Store, write: bool) -> str:
    if store.exists(MANIFEST):
        manifest = read_manifest(store, any_members=True)
        for row in manifest.shards[:1]:
            store.read_range(row.name, 0, 1)
        check_complete(store, manifest)
        return f"a dataset of {counted(manifest.samples, 'sample')} in {counted(len(manifest.shards), 'shard')}"
    if store.exists(PLAN):
        raise FormatError("a dataset that is not finished: run its command again with --resume")
    for entry in islice(store.list(), 1):
        store.read_range(entry.name, 0, min(entry.size, 1))
        look = f"`wds-tools inspect {redact(store.url)}` says what they would become"
        return f"no dataset, but files such as {entry.name}: {look}"
    if not write:
        raise NotFound("nothing is there: correct the path, or try with --write whether something can be put there")
    return "nothing is there"

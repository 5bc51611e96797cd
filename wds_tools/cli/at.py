"""`wds-tools at`."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from loaders.proof.history import Place, Run, Step
from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, show
from wds_tools.errors import UsageError
from wds_tools.storage import open_store, split_url
from wds_tools.storage.place import check_apart
from wds_tools.terminal import counted
from wds_tools.view.batch import look, page, text_of
from wds_tools.view.pages import Pages, PagesConfig

EXAMPLE = "wds-tools at checkpoints/state-41000.json --step 41234 --html batch.html"
_READERS = 16
_SHOWN_CHARS = 60
_LEFT_OUT = {"grids", "members", "raw", "start", "total", "columns", "images", "number"}
"""Of what the viewer says of a sample, what says nothing of a batch."""


@dataclass(frozen=True, kw_only=True)
class Config(PagesConfig, Printed):
    """Show the samples of a step of a training run: keys, texts, their origin, and whether their bytes are intact."""

    input: Positional[str]
    """A state, save or receipt of the run, as JSON. For a later step, the settings of this state are assumed to continue."""
    step: int
    """Number of the step in the training, from 0: the number of batches before it."""
    rank: int | None = None
    """Show only this rank; by default the whole batch."""
    source: tuple[str, ...] = ()
    """Where data of the run lies that is no longer at the URL in the state. It is recognised by its fingerprint."""
    exclude: str | None = None
    """File of keys that the run excluded, as its Source(exclude=...), if it did so before the step."""
    html: str | None = None
    """Write a page to this file, with all texts and the decoded pictures of the first 256 samples."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise UsageError(f"--step {self.step}: 0 or more")


def run(config: Config) -> int:
    """Look up the batch, and what is in it."""
    history = Run.open(config.input, config.source, config.exclude)
    found, stores = history.at(config.step, config.rank), [opened.store for opened in history.order.sources]
    if config.html is not None:
        check_apart([config.input, *(store.url for store in stores)], config.html, option="--html")
    with ExitStack() as stack, ThreadPoolExecutor(_READERS) as readers:
        numbers = sorted({place.source for place in found.places})
        pages = {number: stack.enter_context(closing(Pages(stores[number], config))) for number in numbers}

        def sample(rank: int, place: Place) -> dict[str, Any]:
            number = pages[place.source].reader.first_of(place.shard) + place.sample_index
            return {"rank": rank, "source": history.names[place.source], **look(pages[place.source], number)}

        samples = list(readers.map(sample, found.ranks, found.places))
        lines, title = list(map(_line, samples)), _title(found)
        if config.html is not None:
            sets = (pages[place.source] for place in found.places)
            folder, name = split_url(config.html)
            open_store(folder).put(name, "".join(page(title, zip(lines, sets, samples, strict=True))).encode())
    facts = {name: getattr(found, name) for name in ("step", "is_to_come", "epoch", "position", "excluded")}
    facts |= {"batch_size": found.start.batch_size, "world_size": found.start.world_size}
    kept = [{name: value for name, value in sample.items() if name not in _LEFT_OUT} for sample in samples]
    show(config, {**facts, "samples": kept}, (title, *lines, *([f"page: {config.html}"] if config.html is not None else [])))
    return 0


def _title(found: Step) -> str:
    excluded = f"; {found.excluded:,} stand in for excluded samples" if found.excluded else ""
    to_come = "; this step comes after the state" if found.is_to_come else ""
    ranks = counted(found.start.world_size, "rank")
    return (
        f"step {found.step:,}: epoch {found.epoch}, from position {found.position:,} of the run on, in batches of "
        f"{found.start.batch_size:,} over {ranks} since step {found.start.step:,}{excluded}{to_come}"
    )


def _line(sample: Mapping[str, Any]) -> str:
    damage = "its bytes are damaged: they have another CRC-32" if sample["intact"] is False else ""
    what = damage or sample.get("problem") or repr(text_of(sample)[:_SHOWN_CHARS])
    comes_from = "".join(f"  {name}={value}" for name, value in sample.get("provenance", {}).items())
    place = f"{sample['source']}/{sample['shard']} sample {sample['sample_index']}"
    return f"rank {sample['rank']:<4} {sample['key']}  {place}  {what}{comes_from}"

"""Runs over several starts, as a training makes them, over datasets whose keys say what a sample is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from factory import make_dataset, text_sample

from loaders import LoaderConfig, Source, World, build_loader
from loaders.proof.audit import audit
from loaders.proof.receipt import parse_receipt

State = dict[str, Any]


def make(folder: Path, name: str, count: int, shard_samples: int = 4) -> str:
    """A dataset whose keys are its name and the number of the sample."""
    folder.mkdir(exist_ok=True)
    samples = (text_sample(number)._replace(key=f"{name}-{number:04d}") for number in range(count))
    make_dataset(folder / name, samples, shard_samples=shard_samples)
    return str(folder / name)


def grown(folder: Path, url: str, count: int, shard_samples: int = 4) -> str:
    """The same dataset with more samples, in a folder of its own."""
    return make(folder / "grown", Path(url).name, count, shard_samples)


def config(*sources: Source, batch_size: int = 4, **settings: Any) -> LoaderConfig:
    return LoaderConfig(**{"sources": sources, "batch_size": batch_size, "last_batch": "short", **settings})


class Training:
    """A run over several starts: what it was handed, and its receipts."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.receipts: list[State] = []
        self.state: State | None = None

    def train(self, config: LoaderConfig, steps: int, change: Any = None, world_size: int = 1) -> Sequence[str]:
        loaders = [build_loader(config, World(rank=rank, world_size=world_size)) for rank in range(world_size)]
        for loader in loaders:
            if self.state is not None:
                loader.load_state_dict(self.state, change)
        seen: list[str] = []
        for batches in islice(zip(*(chain.from_iterable(repeat(loader)) for loader in loaders), strict=True), steps):
            seen += [key for batch in batches for key in batch["__key__"]]
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(state == states[0] for state in states)
        self.state, self.keys = states[0], self.keys + seen
        self.receipts += [loader.receipt() | {"run": f"{len(self.receipts)}"} for loader in loaders]
        return seen

    def audited(self, **options: Any) -> Any:
        receipts = [parse_receipt(json.dumps(one).encode(), f"{number}.json") for number, one in enumerate(self.receipts)]
        return audit(receipts, **options)

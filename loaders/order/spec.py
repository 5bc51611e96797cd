"""What the order of samples depends on beside the data: one value, kept in states and receipts.

    LoaderConfig + manifests -> samples.order_spec -> OrderSpec -> SampleOrder
    OrderSpec.to_json -> state or receipt -> typed_json.shape -> OrderSpec: compared, or made an order of again

Invariant: equal specs over data of equal fingerprints give the same sample at every position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from wds_tools.errors import UsageError
from wds_tools.format.typed_json import Count

ORDER_VERSION = 3
"""Version of the order's arithmetic. A state saved under another one is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """The part that a source has in the order."""

    repeat: Annotated[int, range(1, 1 << 53)] = 1
    """Passes over the source per epoch; in a weighted mixture, passes after which it counts as exhausted."""
    max_samples: Count | None = None
    """Number of its samples that are used; None for all."""
    code_set: str | None = None
    """Name of the code set that is read; None for the first one."""
    texts: tuple[tuple[str, float], ...] = ()
    """(name of a text, its weight); empty: the text that is stored as such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSpec:
    """What an order depends on beside the samples and the epoch. The defaults are those of one source that is used in full."""

    seed: int
    """Seed of the order, 0 ... 2**64 - 1."""
    batch_size: Annotated[int, range(1, 1 << 40)]
    """Samples of a batch over all ranks when the run began: those of a step of the config's schedule."""
    lanes_per_sample: Annotated[int, range(1, 1 << 20)]
    """Lanes for each sample of that batch: a lane comes again after so many batches."""
    block_bytes: int
    """Size of a shuffle block: samples are permuted inside it, and a lane has one open at a time."""
    chunk_bytes: int
    """Size of a chunk, which stays together so that it can be fetched at once; whole shuffle blocks."""
    shuffle: bool = True
    """False: position p is sample p of the manifest."""
    sources: tuple[SourceSpec, ...] = (SourceSpec(),)
    schedule: tuple[tuple[Count, tuple[float, ...]], ...] = ()
    """(position from which they hold, weights of the sources), from position 0 on; empty where no source has a weight."""
    length: Annotated[int, range(1, 1 << 53)] = 1
    """Samples of an epoch."""
    transform_id: str | None = None
    """What the caller's own code does with a sample, by a name of the caller's."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"seed={self.seed} is not in 0 ... 2**64 - 1")
        if not 1 <= self.batch_size * self.lanes_per_sample < 1 << 31:
            raise UsageError(
                f"batch_size={self.batch_size} x lanes_per_sample={self.lanes_per_sample} is not in 1 ... 2**31 - 1 lanes"
            )
        if not 1 <= self.block_bytes <= self.chunk_bytes < 1 << 40:
            raise UsageError(
                f"block_bytes={self.block_bytes}, chunk_bytes={self.chunk_bytes}: expected 1 <= block <= chunk < 2**40"
            )

    @property
    def lanes(self) -> int:
        """Number of equal parts of the shuffled chunks that are read side by side; 1 without shuffling."""
        return self.batch_size * self.lanes_per_sample if self.shuffle else 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `typed_json.shape(OrderSpec, ...)` reads them back."""
        return asdict(self) | {
            "sources": [asdict(source) | {"texts": list(map(list, source.texts))} for source in self.sources],
            "schedule": [[position, list(weights)] for position, weights in self.schedule],
        }

    def differences(self, other: OrderSpec) -> Iterator[tuple[str, Any, Any]]:
        """(name, value, value of the other) of each field that differs, those of the sources first."""
        values, others = self._values(), other._values()
        for name in values | others:
            if values.get(name) != others.get(name):
                yield name, values.get(name), others.get(name)

    def _values(self) -> dict[str, Any]:
        values = self.to_json()
        named = {
            f"{name} of source {number}": value
            for number, source in enumerate(values.pop("sources"))
            for name, value in source.items()
        }
        return named | values

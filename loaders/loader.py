"""build_loader: a config and a place in the world -> batches, with state, receipt and statistics.

    Loader -> requests (steps of the epoch) -> StepDataset, here or in worker processes -> results -> batches

The main process counts: a batch is consumed when it is handed over, not when it was prefetched. All that workers need is in the
request, so they keep nothing between batches but what they read ahead.
"""

from __future__ import annotations

import atexit
import json
import secrets
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from loaders.batches.collate import Batch
from loaders.config import LoaderConfig
from loaders.handover import affordable_prefetch, tell_of_failures
from loaders.order.partition import BatchPartition
from loaders.order.samples import SampleOrder, open_source, order_spec
from loaders.proof.receipt import MODULUS, Span, receipt_to_json
from loaders.proof.state import parse_state, state_to_json
from loaders.tokens.packing import ENDLESS, Cursor, LaneBook, check_packing, cursors_to_json, merge_states, parse_cursors
from loaders.tokens.rows import RowMaker
from loaders.workers import StepDataset, StepRequest, StepResult
from loaders.world import World
from wds_tools.errors import DataError, StorageError, UsageError, WdsToolsError, WorkerDied
from wds_tools.sequences.vocabulary import Vocabulary
from wds_tools.storage import LocalStore, join

_WAITS_KEPT = 10_000


def build_loader(config: LoaderConfig, world: World | None = None) -> Loader:
    """Open the sources and make the loader of this process.

    Args:
        config: what to read.
        world: this process among the training processes; by default World.detect(), compared with torch.distributed at the
            first batch.

    Raises:
        NotFound, FormatError: a source is no dataset.
        UsageError: the settings do not fit the data or the world.
    """
    return Loader(config, world or World.detect())


class Loader:
    """Batches of this rank. Iterating gives the rest of the current epoch; the next iteration the next epoch.

    A batch is a dict: `__key__`, `__source__`, `data_type` and `text` are lists of str; `codes` is an int32 tensor (B, h, w)
    where all samples have grids of one size, else a list of (h, w) tensors, None for a sample without; a batch without any codes
    has none. Samples with encoded images or conversations add `image` (bytes) and `conversations`. A conversation has a list of
    grids in `codes`, and of images in `image`, one for each `<image>`. Sources without our schema give `__key__`, `__source__`,
    and the members' bytes by suffix, as lists. Batches of token rows are described in docs/training.md.
    A loop that was left goes on where it stopped. Use from one thread.
    """

    def __init__(self, config: LoaderConfig, world: World) -> None:
        if config.batch_size < world.world_size:
            raise UsageError(f"batch_size={config.batch_size} is less than one sample for each of {world.world_size} ranks")
        self.config = config
        self.world = world
        self._sources = [open_source(source) for source in config.sources]
        if len({opened.has_schema for opened in self._sources}) > 1:
            raise UsageError("sources of this project's schema can't be mixed with indexed tars of any members")
        self._order = SampleOrder(self._sources, order_spec(self._sources, config))
        self._maker = RowMaker(config.sequences, config.seed, self._sources) if config.sequences else None
        self._book = LaneBook(self._order.spec.lanes, world.rank)
        if config.last_batch == "drop" and not config.packing and self._order.length < config.batch_size:
            raise UsageError(
                f"an epoch of {self._order.length} samples is less than a batch of {config.batch_size}, and last_batch='drop' "
                "leaves it out: choose a smaller batch_size, or last_batch='short' or 'wrap'"
            )
        for sentence in self._order.rare():
            warnings.warn(sentence, stacklevel=3)
        self.epoch = 0
        """The epoch that the next batch belongs to."""
        self._position = 0
        self._loop = 0
        """Counts what begins or ends loops: one that it has moved past is over."""
        self._begin()
        self._begin_receipt()
        self._num_batches = 0
        self._num_handed_over = 0
        self._dropped = 0
        self._bad: Counter[str] = Counter()
        self._waits: deque[float] = deque(maxlen=_WAITS_KEPT)
        self._counts: dict[int, dict[str, int]] = {}

    def _begin(self) -> None:
        """Set up reading for the present stream."""
        self._parts = StepDataset(self._order, self.config, self.world.rank, self._maker)
        self._workers: Any = None
        self._requests = _StepRequests()

    def _begin_receipt(self) -> None:
        self._run = secrets.token_hex(8)
        self._spans: list[Span] = []
        self._hash_total = 0
        self._num_samples = 0
        self._substitutions: list[dict[str, Any]] = []

    def __len__(self) -> int:
        """Batches that the next iteration gives: those left of the epoch. The same on every rank.

        Raises:
            TypeError: rows packed on the fly have no end.
        """
        if self.config.packing:
            raise TypeError("rows packed on the fly have no end: count steps")
        return len(self._steps())

    @property
    def position(self) -> int:
        """Samples of the epoch that were handed over, over all ranks; rows, where they are packed on the fly."""
        return self._position

    @property
    def num_samples(self) -> int:
        """Samples of an epoch over all ranks."""
        return self._order.length

    def __iter__(self) -> Iterator[Batch]:
        self.world.check()
        steps = self._steps()
        self._loop = loop = self._loop + 1
        self._book.begin()
        self._requests.set(self.epoch, steps, max(self.config.num_workers, 1), loop, self._book if self.config.packing else None)
        with self._named_death():
            results = iter(self._results())
        for step in range(len(steps)):
            if self._loop != loop:
                raise UsageError(
                    "another loop over this loader, load_state_dict or close came since this loop began: begin again"
                )
            started = time.perf_counter()
            result = self._next(results)
            self._waits.append(time.perf_counter() - started)
            batch = self._batch(result)
            self._hand_over(result, steps, step)
            yield batch

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids of token rows that are built on the fly: `vocabulary.size` is the least vocab_size of a model.

        Raises:
            UsageError: none are built; for rows packed ahead the manifest says it.
        """
        if self._maker is None:
            raise UsageError("no token rows are built here: give sequences=SequenceConfig(...)")
        return self._maker.builder.vocabulary

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands behind the last batch handed over: small, JSON, the same on every rank.

        Of rows packed on the fly it has this rank's lanes: see `merge_states` and `gather_state`.
        """
        state = state_to_json(self._order, self.epoch, self._position)
        if self._maker is not None and self.config.packing:
            state["packing"] = {"spec": self._maker.spec, "lanes": cursors_to_json(self._book.cursors)}
        return state

    def gather_state(self) -> dict[str, Any]:
        """The merged state of all ranks, on every rank. To be called by all of them, behind the same step.

        Needed where rows are packed on the fly under torch.distributed; else the same as `state_dict`, without communication.
        """
        state = self.state_dict()
        if not self.config.packing or self.world.world_size == 1:
            return state
        return merge_states([json.loads(data) for data in _all_gather(json.dumps(state).encode())])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of any number of ranks, workers, or batch size. Costs an assignment.

        Raises:
            UsageError: the state is damaged, or of other data or another order; says what differs.
        """
        spec, epoch, position = parse_state(state, self.config, self._order)
        order = SampleOrder(self._sources, spec)
        cursors = self._cursors(state, order)
        self.close()
        self._order = order
        self._book = LaneBook(spec.lanes, self.world.rank, cursors)
        self._begin()
        self.epoch, self._position = epoch, position
        self._end_epoch_if_done()
        self._begin_receipt()

    def receipt(self) -> dict[str, Any]:
        """What this rank has handed over since it was made, or took a state: small JSON for `wds-tools audit`.

        Raises:
            UsageError: rows are packed on the fly, so a rank's samples are not spans of positions.
        """
        if self.config.packing:
            raise UsageError("rows packed on the fly have no receipt: pack ahead (`wds-tools pack`), or train on padded rows")
        return receipt_to_json(
            self._order,
            self.world,
            self.config.last_batch,
            self._spans,
            self._num_samples,
            self._hash_total,
            self._substitutions,
            self._run,
        )

    def stats(self) -> dict[str, float]:
        """Numbers for a training log. Of this rank, since it was made.

        Returns:
            epoch, position; batches, samples, dropped; bad and bad_REASON; wait_p50_s and wait_p99_s (seconds the trainer waited
            for a batch, of the last 10,000); requests, bytes (of data fetched from object storage), evicted, cache_*.
        """
        waits = np.array(self._waits or [0.0])
        totals: Counter[str] = Counter()
        for counts in self._counts.values():
            totals.update(counts)
        return {
            "epoch": self.epoch,
            "position": self._position,
            "batches": self._num_batches,
            "samples": self._num_handed_over,
            "dropped": self._dropped,
            "bad": self._bad.total(),
            **{f"bad_{reason}": count for reason, count in sorted(self._bad.items())},
            "wait_p50_s": float(np.percentile(waits, 50)),
            "wait_p99_s": float(np.percentile(waits, 99)),
            **totals,
        }

    def close(self) -> None:
        """End the worker processes, and loops under way. The loader can be used again."""
        self._loop += 1
        workers, self._workers = self._workers, None
        if workers is not None and workers._iterator is not None:
            try:
                workers._iterator._shutdown_workers()
            except RuntimeError as error:  # torch's handler of SIGCHLD tells, in the midst of this, of one that was killed
                if not _tells_of_a_worker(error):
                    raise

    def _steps(self) -> BatchPartition:
        length = ENDLESS if self.config.packing else self._order.length
        return BatchPartition(length, self._position, self.config.batch_size, self.config.last_batch, self.world.world_size)

    def _cursors(self, state: Mapping[str, Any], order: SampleOrder) -> dict[int, Cursor]:
        """Where a state says that lanes stand; none without packing.

        Raises:
            UsageError: one of the run and the state packs and the other does not, or otherwise.
        """
        packing = state.get("packing")
        if (packing is not None) != self.config.packing:
            raise UsageError(f"the state was saved with packing={packing is not None}, the config has {self.config.packing}")
        if self._maker is None or packing is None:
            return {}
        check_packing(packing, self._maker.spec)
        return parse_cursors(packing["lanes"], order.spec.lanes, state["position"])

    def _results(self) -> Iterable[StepResult | WdsToolsError]:
        if not self.config.num_workers:
            return (self._parts[request] for request in self._requests)
        if self._workers is None:
            self._workers = torch.utils.data.DataLoader(
                self._parts,
                sampler=self._requests,
                batch_size=None,
                num_workers=self.config.num_workers,
                prefetch_factor=affordable_prefetch(self.config, self.world, self._sources),
                worker_init_fn=tell_of_failures,
                persistent_workers=True,
                collate_fn=_as_it_is,
                multiprocessing_context=self.config.start_method,
                generator=torch.Generator(),  # else each loop would take a number from the trainer's
            )
            atexit.register(_close, weakref.ref(self))  # in good order, before multiprocessing kills them
        return self._workers  # type: ignore[no-any-return]

    def _next(self, results: Iterator[StepResult | WdsToolsError]) -> StepResult:
        with self._named_death():
            result = next(results)
        if isinstance(result, WdsToolsError):
            raise type(result)(f"{result}; {self._whence()}") from result
        return result

    @contextmanager
    def _named_death(self) -> Iterator[None]:
        """DataLoader tells of a dead worker by a RuntimeError, or fails to get the tensors that it had sent."""
        try:
            yield
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            if isinstance(error, WdsToolsError) or not (_tells_of_a_worker(error) or isinstance(error, OSError | EOFError)):
                raise
            self.close()
            raise WorkerDied(f"a worker process ended ({error}{self._cut_off()}); {self._whence()}") from error

    def _cut_off(self) -> str:
        """A local shard that is not as long as it was: who touches what is missing of a mapped file, dies."""
        for opened in self._sources:
            for row in opened.manifest.shards if isinstance(opened.store, LocalStore) else ():
                with suppress(StorageError):
                    if (size := opened.store.size(row.name)) < row.bytes:
                        return f"; {join(opened.store.url, row.name)} has {size} bytes, the manifest says {row.bytes}"
        return ""

    def _whence(self) -> str:
        return f"everything before epoch {self.epoch}, position {self._position} was handed over: state_dict() goes on there"

    def _batch(self, result: StepResult) -> Batch:
        lists = result.columns.lists
        names = [opened.name for opened in self._sources]
        sources = lists.get("__source__") or list(map(names.__getitem__, result.sources))
        batch: Batch = {"__key__": lists["__key__"], "__source__": sources, **lists}
        if result.columns.tokens is not None:
            batch |= result.columns.tokens.unpack()
        if result.columns.codes is not None:
            batch["codes"] = result.columns.codes.unpack()
        return batch

    def _hand_over(self, result: StepResult, steps: BatchPartition, step: int) -> None:
        low, high = steps.start + step * steps.batch_size, steps.end(step)
        self._bad.update(bad.reason for bad in result.substitutions)
        if self._bad.total() > self.config.max_bad:
            raise DataError(
                f"{self._bad.total()} unreadable samples, max_bad={self.config.max_bad}: {dict(self._bad)}; "
                f"run `wds-tools verify`; {self._whence()}"
            )
        self._substitutions += [{"epoch": self.epoch, **bad._asdict()} for bad in result.substitutions]
        spans = self._spans
        if spans and spans[-1][0] == self.epoch and spans[-1][2] == low and spans[-1][3] == steps.batch_size:
            spans[-1] = (self.epoch, spans[-1][1], high, steps.batch_size)
        else:
            spans.append((self.epoch, low, high, steps.batch_size))
        self._hash_total = (self._hash_total + result.hash_total) % MODULUS
        self._num_samples += len(result.sources)
        self._num_handed_over += len(result.sources)
        self._num_batches += 1
        self._counts[result.worker] = result.counts
        self._book.cursors.update(result.cursors)
        self._position = high
        self._end_epoch_if_done()

    def _end_epoch_if_done(self) -> None:
        """Go over to the next epoch behind the last batch: whoever counts batches never asks for one too many."""
        steps = self._steps()
        if not len(steps):
            self._dropped += steps.dropped
            self.epoch, self._position = self.epoch + 1, 0


class _StepRequests(Sized, Iterable[StepRequest]):
    """The sampler of the DataLoader: the steps of the epoch at hand."""

    def __init__(self) -> None:
        self._what: tuple[int, BatchPartition, int, int, LaneBook | None] | None = None

    def set(self, epoch: int, steps: BatchPartition, stride: int, loop: int, book: LaneBook | None) -> None:
        self._what = epoch, steps, stride, loop, book

    def __len__(self) -> int:
        return len(self._what[1]) if self._what else 0

    def __iter__(self) -> Iterator[StepRequest]:
        if self._what:
            epoch, steps, stride, loop, book = self._what
            for step in range(len(steps)):
                yield StepRequest(epoch, steps, step, stride, loop, book.tell(steps, step, stride) if book else {})


def _close(loader: weakref.ref[Loader]) -> None:
    if (held := loader()) is not None:
        held.close()


def _all_gather(data: bytes) -> list[bytes]:
    """What each rank gives, on all of them."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    most = max(int(size) for size in sizes)
    own = torch.zeros(most, dtype=torch.uint8)
    own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.zeros(most, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, own.to(device))
    return [part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def _tells_of_a_worker(error: Exception) -> bool:
    return "DataLoader worker (pid" in str(error)  # of an error in one it says "in DataLoader worker process"


def _as_it_is(result: Any) -> Any:
    return result

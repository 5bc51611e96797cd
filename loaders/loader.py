"""build_loader: a config and a place in the world -> batches, with state, receipt and statistics.

    Loader -> StepRequest of each step that is left -> WorkerPool -> StepResults -> Ledger, batches

The main process counts: a batch is consumed when it is handed over, not when it was prefetched. All that workers need is in the
request, so they keep nothing between batches but what they read ahead.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch

from loaders.batches.collate import Batch
from loaders.config import LoaderConfig
from loaders.ledger import Ledger
from loaders.order.generations import Epochs
from loaders.order.mask import held_masks
from loaders.order.partition import BatchPartition, check_batch
from loaders.order.samples import SampleOrder, open_source, order_spec
from loaders.proof.progress import RunProgress
from loaders.proof.saves import newest_save, write_save
from loaders.proof.state import Change, read_state, resumed, state_to_json
from loaders.reading.planner import shared_lanes
from loaders.tokens.lanes import ENDLESS, LaneBook, lanes_of, lanes_to_json, merge_states, without_excluded
from loaders.tokens.rows import RowMaker
from loaders.workers.pool import WorkerPool
from loaders.workers.steps import StepDataset, StepResult, requests_of
from loaders.world import World
from wds_tools.errors import UsageError, WdsToolsError
from wds_tools.sequences.rows import NOT_TRAINED
from wds_tools.sequences.vocabulary import Vocabulary
from wds_tools.storage import open_store

_WEIGHTS_ERROR = 0.01


def build_loader(config: LoaderConfig, world: World | None = None) -> Loader:
    """Open the sources and make the loader of this process.

    Args:
        config: what to read.
        world: this process among the training processes; by default World.detect(), which is compared with torch.distributed at
            the first batch.

    Returns:
        The loader; nothing is read of the samples yet.

    Raises:
        NotFound, FormatError: a source is not a dataset.
        UsageError: the settings do not fit the data or the world.
    """
    return Loader(config, world or World.detect())


class Loader:
    """Batches of this rank. An iteration gives the rest of the current epoch, and the next iteration another epoch.

    A batch is a dict: `__key__`, `__source__`, `data_type` and `text` are lists of str; `codes` is an int32 tensor (B, h, w) if
    all samples have grids of one size, otherwise a list of (h, w) tensors, with None for a sample without codes; a batch without
    any codes has no `codes`. Samples with encoded images or conversations add `image` (bytes) and `conversations`. A conversation
    has lists of grids in `codes` and of images in `image`, one entry for each `<image>`. Sources without this project's schema
    give `__key__`, `__source__`, and the members' bytes by suffix, as lists. docs/training.md describes batches of token rows. A
    loop that was left continues where it stopped; in an evaluation, each loop begins from the start. Use it from one thread.

    Args:
        config: what to read.
        world: this process among the training processes.

    Raises:
        NotFound, FormatError: a source is not a dataset.
        UsageError: the settings do not fit the data or the world.
    """

    def __init__(self, config: LoaderConfig, world: World) -> None:
        self.config = config
        self.world = world
        self._sources = [open_source(source) for source in config.sources]
        if len({opened.has_schema for opened in self._sources}) > 1:
            raise UsageError("sources of this project's schema can't be mixed with indexed tars of any members")
        self._order = SampleOrder(self._sources, order_spec(self._sources, config))
        self._maker = RowMaker(config.sequences, config.seed, self._sources) if config.sequences else None
        self._book = LaneBook(self._order.spec.lanes, world.rank)
        self._run = RunProgress(config, world.world_size, epochs := self._epochs(self._order))
        check_batch(epochs.length(0), config.batch_size, config.last_batch, world.world_size)
        self._masks = held_masks((), [opened.mask for opened in self._sources], 0)
        self._warn_of_cost(stacklevel=4)
        self._is_compared = False
        """Whether the ranks were compared since this loader was made or took a state."""
        self._loop = 0
        """Counts what begins or ends loops: one that it has moved past is over."""
        self._pool = self._new_pool()
        self._ledger = Ledger(config.max_bad, config.max_unused)
        self._earlier: list[dict[str, Any]] = []
        """Receipts of the run before this loader that its saves bring on."""

    def _warn_of_cost(self, stacklevel: int) -> None:
        if shared := shared_lanes(self._order, self.config, self.world.world_size):
            warnings.warn(shared, stacklevel=stacklevel)
        if self._order.weights_error > _WEIGHTS_ERROR:
            warnings.warn(
                f"the weights repeat after more than 2**20 samples, so they are rounded: by {self._order.weights_error:.1%} of a "
                "weight; write fewer digits",
                stacklevel=stacklevel,
            )

    def _epochs(self, order: SampleOrder) -> Epochs:
        return Epochs(ENDLESS) if self.config.packing else order.epochs

    def _new_pool(self) -> WorkerPool:
        """Reads in the present order."""
        dataset = StepDataset(self._order, self.config, self.world.rank, self._maker)
        return WorkerPool(dataset, self.config, self.world, self._sources)

    def __len__(self) -> int:
        """Number of batches that the next iteration gives: the rest of the epoch. The same on every rank; in an evaluation with
        fewer samples than ranks, a rank without a sample gets none.

        Raises:
            TypeError: rows packed on the fly have no end.
        """
        if self.config.packing:
            raise TypeError("rows packed on the fly have no end: count steps")
        return sum(span.num_steps for span in self._run.rest())

    @property
    def step(self) -> int:
        """Batches that were handed over since the run began, through all its starts."""
        return self._run.step

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self._run.epoch

    @property
    def position(self) -> int:
        """Samples of the epoch that were handed over or skipped, over all ranks; rows, where they are packed on the fly."""
        return self._run.position

    @property
    def num_samples(self) -> int:
        """Samples of the current epoch over all ranks."""
        return self._order.epochs.length(self.epoch)

    def __iter__(self) -> Iterator[Batch]:
        self.world.check()
        if not self._is_compared:
            self._compare()
        if self._run.is_over:
            return
        if self.config.evaluation:
            self._run.position = 0
            self._ledger.begin_receipt()
        self._loop = loop = self._loop + 1
        self._book.begin()
        book = self._book if self.config.packing else None
        with self._noted():
            for span in self._run.rest():
                low, high = span.steps.part(0, self.world.rank)
                if low == high:  # an evaluation of fewer samples than ranks
                    return
                self._pool.begin(requests_of(span, max(self.config.num_workers, 1), loop, book))
                for step in range(span.num_steps):
                    if self._loop != loop:
                        raise UsageError(
                            "another loop over this loader, load_state_dict, skip or close came since this loop began: "
                            "begin again"
                        )
                    started = time.perf_counter()
                    result = self._pool.next((loop, span.epoch, span.steps.part(step, self.world.rank)[0]))
                    self._ledger.waits.append(time.perf_counter() - started)
                    batch = self._batch(result)
                    self._hand_over(result, span.steps, step)
                    yield batch

    def _hand_over(self, result: StepResult, steps: BatchPartition, step: int) -> None:
        start, high = steps.start + step * steps.batch_size, steps.end(step)
        self._ledger.record(result, (self.epoch, start, high, steps.batch_size))
        self._book.lanes.update(result.lanes)
        self._run.hand_over(steps, step)

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
        """Where the run stands after the last batch handed over: small, JSON, the same on every rank.

        Of rows packed on the fly it has this rank's lanes: see `merge_states` and `gather_state`.

        Raises:
            UsageError: an evaluation has no state, nor a receipt.
        """
        self._check_trains()
        run = self._run
        state = state_to_json(self._order, run.here.position, run.step, run.starts, run.skips, self._masks)
        if self._maker is not None and self.config.packing:
            state["packing"] = {"spec": self._maker.spec, "lanes": lanes_to_json(self._book.lanes)}
        return state

    def gather_state(self) -> dict[str, Any]:
        """The merged state of all ranks, on every rank. All ranks must call this after the same step.

        Needed for rows packed on the fly under torch.distributed; otherwise the same as `state_dict`, without communication,
        except that the ranks of a world made from a group are compared.

        Raises:
            UsageError: ranks are at different positions, or read different data; or see World.gather.
        """
        state = self.state_dict()
        self._compare()
        if not self.config.packing:
            return state
        return merge_states([json.loads(data) for data in self.world.gather(json.dumps(state).encode())])

    def load_state_dict(self, state: Mapping[str, Any], change: Change = None) -> None:
        """Continue from a state of any number of ranks and workers, and any batch size. Takes constant time.

        Args:
            state: of any rank; with rows packed on the fly, merged.
            change: "future": weights, schedule, stop_at and sources of the config that differ from the run's hold from here on,
                and so do new shards of a dataset that grew (docs/order.md). None: what differs is refused.

        Raises:
            UsageError: the state is damaged, or of other data or another order; says what differs.
        """
        self._check_trains()
        saved = read_state(state)
        num_held = sum({held.source: held.num_ids for held in saved.masks}.values())
        has_new_mask = sum(len(opened.mask.ids) for opened in self._sources) > num_held
        packed = self._maker.spec if self._maker and self.config.packing else None
        lanes = lanes_of(state, packed, saved.generations[-1].spec.lanes, is_whole=change is not None or has_new_mask)
        deepest = max((lane.cursor for lane in lanes.values()), default=0) if self.config.packing else None
        order = resumed(saved, self.config, self._sources, change, deepest)
        masks = held_masks(saved.masks, [None if opened.removed else opened.mask for opened in order.sources], saved.position)
        if has_new_mask:
            lanes = {number: without_excluded(order, number, lane) for number, lane in lanes.items()}
        self.close()
        self._order, self._masks = order, masks
        self._book = LaneBook(order.spec.lanes, self.world.rank, lanes)
        self._pool = self._new_pool()
        self._run.go_on(self._epochs(order), saved)
        self._is_compared = False
        self._earlier = []
        self._ledger.begin_receipt()
        self._warn_of_cost(stacklevel=3)

    def save(self, folder: str | PathLike[str]) -> None:
        """Save state and receipts, completely or not at all. All ranks must call this after the same step.

        Call it last, after saving the weights: files written before it belong to the save. Several ranks without a group
        communicate over torch.distributed. `wds-tools audit` reads the folder.

        Args:
            folder: a directory or URL, the same for all saves of a run or one for each; may contain other files.

        Raises:
            StorageError: a rank can't write.
            UsageError: ranks are at different positions, or can't communicate; see World.gather.
        """
        receipts = self._earlier if self.config.packing else [*self._earlier, self.receipt()]
        write_save(open_store(str(folder)), self.world, self.gather_state(), receipts)

    def resume(self, folder: str | PathLike[str], change: Change = None) -> int:
        """Continue from the newest complete save in a folder, if there is one. All ranks, of any number, must call this.

        Args:
            folder: see `save`.
            change: see `load_state_dict`.

        Returns:
            The step at which the run continues (`step`); 0 if there is no save, and then nothing changes.

        Raises:
            FormatError, UsageError: the save is damaged, or see load_state_dict.
        """
        store = open_store(str(folder))
        if (save := newest_save(store, self.world)) is None:
            return 0
        self.load_state_dict(save.state, change)
        self._earlier = [receipt for _, receipt in save.receipts(store, self.world.rank, self.world.world_size)]
        return self.step

    def receipt(self) -> dict[str, Any]:
        """The proof of what this rank gave to the trainer since it was made or took a state, for `wds-tools audit`: small JSON.

        Raises:
            UsageError: rows are packed on the fly, so a rank's samples are not spans of positions.
        """
        self._check_trains()
        if self.config.packing:
            raise UsageError("rows packed on the fly have no receipt: pack ahead (`wds-tools pack`), or train on padded rows")
        return self._ledger.receipt(self.state_dict(), self.world, self.config)

    def skip(self, start: int, stop: int) -> None:
        """Leave out some steps: after batch `start` - 1 of the run comes the one that would have been number `stop`.

        Batches are still counted as they are given out: that batch gets number `start`. State and receipts record skipped steps,
        so they are left out once, however often a run is resumed and this is called. All ranks must call it, after
        `load_state_dict`, which restores the skips of the state.

        Args:
            start: number of the first step to leave out, from 0: the current or a later one.
            stop: number of the first step after them.

        Raises:
            UsageError: the run is past them, there are none, or they are millions of epochs away; or rows are packed on the fly.
        """
        if (start, stop) in self._run.skips:
            return
        if self.config.packing:
            raise UsageError(
                "rows packed on the fly can't be skipped: their lanes go on from row to row; pack ahead (`wds-tools pack`)"
            )
        self._run.skip(start, stop)
        self._loop += 1

    def stats(self) -> dict[str, float]:
        """Numbers for a training log, for this rank since the loader was made.

        Returns:
            epoch, position; batches, samples, dropped, skipped; bad and bad_REASON; unused and unused_REASON; wait_p50_s and
            wait_p99_s (seconds the trainer waited for a batch, of the last 10,000). Of object storage: requests, bytes (fetched
            so far, what is read ahead included), sample_bytes (of the samples that were used), amplification (bytes for each
            of those), evicted (requests dropped for want of memory), misplaced (of which the offsets were wrong, or the shard
            damaged: the index was read); of late: in_flight (requests), bytes_per_s, first_byte_s (median from a request to its
            answer); cache_*.
        """
        run = self._run
        place = {"epoch": run.epoch, "position": run.position, "dropped": run.num_dropped, "skipped": run.num_skipped}
        return {**place, **self._ledger.stats()}

    def close(self) -> None:
        """End the worker processes and running loops. The loader can be used again."""
        self._loop += 1
        self._pool.close()

    def _compare(self) -> None:
        """Compare what ranks of one run have in common, where there is a group to do it over."""
        self._is_compared = True
        if self.world.group is None:
            return
        self.world.compare(
            {
                "data": [opened.origin.fingerprint for opened in self._sources],
                "batch size": [self.config.batch_size, self.config.last_batch],
                "order": self._order.spec.to_json(),
                "excluded": [(held.source, held.num_ids, held.hash) for held in self._masks],
                "token rows": self._maker and [self._maker.spec, self.config.packing],
                "place": [self.epoch, self.position, self._run.skips],
            }
        )

    def _check_trains(self) -> None:
        if self.config.evaluation:
            raise UsageError("an evaluation has no state and no receipt: every pass is the same, from the start")

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Errors say where the run stands."""
        try:
            yield
        except WdsToolsError as error:
            error.add_note(
                f"Everything before epoch {self.epoch}, position {self.position} was handed over: state_dict() goes on there."
            )
            raise

    def _batch(self, result: StepResult) -> Batch:
        batch = result.to_batch([opened.name for opened in self._order.sources])
        if self.config.trained_tokens:
            batch["trained_tokens"] = self._trained_tokens(batch)
        if not (self.config.pin_memory and torch.cuda.is_available()):
            return batch
        return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def _trained_tokens(self, batch: Batch) -> int:
        """Of all ranks. A group may have peers of each, which read the same."""
        if "labels" not in batch:
            raise UsageError("trained_tokens=True: these are no token rows, so nothing says which tokens are trained")
        mine = int((batch["labels"][:, 1:] != NOT_TRAINED).sum())
        given = self.world.gather(str(mine).encode())
        return sum(map(int, given)) * self.world.world_size // len(given)

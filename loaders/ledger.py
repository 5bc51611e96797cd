"""What a rank has handed over: counted in the main process, batch by batch, for receipts and statistics."""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from loaders.config import LoaderConfig
from loaders.order.mask import EXCLUDED, UNUSED
from loaders.proof.receipt import MODULUS, RECEIPT_VERSION, Span, substitutions_to_json
from loaders.workers.steps import StepResult
from loaders.world import World
from wds_tools.errors import DataError

_WAITS_KEPT = 10_000
_FIRST_SAMPLES = 1000
"""Of these, a share of the number is allowed from the start."""


class Ledger:
    """Counts of one rank. Of the receipt since `begin_receipt`, all others since it was made.

    Args:
        max_bad: number of unreadable samples that are tolerated.
        max_unused: share of the samples that a transform may leave unused.
    """

    def __init__(self, max_bad: int, max_unused: float) -> None:
        self._max_bad, self._max_unused = max_bad, max_unused
        self._num_batches = self._num_handed_over = 0
        self._num_excluded = 0
        self.waits: deque[float] = deque(maxlen=_WAITS_KEPT)
        """Seconds that the trainer waited for each of the latest batches."""
        self._bad: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()
        self._counts: dict[int, dict[str, int]] = {}
        """Worker -> what it has counted."""
        self.begin_receipt()

    def begin_receipt(self) -> None:
        """Begin a new receipt, as a run does that took a state."""
        self._run = secrets.token_hex(8)
        self._spans: list[Span] = []
        self._hash_total = self._num_samples = 0
        self._substitutions: list[dict[str, Any]] = []

    def record(self, result: StepResult, span: Span) -> None:
        """A step is handed over.

        Args:
            result: the rank's share of it.
            span: its epoch, positions over all ranks, and batch size.

        Raises:
            DataError: more than max_bad samples could not be read, or more than max_unused were not used.
        """
        epoch, low, high, batch_size = span
        for bad in result.substitutions:
            self._num_excluded += bad.reason == EXCLUDED
            if bad.reason != EXCLUDED:
                (self._unused if bad.reason.startswith(UNUSED) else self._bad)[bad.reason] += 1
        if self._bad.total() > self._max_bad:
            raise DataError(
                f"{self._bad.total()} unreadable samples, max_bad={self._max_bad}: {dict(self._bad)}; run `wds-tools verify`"
            )
        num_samples = self._num_handed_over + len(result.sources)
        if self._unused.total() > self._max_unused * max(num_samples, _FIRST_SAMPLES):
            raise DataError(
                f"transform left {self._unused.total():,} of {num_samples:,} samples unused, max_unused={self._max_unused}: "
                f"{dict(self._unused)}; None is for exceptions: make a dataset without them, by `wds-tools select`"
            )
        self._substitutions += [{"epoch": epoch, **asdict(bad)} for bad in result.substitutions]
        last = self._spans[-1] if self._spans else None
        if last and (last[0], last[2], last[3]) == (epoch, low, batch_size):
            self._spans[-1] = (epoch, last[1], high, batch_size)
        else:
            self._spans.append(span)
        self._hash_total = (self._hash_total + result.hash_total) % MODULUS
        self._num_samples += len(result.sources)
        self._num_handed_over = num_samples
        self._num_batches += 1
        self._counts[result.worker] = result.counts

    def receipt(self, state: Mapping[str, Any], world: World, config: LoaderConfig) -> dict[str, Any]:
        """See Loader.receipt; `state` is that of the loader now."""
        return {
            **state,
            "version": RECEIPT_VERSION,
            "run": self._run,
            "rank": world.rank,
            "world_size": world.world_size,
            "last_batch": config.last_batch,
            "spans": list(map(list, self._spans)),
            "num_samples": self._num_samples,
            "hash_total": f"{self._hash_total:032x}",
            "substitutions": substitutions_to_json(self._substitutions),
        }

    def stats(self) -> dict[str, float]:
        """See Loader.stats."""
        waits = np.array(self.waits or [0.0])
        totals: Counter[str] = Counter()
        for counts in self._counts.values():
            totals.update(counts)
        fetched: dict[str, float] = {"amplification": totals["bytes"] / max(totals["sample_bytes"], 1)} if totals["bytes"] else {}
        if answers := [counts["first_byte_ms"] for counts in self._counts.values() if "first_byte_ms" in counts]:
            fetched["first_byte_s"] = float(np.median(answers)) / 1000
            del totals["first_byte_ms"]
        return {
            "batches": self._num_batches,
            "samples": self._num_handed_over,
            "excluded": self._num_excluded,
            "bad": self._bad.total(),
            **{f"bad_{reason}": count for reason, count in sorted(self._bad.items())},
            **dict(sorted(self._unused.items())),
            UNUSED: self._unused.total(),
            "wait_p50_s": float(np.percentile(waits, 50)),
            "wait_p99_s": float(np.percentile(waits, 99)),
            **totals,
            **fetched,
        }

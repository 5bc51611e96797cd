"""The user's own code, in the process that reads: samples in memory -> transform, one by one -> collate -> a batch.

    Decoder, collate.read_samples -> dicts -> transform(sample, ctx) -> dict of arrays, or None: not used -> collate -> Columns

A sample that is not used has the next one of its shard in its stead, as an unreadable one has, so that every rank takes the same
number of steps.
Invariant: what comes of a sample depends on the sample, the seed and the epoch of the position, so on no topology.
Cost: that of the transform, and 2 us a sample.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from loaders.batches.collate import Batch, Columns, Sample, chosen_texts, read_samples
from loaders.batches.decode import Decoder
from loaders.order.mask import UNUSED, Substitution
from loaders.order.plan import Ints
from loaders.order.samples import Located, SampleOrder
from loaders.reading.source import LoadedSamples, SampleBytes
from wds_tools.errors import Reject, TransformError
from wds_tools.sequences.choices import generator_of


class Context:
    """What a transform may know beside the sample.

    Args:
        seed: of the run.
        epoch: of the sample's source at this position.
        key: of the sample.
    """

    __slots__ = ("_rng", "_seed", "epoch", "key", "reason")

    def __init__(self, seed: int, epoch: int, key: str) -> None:
        self._seed, self.epoch, self.key = seed, epoch, key
        self._rng: np.random.Generator | None = None
        self.reason = ""
        """Why the sample is not used, as it is counted: set it, a word, before returning None."""

    @property
    def rng(self) -> np.random.Generator:
        """Random numbers of this sample in this epoch: the same after any resume, anywhere."""
        if self._rng is None:
            self._rng = generator_of(self._seed, self.epoch, self.key)
        return self._rng


Transform = Callable[[Sample, Context], dict[str, Any] | None]
Collate = Callable[[list[dict[str, Any]]], Batch]


@dataclass(frozen=True)
class Transformer:
    """Makes batches of samples in memory by the user's own code."""

    order: SampleOrder
    decoder: Decoder
    seed: int
    transform: Transform
    collate: Collate | None

    def batch(self, located: Located, loaded: list[LoadedSamples], epochs: Ints) -> tuple[Columns, dict[int, Substitution]]:
        """The batch of some positions, and what was substituted, by place in the batch.

        Args:
            located: where the positions lead.
            loaded: what holds the sample of each.
            epochs: that the positions are in of their source.

        Raises:
            FormatError: a sample can't be read and was not to be replaced, or none of the next 64 is used.
            TransformError: the user's code raised, or gave what is no dict.
        """
        samples, substitutions = self.decoder.decode(located, loaded, read_samples)
        keys: list[str] = []
        made: list[dict[str, Any]] = []
        for number, (sample, source, epoch) in enumerate(zip(samples, located.source.tolist(), epochs.tolist(), strict=True)):
            key, result = sample["__key__"], self._run(sample, source, epoch)
            if isinstance(result, Reject):
                before = substitutions.get(number) or Substitution(
                    source=source,
                    shard=int(located.shard[number]),
                    sample_index=int(located.sample_index[number]),
                    reason=result.reason,
                    substitute_shard=int(located.shard[number]),
                    substitute_index=int(located.sample_index[number]),
                )
                key, result, substitutions[number] = self._stand_in(loaded[number], before, result, epoch)
            keys.append(key)
            made.append(result)
        return Columns({"__key__": keys}, None, made=self._collated(keys, made)), substitutions

    def _stand_in(
        self, samples: LoadedSamples, before: Substitution, error: Reject, epoch: int
    ) -> tuple[str, dict[str, Any], Substitution]:
        """The key of the next sample of its shard that is used, what the transform made of it, and its place."""
        found: list[tuple[str, dict[str, Any]]] = []

        def parse(loaded: Sequence[LoadedSamples], sample_indices: Sequence[int], data: SampleBytes) -> None:
            (sample,) = read_samples(loaded, sample_indices, data)
            key, result = sample["__key__"], self._run(sample, before.source, epoch)
            if isinstance(result, Reject):
                raise result
            found.append((key, result))

        candidate, index = self.decoder.stand_in(samples, before.substitute_index, before.source, error, parse)
        return *found[-1], replace(before, substitute_shard=candidate.shard, substitute_index=index)

    def _run(self, sample: Sample, source: int, epoch: int) -> dict[str, Any] | Reject:
        """What the transform makes of a sample, or why it is not used."""
        key = sample["__key__"]
        if (weights := self.order.sources[source].texts) and "texts" in sample:
            one = [(key, sample["text"], sample["texts"])]
            (sample["text"],) = chosen_texts([weights], self.seed, np.array([epoch]), [0], one)
        context = Context(self.seed, epoch, key)
        try:
            result = self.transform(sample, context)
        except Exception as error:
            raise _raised("transform", f"{key} ({sample['__url__']})", error) from error
        if isinstance(result, dict):
            return result
        if result is None:
            return Reject(f"{UNUSED}_{context.reason}" if context.reason else UNUSED, f"transform gave None for {key}")
        raise TransformError(
            f"transform gave a {type(result).__name__} for {key}, expected a dict of arrays, or None if it is not used"
        )

    def _collated(self, keys: list[str], made: list[dict[str, Any]]) -> Batch:
        if self.collate is None:
            return collate(made)
        try:
            batch = self.collate(made)
        except Exception as error:
            raise _raised("collate", f"{', '.join(keys[:3])}, ...", error) from error
        if not isinstance(batch, dict):
            raise TransformError(f"collate gave a {type(batch).__name__}, expected a dict")
        return batch


def _raised(name: str, what: str, error: Exception) -> TransformError:
    told = TransformError(f"{name} raised {type(error).__name__} for {what}: {error}")
    told.add_note("".join(traceback.format_exception(error)))  # a cause does not travel between processes
    return told


def collate(samples: list[dict[str, Any]]) -> Batch:
    """One value of each name: arrays, tensors or numbers of one shape and type become a tensor (B, ...), all else a list.

    >>> batch = collate([{"pixels": np.zeros((2, 3), np.uint8), "label": 4}, {"pixels": np.ones((2, 3), np.uint8), "label": 5}])
    >>> batch["pixels"].shape, batch["label"]
    (torch.Size([2, 2, 3]), tensor([4, 5]))
    """
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: _stacked([sample.get(name) for sample in samples]) for name in names}


def _stacked(values: list[Any]) -> Any:
    kind, *others = set(map(type, values))
    if others or not issubclass(kind, torch.Tensor | np.ndarray | np.number | int | float):
        return values
    arrays: list[Any] = values if issubclass(kind, torch.Tensor | np.ndarray) else list(map(np.asarray, values))
    if len({(array.shape, array.dtype) for array in arrays}) > 1:
        return values
    if isinstance(arrays[0], torch.Tensor):
        return torch.stack(arrays)
    return torch.from_numpy(np.stack(arrays)) if arrays[0].dtype.kind in "biuf" else values

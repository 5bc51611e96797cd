"""A loader under the Trainer of transformers: batches as they come, and a save in every checkpoint.

    epoch_loader = EpochLoader(loader, steps)
    LoaderTrainer(train_dataset=epoch_loader, callbacks=[LoaderCallback(epoch_loader)], ...)

The Trainer would wrap a dataset in a DataLoader of accelerate's, which deals out batches again and reads one ahead of what was
trained; the loader's batches are this rank's already, so they go to the model as they are. After a resume the Trainer passes
over the batches of the epoch that were trained, so as to count on: here these are empty ones, made on the spot, and the loader
goes on where the checkpoint stands. So an epoch may end with fewer batches than gradients are accumulated over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loaders.epochs import EpochLoader
from wds_tools.errors import UsageError


class LoaderTrainer(Trainer):
    """A Trainer whose `train_dataset` is an EpochLoader; batch sizes are the loader's. Needs `ignore_data_skip=False`."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **settings: Any) -> Any:
        """As Trainer.train; the callback is told which checkpoint was named."""
        self.args.resume_from_checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **settings)

    def get_train_dataloader(self) -> Any:
        """The batches of the EpochLoader, epoch by epoch."""
        if self.args.ignore_data_skip:
            raise UsageError(
                "TrainingArguments(ignore_data_skip=True): leave it out, or the Trainer counts a resumed epoch from its start; "
                "the loader goes on by itself where the checkpoint stands, nothing is read again"
            )
        own = torch.Generator()  # else each epoch would take a number from the trainer's
        return DataLoader(_Epochs(self.train_dataset), batch_size=None, collate_fn=_as_it_is, generator=own)

    def num_examples(self, dataloader: Any) -> int:
        """Samples of an epoch over all ranks: rows, where the loader packs them."""
        epochs = getattr(dataloader, "dataset", None)
        return len(epochs) * epochs.batch_size if isinstance(epochs, _Epochs) else int(super().num_examples(dataloader))

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of an update over all ranks, of which the Trainer makes samples per second."""
        return _Epochs(self.train_dataset).batch_size * int(args.gradient_accumulation_steps)


class LoaderCallback(TrainerCallback):
    """Saves the loader with each checkpoint, and goes on from there when training begins from one.

    Args:
        epoch_loader: the `train_dataset` of the Trainer.
    """

    def __init__(self, epoch_loader: EpochLoader) -> None:
        self._epoch_loader = epoch_loader

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Save into the checkpoint that was just written: see Loader.save."""
        self._epoch_loader.loader.save(_checkpoint(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Go on from the checkpoint that training goes on from.

        Raises:
            UsageError: it has no save, one of other data, or one that stands elsewhere in an epoch than the Trainer.
        """
        if not state.global_step:
            return
        folder = args.resume_from_checkpoint or _checkpoint(args, state)
        if not self._epoch_loader.loader.resume(folder):
            raise UsageError(f"{folder} has no save of a loader: was the checkpoint written with a LoaderCallback?")
        steps, accumulated = len(self._epoch_loader), args.gradient_accumulation_steps
        counted = state.global_step % -(-steps // accumulated) * accumulated
        if counted != self._epoch_loader.done:
            raise UsageError(
                f"{folder} is of update {state.global_step:,}: the Trainer counts {counted} batches into an epoch of {steps}, "
                f"the loader is {self._epoch_loader.done} into one: keep gradient_accumulation_steps, batch_size and the steps "
                "of EpochLoader as they were"
            )


class _Epochs(IterableDataset[dict[str, Any]]):
    """Epochs of the same number of batches: those that were done before a resume are empty, and passed over by the Trainer."""

    def __init__(self, epoch_loader: Any) -> None:
        self._epoch_loader: EpochLoader = epoch_loader
        self.batch_size: int = self._epoch_loader.loader.config.batch_size

    def __len__(self) -> int:
        return len(self._epoch_loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({} for _ in range(self._epoch_loader.done))
        yield from self._epoch_loader


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _as_it_is(batch: Any) -> Any:
    return batch

"""A loader under the Trainer of transformers: batches as they come, and a save in every checkpoint.

    epoch_loader = EpochLoader(loader, steps)
    LoaderTrainer(train_dataset=epoch_loader, callbacks=[LoaderCallback(epoch_loader)], ...)

The Trainer would wrap a dataset in a DataLoader of accelerate's, which deals out batches again and reads one ahead of what was
trained; the loader's batches are this rank's already, so they go to the model as they are. After a resume the Trainer passes
over the batches of the epoch that were trained, so as to count on: here these are empty ones, made on the spot, and the loader
goes on where the checkpoint stands. So an epoch may end with fewer batches than gradients are accumulated over.
Its loss of an evaluation is the mean over batches, which depends on how samples are dealt out; here it is that over all tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loaders.epochs import EpochLoader
from wds_tools.errors import UsageError
from wds_tools.sequences.rows import NOT_TRAINED


class LoaderTrainer(Trainer):
    """A Trainer whose `train_dataset` is an EpochLoader; batch sizes are the loader's. Needs `ignore_data_skip=False`."""

    _evaluated = 0.0, 0
    """Loss summed over tokens, and number of these tokens, of this rank in an evaluation."""

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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """An EpochLoader of an evaluation itself; of anything else what the Trainer makes.

        Raises:
            UsageError: its loader is none for an evaluation, or has fewer samples than there are ranks, which then would wait.
        """
        named: Any = self.eval_dataset
        found = named if eval_dataset is None else named[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if not isinstance(found, EpochLoader):
            return super().get_eval_dataloader(eval_dataset)
        if not found.loader.config.evaluation:
            raise UsageError("eval_dataset: its loader goes on from epoch to epoch; make it with LoaderConfig(evaluation=True)")
        if found.loader.num_samples < found.loader.world.world_size:
            raise UsageError(
                f"eval_dataset: {found.loader.num_samples} samples for {found.loader.world.world_size} ranks: give every rank one"
            )
        return found

    def evaluation_loop(self, dataloader: Any, *args: Any, **settings: Any) -> Any:
        """As Trainer.evaluation_loop; of an EpochLoader the loss is the mean over its trained tokens on all ranks."""
        if not isinstance(dataloader, EpochLoader):
            return super().evaluation_loop(dataloader, *args, **settings)
        averaged, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        self._evaluated = 0.0, 0
        loader: Any = dataloader
        try:
            output = super().evaluation_loop(loader, *args, **settings)
        finally:
            self.args.average_tokens_across_devices = averaged
        world, sums = loader.loader.world, [self._evaluated]
        if world.world_size > 1:
            sums = [tuple(json.loads(data)) for data in world.gather(json.dumps(self._evaluated).encode())]
        losses, num_tokens = map(sum, zip(*sums, strict=True))
        name = f"{settings.get('metric_key_prefix', 'eval')}_loss"
        metrics = {**(output.metrics or {}), name: losses / max(num_tokens, 1)}
        return output._replace(metrics=metrics, num_samples=dataloader.loader.num_samples)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        """As Trainer.prediction_step; counts the loss of an evaluation."""
        num_tokens = int((inputs["labels"][..., 1:] != NOT_TRAINED).sum()) if "labels" in inputs else 0
        outputs: Any = super().prediction_step(model, inputs, *args, **settings)
        if num_tokens:
            self._evaluated = self._evaluated[0] + float(outputs[0]) * num_tokens, self._evaluated[1] + num_tokens
        return outputs


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
            UsageError: it has no save, one of other data, or one that stands elsewhere in an epoch than the Trainer; or training
                begins, and the loader is in the middle of an epoch.
        """
        begins, mend = "training begins", "make another loader, or resume_from_checkpoint"
        if state.global_step:
            folder = args.resume_from_checkpoint or _checkpoint(args, state)
            if not self._epoch_loader.loader.resume(folder):
                raise UsageError(f"{folder} has no save of a loader: was the checkpoint written with a LoaderCallback?")
            begins = f"{folder} is of update {state.global_step:,}"
            mend = "keep gradient_accumulation_steps, batch_size and the steps of EpochLoader as they were"
        steps, accumulated = len(self._epoch_loader), args.gradient_accumulation_steps
        counted = state.global_step % -(-steps // accumulated) * accumulated
        if counted != self._epoch_loader.done:
            raise UsageError(
                f"{begins}: the Trainer counts {counted} batches into an epoch of {steps}, the loader is "
                f"{self._epoch_loader.done} into one: {mend}"
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

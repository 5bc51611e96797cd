"""A loader under the Trainer of transformers: batches as they come, and a state in every checkpoint.

    epoch_loader = EpochLoader(loader, steps)
    LoaderTrainer(train_dataset=epoch_loader, callbacks=[LoaderCallback(epoch_loader)], ...)

The Trainer would wrap a dataset in a DataLoader of accelerate's, which deals out batches again and reads one ahead of what was
trained; the loader's batches are this rank's already, so they go to the model as they are. After a resume it would skip what
was seen by reading it again: `ignore_data_skip=True` leaves that to the loader, which goes on where the checkpoint stands.
Its loss of an evaluation is the mean over batches, which depends on how samples are dealt out; here it is that over all tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loaders.epochs import EpochLoader
from wds_tools.errors import UsageError
from wds_tools.format.typed_json import read_json
from wds_tools.sequences.rows import NOT_TRAINED
from wds_tools.storage import open_store

STATE = "loader.json"
"""Name of the loader's state in a checkpoint."""


class LoaderTrainer(Trainer):
    """A Trainer whose `train_dataset` is an EpochLoader. Needs `ignore_data_skip=True`; batch sizes are the loader's."""

    _evaluated = 0.0, 0
    """Loss summed over tokens, and number of these tokens, of this rank in an evaluation."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **settings: Any) -> Any:
        """As Trainer.train; the callback is told which checkpoint was named."""
        self.args.resume_from_checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **settings)

    def get_train_dataloader(self) -> Any:
        """The EpochLoader itself."""
        if not self.args.ignore_data_skip:
            raise UsageError("TrainingArguments(ignore_data_skip=True): the loader goes on by itself where the checkpoint stands")
        return self.train_dataset

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
    """Saves the loader's state with each checkpoint, and restores it when training begins from one.

    Args:
        epoch_loader: the `train_dataset` of the Trainer.
    """

    def __init__(self, epoch_loader: EpochLoader) -> None:
        self._epoch_loader = epoch_loader

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Write the state into the checkpoint that was just saved."""
        saved = self._epoch_loader.state_dict()  # on every rank
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            open_store(str(folder)).put(STATE, json.dumps(saved).encode())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Take up the state of the checkpoint that training goes on from."""
        if state.global_step:
            last = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.restore(args.resume_from_checkpoint or last)

    def restore(self, checkpoint: str | Path) -> None:
        """Take up the state in a checkpoint's folder.

        Raises:
            UsageError: there is none, or it is of other data.
        """
        path = Path(checkpoint) / STATE
        if not path.exists():
            raise UsageError(f"{path} does not exist: was the checkpoint saved with a LoaderCallback?")
        self._epoch_loader.load_state_dict(read_json(dict[str, Any], path.read_bytes(), f"{path}: not a state", UsageError))

"""A loader under the Trainer of transformers: batches as they come, and a state in every checkpoint.

    epoch_loader = EpochLoader(loader, steps)
    LoaderTrainer(train_dataset=epoch_loader, callbacks=[LoaderCallback(epoch_loader)], ...)

The Trainer would wrap a dataset in a DataLoader of accelerate's, which deals out batches again and reads one ahead of what was
trained; the loader's batches are this rank's already, so they go to the model as they are. After a resume it would skip what
was seen by reading it again: `ignore_data_skip=True` leaves that to the loader, which goes on where the checkpoint stands.
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
from wds_tools.storage import open_store

STATE = "loader.json"
"""Name of the loader's state in a checkpoint."""


class LoaderTrainer(Trainer):
    """A Trainer whose `train_dataset` is an EpochLoader. Needs `ignore_data_skip=True`; batch sizes are the loader's."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **settings: Any) -> Any:
        """As Trainer.train; the callback is told which checkpoint was named."""
        self.args.resume_from_checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **settings)

    def get_train_dataloader(self) -> Any:
        """The EpochLoader itself."""
        if not self.args.ignore_data_skip:
            raise UsageError("TrainingArguments(ignore_data_skip=True): the loader goes on by itself where the checkpoint stands")
        return self.train_dataset


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

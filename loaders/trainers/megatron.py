"""A loader under Megatron-Core: micro-batches of token rows for `forward_backward_func`, and a state for its checkpoints.

    rank 0 of each tensor-parallel group: Loader -> MegatronIterator -> broadcast -> all of the group

Only that process reads; its peers get each micro-batch over their group. A micro-batch is a step of the loader, so `batch_size`
is micro-batch size x data-parallel size. Rows have one length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from loaders.batches.collate import Batch
from loaders.config import LoaderConfig
from loaders.epochs import all_epochs
from loaders.loader import Loader, build_loader
from loaders.trainers.shifted import shifted
from loaders.world import World
from wds_tools.errors import UsageError


class MegatronIterator:
    """Endless micro-batches. To be made after `initialize_model_parallel`, by every process of a pipeline stage that needs data.

    Args:
        config: what to read; with `sequences` and `packing`, or shards of `wds-tools pack`.
        seq_length: tokens of a row.

    Raises:
        UsageError: batch_size is no multiple of the data-parallel size; `epochs` is given; or see build_loader.
    """

    def __init__(self, config: LoaderConfig, seq_length: int) -> None:
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._source = parallel_state.get_tensor_model_parallel_src_rank()
        self._device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        num_readers = parallel_state.get_data_parallel_world_size()
        if config.epochs is not None:
            raise UsageError(f"epochs={config.epochs}: the peers of the process that reads would wait for ever behind the last")
        if config.batch_size % num_readers:
            raise UsageError(f"batch_size={config.batch_size} is no multiple of the data-parallel size, {num_readers}")
        self._shape = 3, config.batch_size // num_readers, seq_length
        world = World.from_group(parallel_state.get_data_parallel_group())
        self.loader: Loader | None = build_loader(config, world) if dist.get_rank() == self._source else None
        """The loader, in the process of each tensor-parallel group that reads."""
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> MegatronIterator:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next micro-batch, on the device of the tensor-parallel group.

        Returns:
            tokens, labels, position_ids (B, L) int64, loss_mask (B, L) float32: labels are the next tokens; positions begin at 0
            in every segment.

        Raises:
            UsageError: see `shifted`.
        """
        if self.loader is None:
            sent_3BL = torch.empty(self._shape, dtype=torch.int64, device=self._device)
        else:
            self._batches = self._batches or all_epochs(self.loader)
            sent_3BL = torch.stack(shifted(next(self._batches), self._shape[2])).to(self._device)
        dist.broadcast(sent_3BL, self._source, group=self._group)
        tokens_BL, labels_BL, positions_BL = sent_3BL
        loss_mask_BL = (labels_BL >= 0).float()
        labels_BL = labels_BL.clamp(min=0)
        return {"tokens": tokens_BL, "labels": labels_BL, "loss_mask": loss_mask_BL, "position_ids": positions_BL}

    def save_state(self) -> dict[str, Any] | None:
        """Where the run stands, the same in every process that reads, None in the others; all must call it."""
        return self.loader.gather_state() if self.loader is not None else None

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of any number of ranks. Raises UsageError as Loader.load_state_dict does."""
        self._batches = None
        if self.loader is not None:
            self.loader.load_state_dict(state)

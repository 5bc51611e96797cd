"""A loader under torchtitan's Trainer: rows of exactly seq_len tokens, and a state in its checkpoints.

    Trainer.Config(dataloader=TokenRowLoader.Config(loader=LoaderConfig(...)), ...)

torchtitan's labels stand where the token before them is read, those of transformers' models where the token is: here they are
moved. Every process has a loader, so a state is gathered over all of them, is the same on each, and goes on with any number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from loaders.config import LoaderConfig
from loaders.epochs import all_epochs
from loaders.loader import build_loader
from loaders.trainers.shifted import shifted
from loaders.world import World
from wds_tools.errors import UsageError
from wds_tools.format.typed_json import read_json


class TokenRowLoader(BaseDataLoader):  # type: ignore[misc]  # torchtitan may be absent
    """Batches of token rows as torchtitan takes them, epoch after epoch.

    Args:
        config: what to read.
        dp_world_size: number of data-parallel ranks.
        dp_rank: this one.
        seq_len: tokens of a row: `max_length` of rows packed on the fly, `--max-length` of rows packed ahead.
        local_batch_size: rows of a rank; of all ranks they are the batch, whatever batch_size the loader's config has.
        others: what torchtitan hands to every loader, such as a tokenizer: not used.

    Raises:
        UsageError: the settings do not fit the data or the world.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        """What to read."""

        loader: LoaderConfig
        """Sources that give token rows: with `sequences` and `packing`, or shards of `wds-tools pack`."""

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **others: Any
    ) -> None:
        del others
        self._seq_len = seq_len
        several = dist.is_initialized() and dist.get_world_size() > 1
        world = World(rank=dp_rank, world_size=dp_world_size, group=dist.new_group(backend="gloo") if several else None)
        self.loader = build_loader(replace(config.loader, batch_size=local_batch_size * dp_world_size), world)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Pairs of {"input": ids (B, L), "positions": (B, L)} and labels (B, L), int64: see ShiftedRows.

        Raises:
            UsageError: see `shifted`.
        """
        for batch in all_epochs(self.loader):
            ids_BL, labels_BL, positions_BL = shifted(batch, self._seq_len)
            yield {"input": ids_BL, "positions": positions_BL}, labels_BL

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, the same on every process; all of them must call it."""
        return {"loader": json.dumps(self.loader.gather_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of any number of ranks. Raises UsageError as Loader.load_state_dict does."""
        if state_dict:
            self.loader.load_state_dict(
                read_json(dict[str, Any], str(state_dict.get("loader", "")).encode(), "not a state", UsageError)
            )

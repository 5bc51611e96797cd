"""Rows of one length in the form of trainers that compare position i of the logits with position i of the labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loaders.batches.collate import Batch
from wds_tools.errors import UsageError


class ShiftedRows(NamedTuple):
    """Packed rows, each (B, L) int64: B rows of L tokens."""

    ids: Tensor
    """Token ids."""
    labels: Tensor
    """The id that follows each token, -100 where it is not trained."""
    positions: Tensor
    """Positions; they begin at 0 in every segment."""


def shifted(batch: Batch | dict[str, Any], seq_len: int) -> ShiftedRows:
    """A batch of packed rows with the labels one position earlier than the models of transformers have them.

    Args:
        batch: as a Loader gives it.
        seq_len: tokens of a row.

    Raises:
        UsageError: the batch is not of packed rows, or they have another length.
    """
    ids_BL, positions_BL = batch.get("input_ids"), batch.get("position_ids")
    if ids_BL is None or positions_BL is None or ids_BL.shape[1] != seq_len:
        found = "no packed rows" if positions_BL is None else f"rows of {positions_BL.shape[1]} tokens"
        raise UsageError(
            f"{found}, expected packed rows of {seq_len}: give sequences=SequenceConfig(max_length={seq_len}, ...) and "
            f"packing=True, or shards of `wds-tools pack --max-length {seq_len}`"
        )
    labels_BL = torch.full_like(batch["labels"], -100)
    labels_BL[:, :-1] = batch["labels"][:, 1:]
    return ShiftedRows(ids_BL, labels_BL, positions_BL)

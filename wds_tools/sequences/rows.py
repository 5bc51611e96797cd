"""Rows as they are stored and as they are trained on: members of a shard, and arrays of a batch.

    KEY.tokens.npy    (L,) ids, in the smallest unsigned type that holds the vocabulary
    KEY.loss.npy      (ceil(L / 8),) uint8: a bit for each token, the first is the highest: which are trained
    KEY.segments.npy  (S,) tokens of each example or piece of a document; what is left of L is padding

Members of a dataset have one L. Labels are ids, or -100 where nothing is trained: padding, prompts, and the first token of a
segment, which would be predicted from the segment before. Legend: B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_tools.format.schema import TOKEN_MEMBERS
from wds_tools.format.shard import npy_bytes
from wds_tools.sequences.build import Example
from wds_tools.sequences.pack import Row

TOKENS, LOSS, SEGMENTS = TOKEN_MEMBERS
NOT_TRAINED = -100
"""What torch's cross entropy and transformers ignore."""


class TokenBatch(NamedTuple):
    """A batch of rows. Its matrices lie in one array: between processes each costs its receiver half a millisecond."""

    numbers: NDArray[np.int64]
    """(3, B, L): input_ids, labels, and position_ids of packed rows, attention_mask of padded ones."""
    cu_seqlens: NDArray[np.int32] | None = None
    """Of packed rows: (segments + 1,)."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """input_ids, labels, and position_ids or attention_mask: (B, L) int64, views; of packed rows cu_seqlens, int32."""
        input_ids, labels, third = self.numbers
        if self.cu_seqlens is None:
            return {"input_ids": input_ids, "labels": labels, "attention_mask": third}
        return {"input_ids": input_ids, "labels": labels, "position_ids": third, "cu_seqlens": self.cu_seqlens}


def ids_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type for ids below this."""
    return np.min_scalar_type(vocabulary_size - 1).newbyteorder("<")


def row_members(row: Row, dtype: np.dtype[Any]) -> list[tuple[str, bytes]]:
    """The (suffix, payload) members of a row."""
    segments = np.array(row.segments, ids_dtype(len(row.ids) + 1))
    return [
        (TOKENS, npy_bytes(row.ids.astype(dtype))),
        (LOSS, npy_bytes(np.packbits(row.loss))),
        (SEGMENTS, npy_bytes(segments)),
    ]


def packed_batch(ids_BL: NDArray[Any], loss_BL: NDArray[np.bool_], segments: Sequence[Sequence[int]]) -> TokenBatch:
    """A batch of rows.

    Args:
        ids_BL: any integers.
        loss_BL: which are trained.
        segments: of each row.

    Returns:
        Position ids start at 0 in every segment; cu_seqlens is where the segments of the B * L tokens begin, and at last B * L,
        as flash_attn_varlen_func takes them; padding is a segment.
    """
    length = ids_BL.shape[1]
    lengths: list[int] = []
    for own in segments:
        lengths += own
        if (padding := length - sum(own)) > 0:
            lengths.append(padding)
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    numbers_KBL = np.empty((3, *ids_BL.shape), np.int64)
    numbers_KBL[0] = ids_BL
    labels = numbers_KBL[1]
    labels[:] = NOT_TRAINED
    np.copyto(labels, numbers_KBL[0], where=loss_BL)  # of labels' own type: casting takes longer
    labels.reshape(-1)[cu_seqlens[:-1]] = NOT_TRAINED
    position = np.arange(ids_BL.size, dtype=np.int32)  # half the memory to go through
    position -= np.repeat(cu_seqlens[:-1], lengths)
    numbers_KBL[2] = position.reshape(ids_BL.shape)
    return TokenBatch(numbers_KBL, cu_seqlens)


def padded_batch(pieces: Sequence[Example], pad_id: int) -> TokenBatch:
    """A batch of examples of at most a row, padded on the right to the longest."""
    lengths = np.array([len(piece.ids) for piece in pieces], np.int64)
    is_token = np.arange(lengths.max()) < lengths[:, None]
    numbers_KBL = np.empty((3, *is_token.shape), np.int64)
    input_ids, labels, attention_mask = numbers_KBL
    input_ids[:] = pad_id
    labels[:] = NOT_TRAINED
    attention_mask[:] = is_token
    ids = np.concatenate([piece.ids for piece in pieces])
    loss = np.concatenate([piece.loss for piece in pieces])
    input_ids[is_token] = ids
    labels[is_token] = np.where(loss, ids, NOT_TRAINED)
    return TokenBatch(numbers_KBL)


def cut(example: Example, max_length: int) -> list[Example]:
    """An example as pieces of at most a row: a document may make several, interleaved or not; anything else is one already."""
    if len(example.ids) <= max_length:
        return [example]
    borders = [*accumulate(example.pieces, initial=0)]
    if not example.pieces:
        borders = [*range(0, len(example.ids), max_length), len(example.ids)]
    return [example._replace(ids=example.ids[begin:end], loss=example.loss[begin:end]) for begin, end in pairwise(borders)]

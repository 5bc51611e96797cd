"""Packing: rows of one length that hold every token once, whatever the lengths, and a state that is a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from loaders.batches.collate import TokenTensors
from wds_tools.errors import UsageError
from wds_tools.sequences.build import Example
from wds_tools.sequences.pack import MIN_CUT, Packer, Row
from wds_tools.sequences.rows import NOT_TRAINED, cut, ids_dtype, packed_batch, padded_batch

LENGTH = 64
PAD = 2


def example(number: int, size: int, *, is_document: bool = False) -> Example:
    ids = np.arange(size, dtype=np.int32) + 1000 * number + 10
    return Example(f"key-{number}", ids, ids % 3 > 0, is_document)


def examples(sizes: Sequence[tuple[int, bool]]) -> list[Example]:
    return [
        example(number, size if is_document else min(size, LENGTH), is_document=is_document)
        for number, (size, is_document) in enumerate(sizes)
    ]


def in_pieces(number: int, sizes: list[int]) -> Example:
    """An interleaved document."""
    return example(number, sum(sizes))._replace(pieces=tuple(sizes) if len(sizes) > 1 else ())


def packed(stream: list[Example]) -> list[Row]:
    packer, rows = Packer(LENGTH, PAD), []
    for number, one in enumerate(stream):
        packer.add(number, one)
        while not packer.wants_more:
            rows.append(packer.row())
    return [*rows, *packer.rest()]


ONE = st.tuples(st.integers(1, 4 * LENGTH), st.booleans())
PIECES = st.lists(st.integers(1, LENGTH), min_size=1, max_size=5)
STREAMS = st.lists(ONE | PIECES, max_size=60).map(
    lambda drawn: [
        in_pieces(number, one) if isinstance(one, list) else examples([(1, False)] * number + [one])[number]
        for number, one in enumerate(drawn)
    ]
)


@tries(150)
@given(STREAMS)
def test_every_token_is_in_the_rows_once_in_order_and_only_documents_are_cut_anywhere(stream: list[Example]) -> None:
    found: dict[str, list[np.ndarray]] = {}
    ended = []
    for row in packed(stream):
        assert len(row.ids) == len(row.loss) == LENGTH
        begin = 0
        for key, size in zip(row.keys, row.segments, strict=True):
            found.setdefault(key, []).append(row.ids[begin : begin + size])
            begin += size
        assert (row.ids[begin:] == PAD).all()
        assert not row.loss[begin:].any()
        ended += row.ended
    for one in stream:
        assert np.concatenate(found[one.key]).tolist() == one.ids.tolist()
        assert one.is_document or tuple(map(len, found[one.key])) == (one.pieces or (len(one.ids),))
    assert sorted(ended) == list(range(len(stream)))


@tries(60)
@given(STREAMS, st.data())
def test_a_packer_made_anew_from_its_numbers_goes_on_alike(stream: list[Example], data: st.DataObject) -> None:
    packer, number = Packer(LENGTH, PAD), 0
    other: Packer | None = None
    stop = data.draw(st.integers(0, len(stream)))
    for number, one in enumerate(stream):
        packer.add(number, one)
        if other is not None:
            other.add(number, one)
        while not packer.wants_more:
            row = packer.row()
            assert other is None or _same(other.row(), row)
        if number == stop:
            other = Packer(LENGTH, PAD)
            for waiting, used in packer.waiting:
                other.add(waiting, stream[waiting], used)
    if other is not None:
        assert all(_same(*pair) for pair in zip(packer.rest(), other.rest(), strict=True))


def _same(one: Row, other: Row) -> bool:
    return one.ids.tolist() == other.ids.tolist() and one.loss.tolist() == other.loss.tolist() and one[2:] == other[2:]


def test_documents_fill_what_images_leave_open() -> None:
    rng = np.random.default_rng(0)
    sizes = [(36, False) if number % 2 else (int(rng.integers(5, 90)), True) for number in range(2000)]
    rows = packed(examples(sizes))
    padding = sum(row.num_padding for row in rows) / (LENGTH * len(rows))
    assert padding < MIN_CUT / LENGTH / 4


def test_the_best_fit_is_taken_and_of_equals_the_oldest() -> None:
    packer = Packer(LENGTH, PAD)
    for number, size in enumerate((40, 10, 20, 24, 20)):
        packer.add(number, example(number, size))
    assert [row.keys for row in packer.rest()] == [["key-0", "key-3"], ["key-1", "key-2", "key-4"]]


def test_what_has_waited_longest_goes_first() -> None:
    packer = Packer(LENGTH, PAD)
    packer.add(0, example(0, 5))
    for number in range(1, 9):
        packer.add(number, example(number, LENGTH))
    assert packer.row().keys == ["key-0"]


def test_an_image_longer_than_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match="key-1 has 65 tokens, a row 64"):
        Packer(LENGTH, PAD).add(0, example(1, LENGTH + 1))


def test_a_batch_keeps_segments_apart_as_flattening_does() -> None:
    from transformers import DataCollatorWithFlattening

    stream = examples([(20, False), (30, True), (64, False), (100, True), (10, False)])
    rows = packed(stream)
    ids_BL, loss_BL = (np.stack([getattr(row, name) for row in rows]) for name in ("ids", "loss"))
    ours = packed_batch(ids_BL, loss_BL, [row.segments for row in rows]).arrays()
    pieces = []
    for row in rows:
        begin = 0
        for size in [*row.segments, row.num_padding]:
            own = slice(begin, begin + size)
            labels = np.where(row.loss[own], row.ids[own], NOT_TRAINED)
            pieces.append({"input_ids": row.ids[own].tolist(), "labels": labels.tolist()})
            begin += size
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="np")(pieces)
    for name in ("input_ids", "labels", "position_ids"):
        assert ours[name].shape == (len(rows), LENGTH)
        assert ours[name].dtype == theirs[name].dtype == np.int64
        assert ours[name].reshape(1, -1).tolist() == theirs[name].tolist()
    assert ours["cu_seqlens"].dtype == theirs["cu_seq_lens_q"].dtype == np.int32
    assert ours["cu_seqlens"].tolist() == theirs["cu_seq_lens_q"].tolist()


def test_a_batch_travels_between_processes_as_one_tensor_and_arrives_as_it_was() -> None:
    rows = packed(examples([(20, False), (30, True), (64, False)]))
    ids_BL, loss_BL = (np.stack([getattr(row, name) for row in rows]) for name in ("ids", "loss"))
    for batch in (packed_batch(ids_BL, loss_BL, [row.segments for row in rows]), padded_batch(examples([(20, False)]), PAD)):
        travels = TokenTensors.of(batch)
        assert [type(part) for part in travels].count(torch.Tensor) == 1
        arrives = travels.to_columns()
        assert {name: tensor.tolist() for name, tensor in arrives.items()} == {
            name: array.tolist() for name, array in batch.arrays().items()
        }


def test_padded_batches_pad_on_the_right_and_long_documents_go_on_in_further_rows() -> None:
    stream = [*examples([(20, False), (150, True)]), in_pieces(2, [50, 64, 9])]
    pieces = [piece for one in stream for piece in cut(one, LENGTH)]
    assert [len(piece.ids) for piece in pieces] == [20, 64, 64, 22, 50, 64, 9]
    batch = padded_batch(pieces, PAD).arrays()
    assert batch["attention_mask"].sum(1).tolist() == [20, 64, 64, 22, 50, 64, 9]
    for piece, ids, labels in zip(pieces, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        size = len(piece.ids)
        assert ids == [*piece.ids.tolist(), *[PAD] * (LENGTH - size)]
        assert labels == [*np.where(piece.loss, piece.ids, -100).tolist(), *[-100] * (LENGTH - size)]


@pytest.mark.parametrize(("size", "dtype"), [(256, "|u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_ids_are_stored_in_the_smallest_type_that_holds_the_vocabulary(size: int, dtype: str) -> None:
    assert ids_dtype(size).str == dtype

"""What trainers ask of packed rows: segments padded for context parallelism, shapes that stay, trained tokens of all ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from tokens import write_small_sets

from loaders import LoaderConfig, SequenceConfig, ShardDataset, Source, World, build_loader, flatten
from wds_tools.errors import UsageError
from wds_tools.sequences.rows import packed_batch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sets(tmp_path_factory.mktemp("data"))


def config(data: Path, *, packing: bool, trained_tokens: bool = False) -> LoaderConfig:
    return LoaderConfig(
        sources=(Source(str(data / "pairs")), Source(str(data / "texts"))),
        sequences=SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=64),
        packing=packing,
        batch_size=4,
        trained_tokens=trained_tokens,
    )


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3),
    pad_multiple=st.integers(2, 8),
    spare=st.none() | st.integers(0, 3),
)
def test_padded_segments_hold_their_tokens_and_are_multiples_for_context_parallel_ranks(
    lengths: list[list[int]], pad_multiple: int, spare: int | None
) -> None:
    length = max(map(sum, lengths))
    ids = np.arange(1, 1 + length * len(lengths)).reshape(-1, length)
    arrays = packed_batch(ids, np.ones(ids.shape, np.bool_), lengths).arrays()
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    num_segments = None if spare is None else len(batch["cu_seqlens"]) - 1 + spare
    found = flatten(batch, pad_multiple, num_segments)
    begins, own = found["cu_seq_lens_q_padded"], found["cu_seq_lens_q"].diff().tolist()
    rooms = begins.diff().tolist()
    assert [room % pad_multiple for room in rooms] == [0] * len(rooms)
    assert len(rooms) == len(own) == (len(batch["cu_seqlens"]) - 1 if num_segments is None else num_segments)
    assert found["cu_seq_lens_q"].dtype == begins.dtype == torch.int32
    assert found["max_length_q"] >= max(rooms)
    for name in ("input_ids", "labels", "position_ids"):
        segments = zip(begins.tolist(), own, strict=False)
        assert torch.cat([found[name][0, low : low + num] for low, num in segments]).equal(batch[name].flatten())
    assert (found["labels"] != -100).sum() == (batch["labels"] != -100).sum()
    assert found["input_ids"].shape == found["labels"].shape == (1, sum(rooms))


def test_more_segments_than_there_is_room_for_are_refused(data: Path) -> None:
    batch = next(iter(build_loader(config(data, packing=True), World())))
    num_segments = len(batch["cu_seqlens"]) - 1
    fixed = flatten(batch, num_segments=num_segments + 5)
    assert fixed["cu_seq_lens_q"].tolist() == [*batch["cu_seqlens"].tolist(), *[batch["input_ids"].numel()] * 5]
    assert fixed["max_length_q"] == batch["input_ids"].shape[1]
    with pytest.raises(UsageError, match=f"has {num_segments} segments, num_segments={num_segments - 1}"):
        flatten(batch, num_segments=num_segments - 1)


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_brings_the_trained_tokens_of_all_ranks(data: Path, packing: bool) -> None:
    settings = config(data, packing=packing, trained_tokens=True)
    whole = [batch["trained_tokens"] for batch in islice(build_loader(settings, World()), 3)]
    labels = [batch["labels"][:, 1:] for batch in islice(build_loader(settings, World()), 3)]
    assert whole == [int((each != -100).sum()) for each in labels]
    ranks = on_ranks(2, lambda world: [batch["trained_tokens"] for batch in islice(build_loader(settings, world), 3)])
    assert ranks == [whole, whole]


def test_batches_that_are_no_token_rows_have_no_trained_tokens(data: Path) -> None:
    stored = LoaderConfig(sources=(Source(str(data / "texts")),), batch_size=4, trained_tokens=True)
    with pytest.raises(UsageError, match="no token rows"):
        next(iter(build_loader(stored, World())))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_trainers_default_device_changes_nothing(data: Path, num_workers: int) -> None:
    made = [
        build_loader(replace(config(data, packing=True), num_workers=num_workers)),
        build_loader(LoaderConfig(sources=(Source(str(data / "pairs")),), batch_size=4, num_workers=num_workers)),
    ]
    rows, samples = (next(iter(loader)) for loader in made)
    for loader in made:
        loader.close()
        loader.load_state_dict(build_loader(loader.config).state_dict())
    with torch.device("meta"):  # as torch.set_default_device does it
        again = [next(iter(loader)) for loader in made]
        dataset = ShardDataset(str(data / "pairs"))
        dataset.set_epoch(1)
        assert len(list(dataset)) == dataset.num_samples
        flat = flatten(again[0], 8)
    for loader in made:
        loader.close()
    assert again[0]["input_ids"].equal(rows["input_ids"])
    assert again[1]["codes"][0].equal(samples["codes"][0])
    assert all(flat[name].equal(value) for name, value in flatten(rows, 8).items() if isinstance(value, torch.Tensor))

"""The order of a source: a bijection for every epoch, pure, pinned, well mixed, and cheap to plan."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.order.plan import MAX_CHUNK_BYTES, MIN_BLOCK_BYTES, SourcePlan, block_samples, chunk_samples, default_order
from loaders.order.spec import OrderSpec
from wds_tools.errors import UsageError

ROOT = Path(__file__).parents[3]
SHARDS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 100_000)), min_size=1, max_size=8).filter(
    lambda shards: any(samples for samples, _ in shards)
)
ORDERS = st.builds(
    lambda seed, batch_size, per_sample, block, blocks, shuffle: OrderSpec(
        seed=seed,
        batch_size=batch_size,
        lanes_per_sample=per_sample,
        block_bytes=block,
        chunk_bytes=block * blocks,
        shuffle=shuffle,
    ),
    st.integers(0, 2**64 - 1),
    st.integers(1, 70),
    st.integers(1, 8),
    st.integers(1, 20_000),
    st.integers(1, 9),
    st.booleans(),
)


GROUP = 4
"""Samples of a group."""


def plan_of(shards: list[tuple[int, int]], spec: OrderSpec, max_samples: int | None = None) -> SourcePlan:
    samples, sizes = (np.array(column, np.int64) for column in zip(*shards, strict=True))
    return SourcePlan(samples, sizes, GROUP, spec, max_samples)


def samples_of(plan: SourcePlan, epoch: int) -> list[tuple[int, int]]:
    found = plan.locate(epoch, np.arange(plan.num_samples))
    return list(zip(found.shard.tolist(), found.sample_index.tolist(), strict=True))


@given(SHARDS, ORDERS, st.integers(0, 1000))
def test_every_epoch_is_a_bijection_onto_the_samples(shards: list[tuple[int, int]], spec: OrderSpec, epoch: int) -> None:
    found = samples_of(plan_of(shards, spec), epoch)
    assert sorted(found) == [(number, index) for number, (samples, _) in enumerate(shards) for index in range(samples)]


@given(SHARDS, ORDERS, st.integers(0, 1000), st.randoms())
def test_a_position_leads_to_one_sample_whoever_asks_and_in_whatever_company(
    shards: list[tuple[int, int]], spec: OrderSpec, epoch: int, random: Any
) -> None:
    plan = plan_of(shards, spec)
    whole = samples_of(plan, epoch)
    positions = [random.randrange(plan.num_samples) for _ in range(7)]
    plan.locate(epoch + 1, np.arange(1))
    plan.locate(epoch + 2, np.arange(1))
    found = plan_of(shards, spec).locate(epoch, np.array(positions))
    again = plan.locate(epoch, np.array(positions))
    assert [whole[position] for position in positions] == list(
        zip(found.shard.tolist(), found.sample_index.tolist(), strict=True)
    )
    assert all((one == other).all() for one, other in zip(found, again, strict=True))


@given(SHARDS, ORDERS, st.integers(0, 5))
def test_a_shuffle_block_is_one_run_of_samples_and_is_handed_out_by_one_lane_in_turn(
    shards: list[tuple[int, int]], spec: OrderSpec, epoch: int
) -> None:
    plan = plan_of(shards, spec)
    positions = np.arange(plan.num_samples)
    found = plan.locate(epoch, positions)
    blocks: dict[int, list[int]] = {}
    for position, block in zip(positions.tolist(), found.block.tolist(), strict=True):
        blocks.setdefault(block, []).append(position)
    for at in blocks.values():
        first, num_samples, shard = (np.unique(column[at]) for column in (found.first, found.num_samples, found.shard))
        assert len(first) == len(num_samples) == len(shard) == 1
        assert sorted(found.sample_index[at]) == list(range(int(first[0]), int(first[0] + num_samples[0])))
        assert found.num_done[at].tolist() == list(range(len(at)))
        assert len({position % spec.lanes for position in at}) == 1
        assert num_samples[0] <= block_samples(*shards[int(shard[0])], GROUP, spec)


@given(SHARDS, ORDERS, st.integers(0, 5))
def test_what_a_lane_reads_next_lies_side_by_side_as_far_as_it_says(
    shards: list[tuple[int, int]], spec: OrderSpec, epoch: int
) -> None:
    plan = plan_of(shards, spec)
    found = plan.locate(epoch, np.arange(plan.num_samples))
    where = {
        int(block): (int(shard), int(first), int(size))
        for block, shard, first, size in zip(found.block, found.shard, found.first, found.num_samples, strict=True)
    }
    for block, run in zip(found.block.tolist(), found.num_in_run.tolist(), strict=True):
        shard, first, size = where[block]
        covered = size
        while covered < run:
            next_shard, next_first, next_size = where[block + covered]
            assert (next_shard, next_first) == (shard, first + covered)
            covered += next_size
        assert covered == run


@given(SHARDS, ORDERS, st.data())
def test_a_limit_takes_the_same_samples_in_every_epoch(
    shards: list[tuple[int, int]], spec: OrderSpec, data: st.DataObject
) -> None:
    limit = data.draw(st.integers(1, sum(samples for samples, _ in shards)))
    plan = plan_of(shards, spec, limit)
    first = samples_of(plan, 0)
    assert len(set(first)) == len(first) == limit
    assert sorted(samples_of(plan, 3)) == sorted(first)


@given(st.integers(0, 2**32), st.integers(1 << 13, 1 << 20))
@settings(max_examples=3, deadline=None)
def test_positions_of_a_trillion_samples_lead_to_as_many_different_ones(seed: int, batch_size: int) -> None:
    random = np.random.default_rng(seed)
    samples = random.integers(0, 1 << 32, 500)
    plan = SourcePlan(samples, samples * 2, 8, default_order(int(samples.sum()) * 2, batch_size, seed))
    positions = np.unique(random.integers(0, plan.num_samples, 2000))
    found = plan.locate(3, positions)
    assert (found.sample_index < samples[found.shard]).all()
    assert len(np.unique(found.shard << 40 | found.sample_index)) == len(positions)
    # The positions of a block, wherever it lies, lead to all of its samples and to no other.
    lanes, at = plan.spec.lanes, int(random.integers(len(positions)))
    first = positions[at] - found.num_done[at] * lanes
    block = plan.locate(3, first + np.arange(found.num_samples[at]) * lanes)
    assert (block.block == found.block[at]).all()
    assert sorted(block.sample_index.tolist()) == list(range(found.first[at], found.first[at] + found.num_samples[at]))


@given(SHARDS, ORDERS, st.integers(0, 5))
def test_a_batch_reads_every_kth_stretch_of_the_shuffled_chunks(
    shards: list[tuple[int, int]], spec: OrderSpec, epoch: int
) -> None:
    plan = plan_of(shards, spec)
    lanes, per_sample = spec.lanes, spec.lanes_per_sample
    found = plan.locate(epoch, np.arange(plan.num_samples))
    place = (found.block + found.num_done).tolist()  # in the shuffled chunks
    of_lane = [sorted(place[lane::lanes]) for lane in range(min(lanes, plan.num_samples))]
    stretches = sorted((places[0], places, lane) for lane, places in enumerate(of_lane))
    assert [at for _, places, _ in stretches for at in places] == list(range(plan.num_samples))
    if lanes > 1:
        dealt = [lane % spec.batch_size * per_sample + lane // spec.batch_size for _, _, lane in stretches]
        assert dealt == sorted(dealt)


@given(SHARDS, ORDERS)
def test_blocks_and_chunks_are_whole_groups_of_a_shard(shards: list[tuple[int, int]], spec: OrderSpec) -> None:
    samples, sizes = (np.array(column, np.int64) for column in zip(*shards, strict=True))
    block, chunk = block_samples(samples, sizes, GROUP, spec), chunk_samples(samples, sizes, GROUP, spec)
    group = GROUP if spec.block_bytes > 1 else 1
    assert not (block % group).any()
    assert not (chunk % block).any()
    assert ((block == group) | (block * sizes <= spec.block_bytes * samples)).all()


def test_any_lanes_positions_in_a_row_come_from_different_lanes() -> None:
    spec = OrderSpec(seed=1, batch_size=50, lanes_per_sample=1, block_bytes=2000, chunk_bytes=8000)
    plan = plan_of([(1000, 100_000)] * 10, spec)
    found = plan.locate(0, np.arange(plan.num_samples))
    for start in range(0, plan.num_samples - 50, 977):
        assert len(np.unique(found.block[start : start + 50])) == 50


def test_seed_and_epoch_give_orders_that_have_nothing_to_do_with_each_other() -> None:
    shards = [(500, 500_000)] * 20
    spec = OrderSpec(seed=7, batch_size=64, lanes_per_sample=1, block_bytes=8000, chunk_bytes=16_000)
    orders = [np.array(samples_of(plan_of(shards, spec), epoch)) @ [500, 1] for epoch in range(4)]
    orders.append(np.array(samples_of(plan_of(shards, replace(spec, seed=8)), 0)) @ [500, 1])
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).mean() < 0.01
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


def test_small_shuffle_blocks_are_permuted_evenly() -> None:
    """All 24 orders of four samples, each about as often as the others, over epochs."""
    plan = plan_of([(4, 4)], OrderSpec(seed=3, batch_size=1, lanes_per_sample=1, block_bytes=4, chunk_bytes=4))
    seen: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        rows = tuple(plan.locate(epoch, np.arange(4)).sample_index.tolist())
        seen[rows] = seen.get(rows, 0) + 1
    assert len(seen) == 24
    assert 20 < min(seen.values()) <= max(seen.values()) < 90


def test_without_shuffle_position_p_is_sample_p() -> None:
    plan = plan_of([(3, 300), (0, 10), (5, 500)], default_order(800, 4, 42, shuffle=False))
    assert samples_of(plan, 9) == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]


def test_the_order_is_pinned() -> None:
    """These change only together with ORDER_VERSION."""
    spec = OrderSpec(seed=42, batch_size=3, lanes_per_sample=2, block_bytes=400, chunk_bytes=800)
    plan = plan_of([(7, 700), (12, 1200), (1, 100)], spec)
    assert samples_of(plan, 0) == PINNED_EPOCH_0
    assert [shard * 100 + row for shard, row in samples_of(plan, 1)] == PINNED_EPOCH_1


def test_defaults_follow_the_size_of_the_data() -> None:
    small, middle, large = (default_order(size, 1024, 42) for size in (10 << 20, 1 << 30, 10 << 40))
    assert small.chunk_bytes == 1  # every sample by itself
    assert MIN_BLOCK_BYTES < middle.chunk_bytes < MAX_CHUNK_BYTES
    assert large.chunk_bytes == MAX_CHUNK_BYTES
    assert large.block_bytes == 256 << 10
    assert [order.lanes_per_sample for order in (small, middle, large)] == [8, 4, 4]
    by_batch = [default_order(10 << 40, batch_size, 42) for batch_size in (1, 256, 257, 512, 4096)]
    assert [order.lanes_per_sample for order in by_batch] == [8, 8, 4, 4, 4]
    assert [order.block_bytes >> 10 for order in by_batch] == [4096, 512, 1020, 512, 128]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"batch_size": 0}, "batch_size=0 x lanes_per_sample=1"),
        ({"batch_size": 1 << 29, "lanes_per_sample": 4}, "not in 1 ... 2.*31 - 1 lanes"),
        ({"block_bytes": 0}, "block_bytes=0"),
        ({"block_bytes": 9, "chunk_bytes": 8}, "block <= chunk"),
    ],
)
def test_an_impossible_order_is_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        OrderSpec(**{"seed": 1, "batch_size": 1, "lanes_per_sample": 1, "block_bytes": 1, "chunk_bytes": 1, **change})


def test_an_empty_dataset_and_an_impossible_limit_are_refused() -> None:
    spec = default_order(100, 1, 1)
    with pytest.raises(UsageError, match="no samples"):
        plan_of([(0, 1024)], spec)
    with pytest.raises(UsageError, match="max_samples=8"):
        plan_of([(7, 1024)], spec, 8)


@pytest.mark.slow
def test_a_plan_of_100_million_samples_takes_little_memory() -> None:
    code = (
        "import time\n"
        "import numpy as np\n"
        "from loaders.order.plan import SourcePlan, default_order\n"
        "def peak(): return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))\n"
        "samples, sizes = np.full(10_000, 10_000), np.full(10_000, 41_000_000)\n"
        "before = peak()\n"
        "started = time.process_time()\n"
        "plan = SourcePlan(samples, sizes, 4, default_order(int(sizes.sum()), 1024, 42))\n"
        "plan.locate(0, np.arange(1024) + 90_000_000)\n"
        "print(peak() - before, time.process_time() - started)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    grown_kb, cpu_s = said.split()
    assert int(grown_kb) < 100_000
    assert float(cpu_s) < 1, "0.05 where it was written"


PINNED_EPOCH_0 = [
    (1, 0),
    (1, 7),
    (0, 5),
    (1, 5),
    (0, 2),
    (1, 11),
    (1, 2),
    (2, 0),
    (0, 6),
    (1, 4),
    (0, 3),
    (1, 9),
    (1, 1),
    (0, 0),
    (1, 8),
    (1, 6),
    (0, 4),
    (1, 10),
    (1, 3),
    (0, 1),
]
PINNED_EPOCH_1 = [200, 6, 103, 3, 111, 107, 1, 108, 102, 5, 100, 105, 0, 110, 104, 4, 101, 106, 2, 109]

"""OrderSpec: JSON and back, and what differs between two."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders import LoaderConfig, Source
from loaders.cost.simulate import imagined_source, simulate
from loaders.order.samples import OpenSource, SampleOrder, order_spec
from loaders.order.spec import OrderSpec, SourceSpec
from wds_tools.errors import UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.typed_json import shape
from wds_tools.storage import open_store

SOURCES = st.builds(
    SourceSpec, repeat=st.integers(1, 99), max_samples=st.none() | st.integers(1, 10**9), code_set=st.none() | st.text()
)
SPECS = st.builds(
    OrderSpec,
    seed=st.integers(0, 2**64 - 1),
    batch_size=st.integers(1, 2**20),
    lanes_per_sample=st.integers(1, 2**10),
    block_bytes=st.integers(1, 1000),
    chunk_bytes=st.integers(1000, 1 << 39),
    shuffle=st.booleans(),
    sources=st.lists(SOURCES, min_size=1, max_size=3).map(tuple),
    schedule=st.lists(st.tuples(st.integers(0, 10**9), st.lists(st.floats(0, 9), max_size=3).map(tuple)), max_size=3).map(tuple),
    length=st.integers(1, 10**12),
    transform_id=st.none() | st.text(),
)


@given(SPECS)
def test_a_spec_comes_back_from_its_json(spec: OrderSpec) -> None:
    document = spec.to_json()
    assert json.loads(json.dumps(document)) == document
    assert shape(OrderSpec, document, "a spec") == spec


@given(SPECS, SPECS)
def test_specs_differ_in_the_fields_that_are_named_and_in_no_other(spec: OrderSpec, other: OrderSpec) -> None:
    assert list(spec.differences(spec)) == []
    assert bool(list(spec.differences(other))) == (spec != other)
    changed = replace(spec, seed=spec.seed ^ 1, sources=(replace(spec.sources[0], repeat=100), *spec.sources[1:]))
    assert list(spec.differences(changed)) == [
        ("repeat of source 0", spec.sources[0].repeat, 100),
        ("seed", spec.seed, spec.seed ^ 1),
    ]


def test_a_spec_that_does_not_fit_its_sources_is_refused() -> None:
    source = imagined_source(100, 1000)
    spec = order_spec([source], LoaderConfig(sources=(Source("imagined"),), batch_size=4))
    with pytest.raises(UsageError, match="an epoch of 99 samples, but the sources have 100"):
        SampleOrder([source], replace(spec, length=99))
    with pytest.raises(UsageError, match="2 sources, but an order of 1"):
        SampleOrder([source, source], spec)


@pytest.mark.parametrize("stop_at", ["first_exhausted", "all_exhausted", 100])
def test_an_empty_source_of_a_mixture_is_named_unless_its_weight_is_0(stop_at: Any) -> None:
    for weight in (1.0, 0.0):
        sources = Source("a", weight=1.0), Source("b", weight=weight)
        opened = [imagined_source(100, 1000), OpenSource(sources[1], open_store("memory://empty"), Manifest(shards=(), inputs=0))]
        spec = order_spec(opened, config := LoaderConfig(sources=sources, batch_size=4, stop_at=stop_at))
        if weight:
            with pytest.raises(UsageError, match="memory://empty: the dataset has no samples"):
                SampleOrder(opened, spec)
        else:
            assert sorted(SampleOrder(opened, spec).locate(0, np.arange(100)).sample_index.tolist()) == list(range(100))
            assert simulate(opened, config).epoch_samples == 100


SETTINGS: dict[str, list[Any]] = {
    "memory_bytes": [1 << number for number in range(13, 43, 3)],
    "scarce_memory": [False, True],
    "max_requests": [1 << number for number in range(10)],
    "num_workers": list(range(10)),
    "prefetch_factor": list(range(1, 11)),
    "cache_dir": [None, *(f"cache-{number}" for number in range(9))],
    "cache_bytes": [1 << number for number in range(13, 43, 3)],
    "start_method": [None, "fork", "spawn", "forkserver"],
    "epochs": [None, *range(1, 10)],
    "last_batch": ["drop", "short", "wrap"],
    "check_crc": [False, True],
    "trained_tokens": [False, True],
    "max_bad": list(range(10)),
    "timeout_s": [1.0, 1800.0],
    "pin_memory": [False, True],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_that_decides_what_is_fetched_when_has_a_part_in_the_order(name: str) -> None:
    opened = [imagined_source(2_000_000, 400), imagined_source(300_000, 9000)]
    for weights in ((None, None), (0.7, 0.3)):
        sources = tuple(Source("imagined", weight=weight) for weight in weights)
        config = LoaderConfig(sources=sources, batch_size=64)
        assert len({order_spec(opened, replace(config, **{name: value})) for value in SETTINGS[name]}) == 1


def test_every_setting_of_a_loader_is_one_of_the_order_or_has_no_part_in_it() -> None:
    of_the_order = {"sources", "batch_size", "seed", "shuffle", "evaluation", "stop_at", "schedule", "unit", "transform_id"}
    of_what_is_made = {"sequences", "packing", "on_error", "transform", "collate", "max_unused"}
    assert {field.name for field in fields(LoaderConfig)} == of_the_order | of_what_is_made | set(SETTINGS)


def test_a_run_that_goes_on_keeps_its_lanes_chunks_and_steps() -> None:
    source = imagined_source(100_000, 10_000)
    sources = Source("a", weight=1.0), Source("b", weight=1.0)
    config = LoaderConfig(sources=sources, batch_size=4, schedule=((10, (1.0, 3.0)),), stop_at=500)
    begun = order_spec([source, source], config)
    assert begun.schedule[1] == (40, (1.0, 3.0))
    assert order_spec([source, source], replace(config, batch_size=64), begun) == begun
    assert order_spec([source, source], replace(config, batch_size=64)) != begun

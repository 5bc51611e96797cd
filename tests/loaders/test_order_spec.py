"""OrderSpec: JSON and back, and what differs between two."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders import LoaderConfig, Source
from loaders.cost.simulate import imagined_source
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
    lanes=st.integers(1, 2**31 - 1),
    block_bytes=st.integers(1, 1000),
    chunk_bytes=st.integers(1000, 1 << 39),
    shuffle=st.booleans(),
    sources=st.lists(SOURCES, min_size=1, max_size=3).map(tuple),
    schedule=st.lists(st.tuples(st.integers(0, 10**9), st.lists(st.floats(0, 9), max_size=3).map(tuple)), max_size=3).map(tuple),
    step_samples=st.integers(1, 10**6),
    length=st.integers(1, 10**12),
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
def test_an_empty_source_of_a_mixture_is_named(stop_at: Any) -> None:
    sources = Source("a", weight=1.0), Source("b", weight=1.0)
    opened = [imagined_source(100, 1000), OpenSource(sources[1], open_store("memory://empty"), Manifest(shards=(), inputs=0))]
    with pytest.raises(UsageError, match="memory://empty: the dataset has no samples"):
        SampleOrder(opened, order_spec(opened, LoaderConfig(sources=sources, batch_size=4, stop_at=stop_at)))


def test_a_run_that_goes_on_keeps_its_lanes_chunks_and_steps() -> None:
    source = imagined_source(100_000, 10_000)
    sources = Source("a", weight=1.0), Source("b", weight=1.0)
    config = LoaderConfig(sources=sources, batch_size=4, schedule=((10, (1.0, 3.0)),), stop_at=500)
    begun = order_spec([source, source], config)
    assert begun.schedule[1] == (40, (1.0, 3.0))
    assert order_spec([source, source], replace(config, batch_size=64), begun) == begun
    assert order_spec([source, source], replace(config, batch_size=64)) != begun

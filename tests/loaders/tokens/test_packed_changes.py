"""Rows packed on the fly in a run that changes: lanes have read ahead, so a change waits for them; a mask holds at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from test_token_rows import config, data, rows_of, two_lanes_for_each_sample
from test_token_rows import pairs as make_pairs

from loaders import Loader, LoaderConfig, World, build_loader, merge_states
from loaders.testing import Topology, check_resume
from wds_tools.errors import UsageError

__all__ = ["data", "two_lanes_for_each_sample"]
State = dict[str, Any]


def rows(
    config: LoaderConfig, state: State | None, num_rows: int, change: Any = None, world_size: int = 1
) -> tuple[list[Any], State]:
    """Rows over all ranks from a state on, and the merged state behind them."""
    loaders = [build_loader(config, World(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state, change)
    steps = zip(*(islice(loader, num_rows // config.batch_size) for loader in loaders), strict=True)
    found = [row for parts in steps for part in parts for row in rows_of(part)]
    return found, merge_states([json.loads(json.dumps(loader.state_dict())) for loader in loaders])


class Rows:
    """The rows of a loader up to a number, with its state."""

    def __init__(self, loader: Loader, last: int) -> None:
        self.loader, self.last = loader, last
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self.loader, (self.last - self.loader.position) // self.loader.config.batch_size)


def share_of_texts(rows: list[Any]) -> float:
    keys = [key for row in rows for key in row[0]]
    return sum(key.startswith("text") for key in keys) / len(keys)


def test_weights_change_from_the_first_step_that_no_lane_has_read(data: Path) -> None:
    before = config(data, packing=True, weights=(0.9, 0.1))
    _, state = rows(before, None, 32)
    with pytest.raises(UsageError, match=r"may change from step (\d+) on") as refusal:
        rows(config(data, packing=True, weights=(0.1, 0.9)), state, 4, "future")
    allowed = int(re.findall(r"from step (\d+) on", str(refusal.value))[0])
    deepest = max(cursor for _, (_, cursor, _) in state["packing"]["lanes"])
    assert allowed == -(-deepest * 8 // 4)
    with pytest.raises(UsageError, match=f"from step {allowed} on"):
        rows(replace(before, schedule=((allowed - 1, (0.1, 0.9)),)), state, 4, "future")
    after = replace(before, schedule=((allowed, (0.1, 0.9)),))
    whole, end = rows(after, state, 200, "future")
    assert share_of_texts(whole[:24]) + 0.15 < share_of_texts(whole[-80:])
    assert rows(replace(after, batch_size=10), end, 20, None, 2)[0] == rows(after, end, 20)[0]
    with pytest.raises(UsageError, match="schedule was"):
        rows(before, end, 4)


@pytest.mark.slow
def test_rows_are_the_same_on_any_topology_after_a_change_of_weights_and_a_mask(data: Path, tmp_path: Path) -> None:
    before = config(data, packing=True, weights=(0.9, 0.1))
    _, state = rows(before, None, 32)
    excluded = [sample.key for sample in make_pairs()[::3]]
    (tmp_path / "ids.txt").write_text("".join(f"{key}\n" for key in excluded))
    pairs, texts = before.sources
    masked = replace(pairs, exclude=str(tmp_path / "ids.txt"))
    after = replace(before, sources=(masked, texts), schedule=((48, (0.1, 0.9)),))
    whole, _ = rows(after, state, 240, "future")
    assert not {key for row in whole for key in row[0]} & {*excluded}
    for world_size, batch_size in ((2, 4), (3, 10)):
        assert rows(replace(after, batch_size=batch_size), state, 240, "future", world_size)[0] == whole

    def begun(topology: Topology, world: World) -> Rows:
        loader = build_loader(replace(after, batch_size=topology.batch_size), world)
        loader.load_state_dict(state, "future")
        return Rows(loader, 60)

    check_resume(begun, [Topology(4), Topology(4, 2), Topology(4, 4)], items=rows_of, every=3, merge=merge_states)


def test_a_mask_holds_at_once_even_for_documents_that_wait(data: Path, tmp_path: Path) -> None:
    plain = config(data, packing=True)
    _, state = rows(plain, None, 20)
    waiting = rows(plain, state, 20)[0]
    counts = [key for row in waiting for key in row[0] if key.startswith("text")]
    excluded = sorted(set(counts))[:8]
    (tmp_path / "ids.txt").write_text("".join(f"{key}\n" for key in excluded))
    pairs, texts = plain.sources
    masked = replace(plain, sources=(pairs, replace(texts, exclude=str(tmp_path / "ids.txt"))))
    found, end = rows(masked, state, 60)
    keys = {key for row in found for key in row[0]}
    assert not keys & set(excluded)
    assert rows(replace(masked, batch_size=10), state, 60, None, 3)[0] == found
    assert rows(replace(masked, batch_size=10), end, 20, None, 2)[0] == rows(masked, end, 20)[0]
    with pytest.raises(UsageError, match="grows at its end"):
        rows(plain, end, 4)
    lanes = state["packing"]["lanes"][:3]
    part = state | {"packing": state["packing"] | {"lanes": lanes}}
    with pytest.raises(UsageError, match=r"5 of 8 lanes stand, so nothing that they read can change: merge the states"):
        rows(masked, part, 4)


def test_a_source_is_not_taken_from_rows_that_wait(data: Path) -> None:
    both = config(data, packing=True, weights=(0.5, 0.5))
    _, state = rows(both, None, 8)
    with pytest.raises(UsageError, match="leave it in the config, at weight 0"):
        rows(replace(both, sources=both.sources[:1]), state, 4, "future")

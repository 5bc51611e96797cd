"""Which files a dataset has, and which of them may be removed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_tools.dataset.layout import (
    IS_REJECTS_FILE,
    LEASES,
    MANIFEST,
    PLAN,
    REMOVABLE,
    index_name,
    marker_name,
    rejects_name,
    shard_name,
)


@given(st.integers(0, 1 << 24), st.integers(0, 1 << 24))
def test_what_a_job_writes_may_be_removed(task: int, number: int) -> None:
    shard = shard_name(task, number)
    for name in (shard, index_name(shard), rejects_name(task), marker_name(task), PLAN):
        assert REMOVABLE.fullmatch(name), name
    assert IS_REJECTS_FILE.search(rejects_name(task))
    assert IS_REJECTS_FILE.search(f"sets/pairs/{rejects_name(task)}")


@pytest.mark.parametrize(
    "name",
    [
        MANIFEST,
        f"{LEASES}0123456789abcdef.json",
        "shard-000000-0000.tar.idx",
        "shard-00000-0000.tar",
        "sets/shard-000000-0000.tar",
        "rejects/notes.jsonl",
        "_work/plan.json.bak",
        "_work/planXjson",
        "photos/1.jpg",
    ],
)
def test_what_others_wrote_and_what_says_that_a_dataset_is_complete_is_never_removed_by_its_name(name: str) -> None:
    assert not REMOVABLE.fullmatch(name)

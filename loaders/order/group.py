"""Sources that are planned together: their shards one after the other, under one SourcePlan.

sources as they are in some epochs -> plan_group -> Group: the plan, and which shard of which source each of its shards is
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders.order.plan import SourcePlan
from loaders.order.spec import OrderSpec
from wds_tools.errors import UsageError

if TYPE_CHECKING:
    from loaders.order.samples import OpenSource

_MAX_SHARDS = 1 << 24


class Group(NamedTuple):
    """Sources that share a plan."""

    plan: SourcePlan
    sources: Sequence[OpenSource]
    """As they are in its epochs."""
    source: NDArray[np.int64]
    """(S,) source of each of the plan's shards."""
    shard: NDArray[np.int64]
    """(S,) its number in that source."""


def plan_group(spec: OrderSpec, members: Sequence[int], opened: Sequence[OpenSource]) -> Group:
    """These sources under one plan. With weights, it has each sample once; without, as often as an epoch does.

    Args:
        spec: of the whole order.
        members: numbers of the sources.
        opened: the sources, as they are in some epochs.

    Raises:
        UsageError: there is nothing in them, or they can't be planned together.
    """
    specs = [spec.sources[number] for number in members]
    repeats = [1 if spec.schedule else each.repeat for each in specs]
    urls = ", ".join(each.store.url for each in opened)
    num_shards = sum(max(len(each.shards), 1) * repeat for each, repeat in zip(opened, repeats, strict=True))
    if len(members) > 1 and num_shards > _MAX_SHARDS:
        raise UsageError(f"the sources, each repeated, have {num_shards:,} shards: at most {_MAX_SHARDS:,} can be planned")
    limits = [each.max_samples for each in specs if each.max_samples is not None]
    if limits and len(members) > 1:
        raise UsageError(
            f"sources {urls}: max_samples and fraction are for one source, or for sources with weights: "
            "give every source a weight"
        )
    is_single = len(members) == 1  # repeated by its plan, after the choice of max_samples; of several, shards are repeated
    places = [0] if is_single else np.repeat(range(len(members)), repeats).tolist()
    counts = [len(opened[place].shards) for place in places]
    try:
        plan = SourcePlan(
            np.concatenate([opened[place].shards.num_samples for place in places]),
            np.concatenate([opened[place].shards.num_bytes for place in places]),
            np.repeat([opened[place].manifest.group_samples for place in places], counts),
            spec,
            limits[0] if limits else None,
            repeat=repeats[0] if is_single else 1,
        )
    except UsageError as error:
        raise UsageError(f"{urls}: {error}") from error
    numbers = np.array(members)[places]
    return Group(plan, opened, np.repeat(numbers, counts), np.concatenate([np.arange(count) for count in counts]))

"""Where a run stands, as a small JSON object that is the same on every rank, and why one may be refused.

It holds the position, and what the position means: the spec of the order that it counts in, and the fingerprints of the data.
Data that was moved resumes; data or an order that changed is refused with what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from loaders.config import LoaderConfig
from loaders.order.samples import SampleOrder, order_spec
from loaders.order.spec import ORDER_VERSION, OrderSpec
from wds_tools.errors import UsageError
from wds_tools.format.typed_json import Count, shape

STATE_VERSION = 2
_NO_STATE = "not the state of a loader"
_Small = Annotated[int, range(1 << 40)]
"""No epoch or position of a real run comes near; sums and products of a few of them stay within int64."""


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of a state or a receipt, which are read first."""

    version: int
    """Version of its form."""
    order_version: int
    """Version of the order in which its positions count."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source, as states and receipts name it."""

    url: str
    """URL at which it was read."""
    fingerprint: str
    """Fingerprint of its manifest."""
    num_samples: Count
    """Number of its samples."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """A state of this version."""

    epoch: _Small
    position: _Small
    spec: OrderSpec
    sources: tuple[Origin, ...]


def order_to_json(order: SampleOrder, version: int) -> dict[str, Any]:
    """The fields that states and receipts share: their versions, and what their positions mean."""
    return {
        "version": version,
        "order_version": ORDER_VERSION,
        "spec": order.spec.to_json(),
        "sources": [
            {"url": opened.store.url, "fingerprint": fingerprint, "num_samples": opened.manifest.samples}
            for opened, fingerprint in zip(order.sources, order.fingerprints, strict=True)
        ],
    }


def state_to_json(order: SampleOrder, epoch: int, position: int) -> dict[str, Any]:
    """The state of a run that has handed over the positions before this one."""
    return {**order_to_json(order, STATE_VERSION), "epoch": epoch, "position": position}


def parse_state(state: Mapping[str, Any], config: LoaderConfig, order: SampleOrder) -> tuple[OrderSpec, int, int]:
    """What a run of a config goes on from.

    Args:
        state: as `state_to_json` made it.
        config: settings of the run that goes on.
        order: its order as it would be without the state.

    Returns:
        (spec, epoch, position). The spec has the lanes, chunks and shuffle blocks of the state, and else equals that of `order`.

    Raises:
        UsageError: the state is damaged, or of another version, other data, or another order; says what differs.
    """
    versions = shape(Versions, state, _NO_STATE, UsageError)
    if versions.version != STATE_VERSION:
        raise UsageError(f"the state has version {versions.version!r}, this release reads {STATE_VERSION}")
    if versions.order_version != ORDER_VERSION:
        raise UsageError(
            f"the state was saved under order version {versions.order_version!r}, this release has {ORDER_VERSION}: the same "
            "position would be another sample; finish the epoch with the release that saved it"
        )
    saved = shape(_State, state, _NO_STATE, UsageError)
    if len(saved.sources) != len(order.sources):
        raise UsageError(f"the state is of {len(saved.sources)} sources, the config has {len(order.sources)}")
    for origin, opened, fingerprint in zip(saved.sources, order.sources, order.fingerprints, strict=True):
        if origin.fingerprint != fingerprint:
            raise UsageError(
                f"the state was saved with other data: {origin.url} had {origin.num_samples} samples, "
                f"{origin.fingerprint[:19]}; {opened.store.url} has {opened.manifest.samples}, {fingerprint[:19]}: "
                "use the data of the run, or start a new one"
            )
    spec = order_spec(order.sources, config, saved.spec)
    for name, before, now in saved.spec.differences(spec):
        raise UsageError(
            f"the state was saved under another order: {name} was {before!r}, is {now!r}: keep the settings of the run, or "
            "start a new one"
        )
    if (saved.epoch + 2) * spec.length >= 1 << 62:
        raise UsageError(f"the state is at epoch {saved.epoch} of {spec.length} samples each: more than can be counted")
    if "packing" not in state and saved.position > spec.length:
        raise UsageError(
            f"the state is at position {saved.position} of an epoch of {spec.length} samples: it was edited or damaged"
        )
    return spec, saved.epoch, saved.position

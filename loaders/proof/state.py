"""Where a run stands, as a small JSON object that is the same on every rank, and why one may be refused.

It holds the position, and what the position means: the order and the recipe it counts in, and the fingerprints of the data.
Data that was moved resumes; data or a recipe that changed is refused with what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from loaders.config import LoaderConfig
from loaders.order.plan import ORDER_VERSION, OrderSpec
from loaders.order.samples import OpenSource, SampleOrder
from wds_tools.errors import UsageError
from wds_tools.format.typed_json import Count, shape

STATE_VERSION = 1
_NO_STATE = "not the state of a loader"
_Small = Annotated[int, range(1 << 40)]
"""No epoch or position of a real run comes near; sums and products of a few of them stay within int64."""


@dataclass(frozen=True, kw_only=True)
class Versions:
    """What a state or a receipt says of its version first: that of its form, and that of the order."""

    version: int
    order_version: int


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """A source of a state."""

    fingerprint: str
    samples: Count
    url: str


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a state of this version says."""

    spec: OrderSpec
    step_samples: _Small
    epoch: _Small
    position: _Small
    recipe: Mapping[str, Any]
    sources: tuple[_Origin, ...]


def state_to_json(order: SampleOrder, epoch: int, position: int) -> dict[str, Any]:
    """The state of a run that has handed over the positions before this one."""
    return {
        "version": STATE_VERSION,
        "order_version": ORDER_VERSION,
        "epoch": epoch,
        "position": position,
        "spec": asdict(order.spec),
        "step_samples": order.step_samples,
        "recipe": dict(order.recipe),
        "sources": [
            {"fingerprint": fingerprint, "samples": opened.manifest.samples, "url": opened.store.url}
            for fingerprint, opened in zip(order.fingerprints, order.sources, strict=True)
        ],
    }


def parse_state(state: Mapping[str, Any], config: LoaderConfig) -> tuple[OrderSpec, int, int, int]:
    """(order, samples of a step, epoch, position) of a state.

    Raises:
        UsageError: this is no state, one of another version, or of another seed, shuffle or lanes than the config's.
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
    spec = saved.spec
    other_lanes = spec.shuffle and config.lanes not in (None, spec.lanes)
    if (spec.seed, spec.shuffle) != (config.seed, config.shuffle) or other_lanes:
        raise UsageError(
            f"the state was saved under seed={spec.seed}, shuffle={spec.shuffle}, lanes={spec.lanes}; the config says "
            f"seed={config.seed}, shuffle={config.shuffle}, lanes={config.lanes}: keep the recipe of the run, or start a new one"
        )
    return spec, saved.step_samples, saved.epoch, saved.position


def check_data(state: Mapping[str, Any], sources: Sequence[OpenSource], fingerprints: Sequence[str]) -> None:
    """Raise UsageError unless the data is that of the state."""
    saved = state["sources"]
    if len(saved) != len(sources):
        raise UsageError(f"the state is of {len(saved)} sources, the config has {len(sources)}")
    for before, opened, fingerprint in zip(saved, sources, fingerprints, strict=True):
        if before["fingerprint"] != fingerprint:
            raise UsageError(
                f"the state was saved with other data: {before['url']} had {before['samples']} samples, "
                f"{before['fingerprint'][:19]}; {opened.store.url} has {opened.manifest.samples}, {fingerprint[:19]}: "
                "use the data of the run, or start a new one"
            )


def check_recipe(state: Mapping[str, Any], order: SampleOrder) -> None:
    """Raise UsageError unless the config makes the same stream of the data as the run that saved the state."""
    if (state["epoch"] + 2) * order.length >= 1 << 62:
        raise UsageError(f"the state is at epoch {state['epoch']} of {order.length} samples each: more than can be counted")
    if "packing" not in state and state["position"] > order.length:
        raise UsageError(
            f"the state is at position {state['position']} of an epoch of {order.length} samples: it was edited or damaged"
        )
    saved = state["recipe"]
    differing = [name for name in {**order.recipe, **saved} if saved.get(name) != order.recipe.get(name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"the state was saved under another recipe: {name} was {saved.get(name)!r}, is {order.recipe.get(name)!r}: "
            "keep the recipe of the run, or start a new one"
        )

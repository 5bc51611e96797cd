"""Where a run stands, as a small JSON object that is the same on every rank, and why one may be refused.

It holds the position, and what the position means: the order and the recipe it counts in, and the fingerprints of the data.
Data that was moved resumes; data or a recipe that changed is refused with what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loaders.config import LoaderConfig
from loaders.plan import ORDER_VERSION, Order
from loaders.stream import OpenSource, Stream
from wds_tools.errors import UsageError

STATE_VERSION = 1
_MOST = 1 << 40
"""No epoch, position or size of a real run comes near; sums and products of a few of them stay within int64."""


def pack_state(stream: Stream, epoch: int, position: int) -> dict[str, Any]:
    """The state of a run that has handed over the positions before this one."""
    return {
        "version": STATE_VERSION,
        "order_version": ORDER_VERSION,
        "epoch": epoch,
        "position": position,
        "order": asdict(stream.order),
        "step_samples": stream.step_samples,
        "recipe": dict(stream.recipe),
        "sources": [
            {"fingerprint": fingerprint, "samples": opened.manifest.samples, "url": opened.store.url}
            for fingerprint, opened in zip(stream.fingerprints, stream.sources, strict=True)
        ],
    }


def unpack_state(state: Mapping[str, Any], config: LoaderConfig) -> tuple[Order, int, int, int]:
    """(order, samples of a step, epoch, position) of a state.

    Raises:
        UsageError: this is no state, one of another version, or of another seed, shuffle or lanes than the config's.
    """
    try:
        version, order_version = state["version"], state["order_version"]
        if version != STATE_VERSION:
            raise UsageError(f"the state has version {version!r}, this release reads {STATE_VERSION}")
        if order_version != ORDER_VERSION:
            raise UsageError(
                f"the state was saved under order version {order_version!r}, this release has {ORDER_VERSION}: the same position "
                "would be another sample; finish the epoch with the release that saved it"
            )
        order = Order(**state["order"])
        numbers = [state[name] for name in ("step_samples", "epoch", "position")]
        sizes = [order.lanes, order.block_bytes, order.extent_bytes]
        if any(type(number) is not int or not 0 <= number < _MOST for number in (*numbers, *sizes)):
            raise UsageError(
                f"the state has step_samples, epoch, position = {numbers}, lanes, block_bytes, extent_bytes = {sizes}: expected "
                f"numbers of 0 to {_MOST:,}"
            )
        if not isinstance(state["recipe"], Mapping):
            raise TypeError(f"its recipe is {state['recipe']!r}")
        told = [(source["fingerprint"], source["samples"], source["url"]) for source in state["sources"]]
        if any(type(fingerprint) is not str for fingerprint, _, _ in told):
            raise TypeError("a source without a fingerprint")
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"not the state of a loader ({type(error).__name__}: {error})") from error
    other_lanes = order.shuffle and config.lanes not in (None, order.lanes)
    if (order.seed, order.shuffle) != (config.seed, config.shuffle) or other_lanes:
        raise UsageError(
            f"the state was saved under seed={order.seed}, shuffle={order.shuffle}, lanes={order.lanes}; the config says "
            f"seed={config.seed}, shuffle={config.shuffle}, lanes={config.lanes}: keep the recipe of the run, or start a new one"
        )
    return order, *numbers


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


def check_recipe(state: Mapping[str, Any], stream: Stream) -> None:
    """Raise UsageError unless the config makes the same stream of the data as the run that saved the state."""
    if (state["epoch"] + 2) * stream.length >= 1 << 62:
        raise UsageError(f"the state is at epoch {state['epoch']} of {stream.length} samples each: more than can be counted")
    saved = state["recipe"]
    differing = [name for name in {**stream.recipe, **saved} if saved.get(name) != stream.recipe.get(name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"the state was saved under another recipe: {name} was {saved.get(name)!r}, is {stream.recipe.get(name)!r}: "
            "keep the recipe of the run, or start a new one"
        )

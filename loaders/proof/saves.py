"""Saves of a run: its state and the receipts of all its ranks, in a folder or below a prefix, whole or not at all.

    FOLDER/loader-000007/rank-00002.json   a list: the receipts that rank 2 brings
    FOLDER/loader-000007.json              the state; written when all ranks have written theirs

Ranks that go on from a save divide its receipts among them and bring them to their own saves: so the newest save proves the
whole run, whatever became of the others. Numbers ascend, also over a save that a kill left without its state.
Cost: a listing, two small files, and a few small messages between ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from loaders.world import World
from wds_tools.errors import StorageError, WdsToolsError
from wds_tools.format.typed_json import read_json
from wds_tools.storage import Store, join

_NAME = re.compile(r"loader-(\d{6,12})(\.json|/.*)")


@dataclass(frozen=True, kw_only=True)
class Save:
    """A save that is whole."""

    num_ranks: Annotated[int, range(1, 1 << 24)]
    """Ranks that wrote receipts."""
    state: dict[str, Any]
    """See Loader.gather_state."""
    name: str = ""
    """Its name in the folder, without .json."""

    def receipts(self, store: Store, first: int = 0, step: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, receipt) of those that ranks first, first + step, ... brought.

        Raises:
            FormatError, StorageError: a file is damaged, or gone.
        """
        for rank in range(first, self.num_ranks, step):
            name = _of_rank(self.name, rank)
            where = join(store.url, name)
            for receipt in read_json(list[dict[str, Any]], store.read(name), f"{where}: no list of receipts"):
                yield where, receipt


def write_save(store: Store, world: World, state: dict[str, Any], receipts: Sequence[dict[str, Any]]) -> None:
    """Write a save. To be called by all ranks.

    Raises:
        StorageError: a rank can't write; on all of them. Or see World.gather.
    """
    name = _agreed(store, world, lambda ids: max(ids, default=0) + 1)
    _on_all(world, lambda: store.put(_of_rank(name, world.rank), json.dumps(receipts).encode()))
    document = json.dumps({"num_ranks": world.world_size, "state": state}).encode()
    _on_all(world, lambda: None if world.rank else store.put(f"{name}.json", document))


def newest_save(store: Store, world: World) -> Save | None:
    """The newest save that is whole, None where there is none: the same on all ranks, all of which are to call it.

    Raises:
        FormatError: it is damaged.
        StorageError: a rank can't read; on all of them. Or see World.gather.
    """
    name = _agreed(store, world, lambda ids: max((number for number, is_whole in ids.items() if is_whole), default=0))
    if name == _named(0):
        return None
    what = f"{join(store.url, name)}.json: not a save of a loader"
    return replace(read_json(Save, store.read(f"{name}.json"), what), name=name)


def _named(number: int) -> str:
    return f"loader-{number:06d}"


def _of_rank(name: str, rank: int) -> str:
    return f"{name}/rank-{rank:05d}.json"


def _agreed(store: Store, world: World, choose: Callable[[dict[int, bool]], int]) -> str:
    """The name that rank 0 chooses among the numbers that there are, each with whether it is whole."""

    def chosen() -> str:
        found: dict[int, bool] = {}
        for match in map(_NAME.fullmatch, (entry.name for entry in store.list() if not world.rank)):
            if match:
                found[int(match[1])] = found.get(int(match[1]), False) or match[2] == ".json"
        return str(choose(found))

    return _named(max(map(int, _on_all(world, chosen))))


def _on_all(world: World, do: Callable[[], str | None]) -> list[str]:
    """What `do` gives on each rank, on all of them. What fails on one fails on all, so that none waits for it."""
    try:
        mine = ["", do() or ""]
    except WdsToolsError as error:
        mine = [str(error) or type(error).__name__, ""]
    given = [json.loads(data) for data in world.gather(json.dumps(mine).encode())]
    if failed := [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(given) if problem]:
        raise StorageError("; ".join(failed[:3]))
    return [value for _, value in given]

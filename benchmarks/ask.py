"""Asking a run: `python -m benchmarks.ask [--samples N ...] [--epochs E]`, or as a part of `make bench-select`.

    at     the samples of a step in the second epoch, of 4,096 over 512 ranks
    seen   every step that had a sample, over E epochs

Of datasets that are made up as `simulate` makes them, of 4,100 bytes a sample in shards of 10,000: what is measured is
arithmetic, from the manifest in memory to the answer. Seconds of a processor; each size is a process of its own.
Bars: 1 s for 100 million samples; 10 s and 3 s an epoch for 10 billion.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

from loaders.config import LoaderConfig
from loaders.cost.simulate import imagined_source
from loaders.order.samples import SampleOrder, order_spec
from loaders.proof.history import Run
from loaders.proof.state import Start, read_state, state_to_json

BATCH, RANKS = 4096, 512


def main() -> None:
    """Measure, each size in a fresh process, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=float, nargs="+", default=[100e6, 10e9])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.run:
        for samples in args.samples:
            words = ["--run", "--samples", str(samples), "--epochs", str(args.epochs)]
            subprocess.run([sys.executable, "-m", "benchmarks.ask", *words], check=True)
        return
    (samples,) = args.samples
    source = imagined_source(samples, 4100)
    spec = order_spec([source], LoaderConfig(sources=(source.source,), batch_size=BATCH))
    start = Start(0, 0, BATCH, RANKS, "drop")
    steps = int(samples) // BATCH * args.epochs
    state = state_to_json(SampleOrder([source], spec), int(samples) * args.epochs, steps, [start])
    begun = time.process_time()
    found = Run(read_state(state), SampleOrder([source], spec)).at(steps // args.epochs + 1)
    at_s = time.process_time() - begun
    begun = time.process_time()
    seen = list(Run(read_state(state), SampleOrder([source], spec)).seen([found.places[0]]))
    seen_s = time.process_time() - begun
    assert found.step in {one.step for one in seen}
    assert len({one.epoch for one in seen}) >= args.epochs - 1  # one may lie in what an epoch leaves over
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{int(samples):>16,} samples: at {at_s:.2f} s, seen {seen_s:.2f} s over {args.epochs} epochs, {memory:,.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()

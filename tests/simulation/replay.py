"""Runs seeds of the simulation: one with a trace of all that happened, or thousands on all cores with a summary.

python tests/simulation/replay.py 1234 --trace
python tests/simulation/replay.py --seeds 10000
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from simulation.cluster import Outcome, simulate


def one(seed: int) -> Outcome:
    torch.set_num_threads(1)
    try:
        return simulate(seed)
    except Exception as error:  # noqa: BLE001 - the seed must be named
        return Outcome(seed, violation=f"{type(error).__name__}: {error}")


def replay(seed: int, *, trace: bool) -> int:
    outcome = simulate(seed, trace=print if trace else None)
    print(f"seed {seed}: {outcome.violation or 'all invariants hold'}")
    print(f"  faults: {dict(outcome.faults)}")
    print(f"  endings: {dict(outcome.endings)}")
    return 1 if outcome.violation else 0


def many(seeds: range, jobs: int) -> int:
    started = time.monotonic()
    faults: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    rounds = answers = 0
    virtual = 0.0
    failed: list[Outcome] = []
    printed_at = started
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for done, outcome in enumerate(pool.imap_unordered(one, seeds, chunksize=20), 1):
            faults += outcome.faults
            endings += outcome.endings
            remarks += outcome.remarks
            rounds, answers, virtual = (
                rounds + outcome.rounds,
                answers + outcome.answers,
                virtual + outcome.virtual_seconds,
            )
            if outcome.violation:
                failed.append(outcome)
                print(f"seed {outcome.seed}: {outcome.violation}")
                print(f"  python tests/simulation/replay.py {outcome.seed} --trace", flush=True)
            if time.monotonic() - printed_at >= 5:
                printed_at = time.monotonic()
                print(f"{done} of {len(seeds)} seeds, {len(failed)} failed", flush=True)
    titles = {"faults injected": faults, "how processes of workers ended": endings, "remarkable": remarks}
    for title, counts in titles.items():
        print(f"{title}:")
        for what, count in counts.most_common():
            print(f"  {count:>9,}  {what}")
    print(
        f"{len(seeds):,} seeds ({seeds.start} to {seeds.stop - 1}), {sum(faults.values()):,} faults, {rounds:,} rounds closed, "
        f"{answers:,} targets learnt from, {virtual / 3600:,.1f} h of virtual time in {time.monotonic() - started:,.0f} s: "
        f"{len(failed)} failed"
    )
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int, nargs="?", help="run this one seed")
    parser.add_argument("--trace", action="store_true", help="show all that happens in it")
    parser.add_argument("--seeds", type=int, default=500, help="without a seed: run this many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes to run them in")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed, trace=options.trace)
    return many(range(options.first, options.first + options.seeds), options.jobs)


if __name__ == "__main__":
    sys.exit(main())

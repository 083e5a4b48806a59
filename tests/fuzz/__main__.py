"""A long campaign by hand: python -m tests.fuzz --inputs 1000000 --seed 7 [--only NAME]."""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
from pathlib import Path

from tests.fuzz.campaign import FoundError, run
from tests.fuzz.targets import all_targets


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="readers whose names begin so")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    total, seconds, found = 0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for target in all_targets(Path(folder)):
            if options.only and not target.name.startswith(options.only):
                continue
            inputs = round(options.inputs * (1.0 if options.only else target.share))
            try:
                outcome = run(target, inputs, options.seed)
            except FoundError as error:
                print(f"FOUND {error}", flush=True)
                found += 1
                continue
            total, seconds = total + outcome.inputs, seconds + outcome.seconds
            print(
                f"{target.name:22} {outcome.inputs:9,} inputs in {outcome.seconds:6.1f} s, slowest "
                f"{outcome.slowest_seconds:.3f} s, {outcome.returned:,} read, "
                f"refused: {dict(outcome.refused)}",
                flush=True,
            )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{total:,} inputs in {seconds:.1f} s, {found} found, {memory:.0f} MiB at most")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())

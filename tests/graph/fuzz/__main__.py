"""Fuzz the conversion: `python -m tests.graph.fuzz --programs 10000 --seed 7 --jobs 2`.

Prints counts, and for each kind of failure a small program and its actions, which
`--replay FILE` runs again. Each chunk of programs runs in a process of its own. `--alone` runs each
construct by itself instead, `--alone NAME ...` some of them.
"""

import argparse
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.graph.fuzz.alone import alone
from tests.graph.fuzz.campaign import Tally, campaign, fails_alike, safely
from tests.graph.fuzz.constructs import CONSTRUCTS
from tests.graph.fuzz.program import Program, parse
from tests.graph.fuzz.shrink import shrink

_CHUNK = 200
_LINES = 12
_SEEDS = 1_000_000
# A program made smaller may grow a list without end.
_MOST_MEMORY = 16 * 2**30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.graph.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--shrink", type=float, default=60, help="seconds for each kind of failure")
    parser.add_argument("--each", type=int, default=1, help="programs to shrink for each kind")
    parser.add_argument("--replay", type=Path, help="file with one program, as printed")
    parser.add_argument("--alone", nargs="*", metavar="NAME", help="constructs by themselves")
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    if given.replay:
        verdict = safely(parse(given.replay.read_text()))
        print(verdict.status, verdict.detail, *verdict.refusals, verdict.invalid, sep="\n")
        return verdict.status == "wrong"
    if given.alone is not None:
        return _alone(given.alone or list(CONSTRUCTS))
    if given.out:
        numbers = range(given.chunk, given.chunk + given.programs)
        given.out.write_bytes(pickle.dumps(campaign(numbers)))
        return 0
    tally = _spread(given)
    print(tally, flush=True)
    for kind, found in tally.failures.items():
        print(f"\n# {tally.failed[kind]} times: {kind}", flush=True)
        smallest = [shrink(p, fails_alike(kind), given.shrink) for p in found[: given.each]]
        for small in dict.fromkeys(smallest):
            print(f"\n{str(small).strip()}\n{_detail(small, kind)}", flush=True)
    return bool(tally.failed)


def _alone(names: list[str]) -> int:
    wrong = 0
    for name in names:
        program = alone(CONSTRUCTS[name])
        verdict = safely(program)
        wrong += bool(verdict.failures)
        lines = [f"{f.kind} | {f.detail.splitlines()[0]}" for f in verdict.failures]
        print(name, verdict.status, *lines, *verdict.refusals, verdict.invalid, sep="\n    ")
        if len(names) == 1:
            print(program, verdict.detail, sep="\n")
    print(f"{wrong} of {len(names)} wrong")
    return bool(wrong)


def _detail(program: Program, kind: str) -> str:
    details = [f.detail for f in safely(program).failures if f.kind == kind]
    lines = "\n".join(details).splitlines()
    return "\n".join(f"# {line}" for line in [*lines[:1], *lines[1:][-_LINES:]])


def _spread(given: argparse.Namespace) -> Tally:
    """Judge the programs in chunks, each in a process."""
    tally = Tally()
    starts = range(0, given.programs, _CHUNK)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:

        def run(start: int) -> Tally:
            out = Path(folder, str(start))
            count = min(_CHUNK, given.programs - start)
            words = ["--programs", count, "--chunk", given.seed * _SEEDS + start, "--out", out]
            command = [sys.executable, "-m", "tests.graph.fuzz", *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                part = Tally()
                part.status["in chunks that died"] += count
                part.failed[f"chunk {words[3]} died: {done.returncode} {done.stderr[-2000:]}"] += 1
                return part
            return pickle.loads(out.read_bytes())

        for number, part in enumerate(pool.map(run, starts)):
            tally.merge(part)
            print(f"\r{number + 1} of {len(starts)} chunks", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return tally


if __name__ == "__main__":
    sys.exit(main())

"""Many trainings that differ in a few settings: each runs once, and one table is of them all.

runs/NAME/config.json     every setting, and the versions it ran with
runs/NAME/results.jsonl   one line a finished training, written whole: a kill loses only the
                          training it interrupts
runs/NAME/epochs.jsonl    one line an epoch
runs/NAME/report.txt      the final table, with the command
runs/NAME/results.png
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

import normswap

from . import runs
from .errors import RecipeError

RESULTS, EPOCHS = "results.jsonl", "epochs.jsonl"
# What has no say in the figures of a training, and what a resumed run may have more or less of.
NOT_SETTINGS = ("out", "name", "resume", "device")
GROWING = ("methods", "seeds", "held_out")
Cell = dict[str, Any]
Log = Callable[[dict[str, Any]], None]


def command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: list[str]
) -> int:
    """Run a recipe; give 0, 2 for something the user can fix, 130 when interrupted."""
    try:
        run(parser.parse_args(argv))
    except (RecipeError, normswap.NormswapError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; every finished training is kept", file=sys.stderr)
        return 130
    return 0


def add_arguments(
    parser: argparse.ArgumentParser, methods: Sequence[str], known: Sequence[str], seeds: int
) -> None:
    """Add the options that every grid has.

    Args:
        parser: of the recipe.
        methods: those that run by default.
        known: all that the recipe knows.
        seeds: how many by default.
    """
    parser.add_argument(
        "--methods", nargs="+", default=list(methods), choices=known, metavar="METHOD",
        help=f"of {', '.join(known)}; bn is the model as it is (default: {' '.join(methods)})",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=count, default=seeds, help=f"how many, from 0 on (default: {seeds})"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs go (runs)")
    parser.add_argument("--name", help="the run's folder (default: of the recipe)")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that all works")


def open_run(options: argparse.Namespace, recipe: str) -> Path:
    """Make the folder of a new run, or check that of one to be resumed; give it.

    Raises:
        RecipeError: there is such a run already, or none to resume, or one of other settings.
    """
    settings = {k: v for k, v in vars(options).items() if k not in NOT_SETTINGS}
    settings = json.loads(json.dumps({"recipe": recipe, **settings}, default=str))
    if options.resume:
        if options.name is None:
            raise RecipeError("expected --name with --resume, to know which run to continue")
        folder = options.out / options.name
        before = runs.read_config(folder)
        for key in sorted(set(before) | set(settings)):
            if key not in GROWING and before.get(key) != settings.get(key):
                raise RecipeError(
                    f"expected {key} to be {before.get(key)!r}, as in the run to resume, got "
                    f"{settings.get(key)!r}; start a new run with another --name"
                )
        runs.write_config(folder, settings, versions())
        return folder
    stem = options.name or recipe + ("-smoke" if options.smoke else "")
    folder = options.out / (options.name or runs.free_name(options.out, stem))
    runs.check_new(folder)
    runs.create(folder, settings, versions())
    return folder


def versions() -> dict[str, str]:
    """Record what a run ran with."""
    return {**runs.versions(), "command": shlex.join(["python", "-m", "recipes", *sys.argv[1:]])}


def count(text: str) -> int:
    """Read a number of things of which there must be one or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def cells(options: argparse.Namespace) -> list[Cell]:
    """Give a cell a method and seed, all methods of a seed together; a smoke test has one seed."""
    seeds = range(1 if options.smoke else options.seeds)
    return [{"method": method, "seed": seed} for seed in seeds for method in options.methods]


def run_cells(
    folder: Path, wanted: Sequence[Cell], train: Callable[[Cell, Log], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run every cell that has no result yet; give the records of all, in their order.

    Args:
        folder: of the run.
        wanted: settings that tell the trainings apart, as JSON takes them.
        train: runs one and gives its figures; told a function that notes an epoch.
    """
    done = read_lines(folder / RESULTS)
    finished = [record["cell"] for record in done]
    epochs = [e for e in read_lines(folder / EPOCHS) if e["cell"] in finished]
    print(
        f"writing {folder}; to continue after a stop, the same with --name {folder.name} --resume"
    )
    bar = tqdm(wanted, unit="training", disable=None)
    for cell in bar:
        if any(record["cell"] == cell for record in done):
            continue
        label = " ".join(map(str, cell.values()))
        bar.set_postfix_str(label)

        def log(figures: dict[str, Any], cell: Cell = cell, label: str = label) -> None:
            epochs.append({"cell": cell, **figures})
            write_lines(folder / EPOCHS, epochs)
            shown = {k: f"{v:.3g}" for k, v in figures.items() if isinstance(v, float)}
            bar.set_postfix_str(f"{label}: {', '.join(f'{k} {v}' for k, v in shown.items())}")

        start = time.perf_counter()
        figures = train(cell, log)
        record = {"cell": cell, **figures, "seconds": round(time.perf_counter() - start, 1)}
        done.append(record)
        write_lines(folder / RESULTS, done)
    return [next(record for record in done if record["cell"] == cell) for cell in wanted]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; none where there is no file."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise RecipeError(f"cannot read {path}: {error}; delete it to run all again") from error


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, the whole file at once."""
    runs.write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Give mean and standard deviation over seeds as text."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def table(
    records: Sequence[dict[str, Any]], by: Sequence[str], figures: dict[str, str], digits: int = 1
) -> str:
    """Tabulate figures as mean and standard deviation over the cells that agree in `by`.

    Args:
        records: of `run_cells`.
        by: settings that make a row.
        figures: key of a figure -> heading; a record may lack it.
        digits: behind the point.
    """
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault(tuple(record["cell"][key] for key in by), []).append(record)
    lines = []
    for key, group in rows.items():
        found = [[r[name] for r in group if r.get(name) is not None] for name in figures]
        texts = [spread(v, digits) if v else "-" for v in found]
        some = [f" ({len(v)} of {len(group)})" if 0 < len(v) < len(group) else "" for v in found]
        lines.append([*key, len(group), *(map("".join, zip(texts, some, strict=True)))])
    return tabulate(lines, [*by, "runs", *figures.values()], tablefmt="github", numalign="right")


def finish(folder: Path, text: str) -> None:
    """Write and print the report."""
    command = json.loads((folder / "config.json").read_text(encoding="utf-8"))["versions"]
    made = ", ".join(f"{k} {v}" for k, v in command.items() if k != "command")
    report = f"{command['command']}\n{made}\n\n{text}\n"
    runs.write_text(folder / "report.txt", report)
    print(text)
    print(f"{folder} is complete")

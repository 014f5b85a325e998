"""Many trainings that differ in a few settings: each runs once, and one table is of them all.

runs/NAME/config.json     every setting, and the versions it ran with
runs/NAME/results.jsonl   one line a finished training, written whole: a kill loses only the
                          training it interrupts
runs/NAME/epochs.jsonl    one line an epoch
runs/NAME/report.txt      the final table, with the command
runs/NAME/results.png
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import normswap

from . import runs
from .errors import RecipeError
from .options import Parser, count

RESULTS, EPOCHS = "results.jsonl", "epochs.jsonl"
MARKERS = "Ds^v"
Cell = dict[str, Any]
Log = Callable[[dict[str, Any]], None]
Train = Callable[[Cell, Log], dict[str, Any]]
Order = Callable[[list[Cell]], Iterable[Cell]]
Work = Callable[[Cell], dict[str, Any]]


def command(
    recipe: str,
    text: str | None,
    add_options: Callable[[Parser], None],
    run: Callable[[argparse.Namespace], None],
    argv: list[str],
) -> int:
    """Run a recipe; give 0, 2 for something the user can fix, 130 when interrupted."""
    try:
        parser = Parser(recipe, text)
        add_options(parser)
        run(runs.parse(parser, argv))
    except (RecipeError, normswap.NormswapError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, for --resume", file=sys.stderr)
        return 130
    return 0


def add_methods(
    parser: Parser, methods: Sequence[str], known: Sequence[str] = (), seeds: int = 3
) -> None:
    """Add the options that make a grid."""
    known = known or methods
    parser.add_argument(
        "--methods", nargs="+", default=list(methods), choices=known, metavar="METHOD",
        help=f"of {', '.join(known)}; bn is the model as it is",
    )  # fmt: skip
    parser.add_argument("--seeds", type=count, default=seeds, help="how many, from 0 on")
    runs.add_options(parser)


def open_run(options: argparse.Namespace, recipe: str, free: tuple[str, ...] = runs.FREE) -> Path:
    """Make the folder of a new run, or check that of one to be resumed; give it."""
    folder = runs.folder_of(options, recipe, recipe + ("-smoke" if options.smoke else ""), free)
    runs.write_config(folder, runs.settings_of(options, recipe))
    return folder


def cells(options: argparse.Namespace) -> list[Cell]:
    """Give a cell a method and seed, all methods of a seed together; a smoke test has one seed."""
    seeds = range(1 if options.smoke else options.seeds)
    return [{"method": method, "seed": seed} for seed in seeds for method in options.methods]


def run_cells(
    folder: Path, wanted: Sequence[Cell], train: Train, order: Order = iter
) -> list[dict[str, Any]]:
    """Run every cell that has no result yet; give the records of all, in their order.

    `order` gives these cells one by one in the order to run them in, such as that in which other
    processes finish them; a result that names its seconds keeps them.
    """
    done = read_lines(folder / RESULTS)
    finished = [record["cell"] for record in done]
    epochs = [e for e in read_lines(folder / EPOCHS) if e["cell"] in finished]
    print(
        f"writing {folder}; to continue after a stop, the same with --name {folder.name} --resume"
    )
    missing = [c for i, c in enumerate(wanted) if c not in [*finished, *wanted[:i]]]
    first = len(wanted) - len(missing)
    bar = tqdm(order(missing), initial=first, total=len(wanted), unit="training", disable=None)
    for cell in bar:
        label = " ".join(map(str, cell.values()))
        bar.set_postfix_str(label)

        def log(figures: dict[str, Any], cell: Cell = cell, label: str = label) -> None:
            epochs.append({"cell": cell, **figures})
            runs.write_lines(folder / EPOCHS, epochs)
            shown = {k: f"{v:.3g}" for k, v in figures.items() if isinstance(v, float)}
            bar.set_postfix_str(f"{label}: {', '.join(f'{k} {v}' for k, v in shown.items())}")

        start = time.perf_counter()
        figures = {"cell": cell, **train(cell, log)}
        figures.setdefault("seconds", round(time.perf_counter() - start, 1))
        done.append(figures)
        runs.write_lines(folder / RESULTS, done)
    return [next(record for record in done if record["cell"] == cell) for cell in wanted]


@contextmanager
def processes(number: int) -> Iterator[Callable[[Work], tuple[Train, Order]]]:
    """Give what makes work that can be pickled into `train` and `order` of `run_cells`.

    So many processes share it, with the threads of this one; a single one is this one.
    """
    if number == 1:
        yield lambda work: (lambda cell, _: work(cell), iter)
        return
    threads = max(1, torch.get_num_threads() // number)
    pool = ProcessPoolExecutor(number, get_context("spawn"), torch.set_num_threads, (threads,))

    def shared(work: Work) -> tuple[Train, Order]:
        found: dict[str, Future[dict[str, Any]]] = {}

        def finished(cells: list[Cell]) -> Iterator[Cell]:
            cell_of = {pool.submit(work, cell): cell for cell in cells}
            # What went wrong is said last, when all that went well is kept.
            failed = []
            for future in as_completed(cell_of):
                found[repr(cell_of[future])] = future
                if future.exception() is None:
                    yield cell_of[future]
                else:
                    failed.append(cell_of[future])
            yield from failed

        return lambda cell, _: found[repr(cell)].result(), finished

    try:
        yield shared
    finally:
        pool.shutdown(cancel_futures=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; none where there is no file."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise RecipeError(f"cannot read {path}: {error}; delete it to run all again") from error


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Give mean and standard deviation over seeds as text."""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(records: Sequence[dict[str, Any]], figures: dict[str, str]) -> str:
    """Tabulate figures of each method as mean and standard deviation over its seeds."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault(record["cell"]["method"], []).append(record)
    lines = []
    for method, group in rows.items():
        found = [[r[name] for r in group if r.get(name) is not None] for name in figures]
        texts = [spread(v) if v else "-" for v in found]
        some = [f" ({len(v)} of {len(group)})" if 0 < len(v) < len(group) else "" for v in found]
        lines.append([method, len(group), *(map("".join, zip(texts, some, strict=True)))])
    return tabulate(
        lines, ["method", "runs", *figures.values()], tablefmt="github", numalign="right"
    )


def draw_points(
    path: Path,
    records: Sequence[dict[str, Any]],
    figures: dict[str, str],
    title: str,
    unit: str = "accuracy, %",
) -> None:
    """Draw a column a figure, and in it, for each method, its runs and their mean."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(record["cell"]["method"] for record in records))
    wide = max(6.0, 1.5 + 0.2 * (len(names) + 1) * len(figures))
    canvas = Figure(figsize=(wide, 4.2), dpi=120)
    axes = canvas.subplots()
    step = 0.8 / len(names)
    for index, name in enumerate(names):
        colour, label, marker = f"C{index % 10}", str(name), MARKERS[index // 10 % len(MARKERS)]
        for column, key in enumerate(figures):
            values = [
                r[key] for r in records if r["cell"]["method"] == name and r.get(key) is not None
            ]
            if not values:
                continue
            x = column + (index - (len(names) - 1) / 2) * step
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(
                x, statistics.mean(values), error, fmt=marker, color=colour, label=label,
                markersize=5, capsize=3,
            )  # fmt: skip
            label = None
            axes.plot([x + 0.25 * step] * len(values), values, ".", color=colour, alpha=0.5)
    axes.set_xticks(range(len(figures)), list(figures.values()))
    axes.set_xlim(-0.5, len(figures) - 0.5)
    for column in range(1, len(figures)):
        axes.axvline(column - 0.5, color="0.85", linewidth=0.8)
    axes.grid(axis="y", color="0.9")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), title="method")
    with runs.atomic(path) as temporary:
        canvas.savefig(temporary, format="png", bbox_inches="tight")


def finish(folder: Path, text: str) -> None:
    """Write and print the report."""
    versions = runs.read_config(folder, "versions")
    made = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "command")
    runs.write_text(folder / "report.txt", f"{versions['command']}\n{made}\n\n{text}\n")
    print(text)
    print(f"{folder} is complete")


def show(
    folder: Path,
    records: Sequence[dict[str, Any]],
    figures: dict[str, str],
    title: str,
    more: dict[str, str] | None = None,
) -> None:
    """End a run with a picture and a table of its figures, and in the table of `more`."""
    draw_points(folder / "results.png", records, figures, title)
    finish(folder, table(records, {**figures, **(more or {})}))

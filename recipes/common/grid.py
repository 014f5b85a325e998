"""Many trainings that differ in a few settings: each runs once, and one table is of them all.

A training's line in results.jsonl is written whole: a kill loses only what it interrupts.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from . import methods, runs
from .options import Parser, count, of_cell
from .runs import read_lines
from .training import Log

RESULTS, EPOCHS = "results.jsonl", "epochs.jsonl"
Record = dict[str, Any]
Cell = dict[str, Any]
Train = Callable[[Cell, Log], Record]
MOST_JOBS = 8  # each holds the images and a model


def add_methods(
    parser: Parser, compared: Sequence[str], known: Sequence[str] = (), seeds: int = 3
) -> None:
    """Add the options that make a grid, and say what its methods are."""
    known = known or compared
    told = [f"    {name:<10}  {text}" for name, text in methods.TEXTS.items() if name in known]
    same = "By seed all methods have the same start, images, order and number of steps."
    parser.epilog = "\n".join(["methods:", *told, "", same])
    shown = f"of {', '.join(known)}; bn is the model as it is"
    kept = {"default": list(compared), "choices": known, "metavar": "METHOD", "help": shown}
    parser.add_argument("--methods", nargs="+", **kept)
    parser.add_argument("--seeds", type=count, default=seeds, help="how many, from 0 on")
    jobs = f"trainings at once (default: on a CPU one a core, {MOST_JOBS} at most; else one)"
    parser.add_argument("--jobs", type=count, metavar="N", help=jobs)
    runs.add_options(parser)


def open_run(options: Namespace, recipe: str, free: Sequence[str] = runs.FREE) -> Path:
    """Make the folder of a new run, or check that of one to be resumed; give it."""
    folder = runs.folder_of(options, recipe, recipe + ("-smoke" if options.smoke else ""), free)
    runs.write_config(folder, runs.settings_of(options, recipe))
    return folder


def cells(options: Namespace) -> list[Cell]:
    """Give a cell a method and seed, all methods of a seed together; a smoke test has one seed."""
    seeds = range(1 if options.smoke else options.seeds)
    return [{"method": method, "seed": seed} for seed in seeds for method in options.methods]


def jobs_of(options: Namespace) -> int:
    """Give how many trainings run at once: what was asked for, or a core's worth each on a CPU."""
    if options.jobs is not None:
        return int(options.jobs)
    alone = options.smoke or torch.device(options.device).type != "cpu"
    return 1 if alone else min(torch.get_num_threads(), MOST_JOBS)


def run(
    options: Namespace, recipe: str, data_of: Callable[[Namespace], Any],
    train: Callable[[Any, Namespace, Log], Record],
    score: Callable[[Record], float] | None = None, *, rates: Sequence[float] = (),
    wanted: Sequence[Cell] | None = None, free: Sequence[str] = runs.FREE,
    before: Callable[[Any], object] | None = None,
) -> tuple[Path, list[Record]]:  # fmt: skip
    """Train each method with each seed, or each of the wanted cells; give folder and records.

    A training gets the data of its settings, which those that differ in method or rate share, the
    settings, and what notes its epochs. The settings are the options, the folder of the run, those
    of its cell, and its rate: that one of `rates` (without them, of --lr or what --tune asks for)
    at which the cell had the highest `score` with seed 0; `rate` of a record is it, in thousandths.
    A training that tries a rate is not `final`, and must not see what tests. `before` is given data
    before anything is written: what is wrong with images, model or weights is to be said first.
    """
    wanted = cells(options) if wanted is None else wanted
    latest = Latest(lambda *cell: data_of(of_cell(options, **dict(cell))))

    def shared(cell: Cell) -> Any:
        return latest(*(item for item in cell.items() if item[0] not in ("method", "lr")))

    def configured(chosen: list[tuple[Cell, float]], cell: Cell, log: Log) -> Record:
        own = [lr for of, lr in chosen if of == {**cell, "seed": 0}]
        lr = own[0] if chosen else cell["lr"]
        given = {"folder": folder, "final": bool(chosen), **cell, "lr": lr}
        return {**train(shared(cell), of_cell(options, **given), log), "rate": 1000 * lr}

    first = shared(wanted[0])
    if before is not None:
        before(first)
    folder, jobs = open_run(options, recipe, free), jobs_of(options)
    if not rates:
        tune = vars(options).get("tune")
        factors = (1,) if tune is None else (1 / 3, 1, 3)
        rates = tune or [options.lr * factor for factor in factors]
    first_seed = [cell for cell in wanted if cell["seed"] == 0]
    chosen = [(cell, rates[0]) for cell in first_seed]
    if len(rates) > 1:
        tried = [{**cell, "lr": lr} for cell in first_seed for lr in rates]
        records = run_cells(folder, tried, partial(configured, []), jobs)
        each = [records[i : i + len(rates)] for i in range(0, len(records), len(rates))]
        best = [sorted(some, key=score)[-1] for some in each]
        chosen = [(cell, r["cell"]["lr"]) for cell, r in zip(first_seed, best, strict=True)]
    return folder, run_cells(folder, wanted, partial(configured, chosen), jobs)


def run_cells(folder: Path, wanted: Sequence[Cell], train: Train, jobs: int = 1) -> list[Record]:
    """Run every cell that has no result yet; give the records of all, in their order.

    Several jobs are processes that share the threads of this one; the epochs of a training then
    arrive with its result. A training that fails is raised when all others have finished.
    """
    done = read_lines(folder / RESULTS)
    finished = [record["cell"] for record in done]
    epochs = [e for e in read_lines(folder / EPOCHS) if e["cell"] in finished]
    again = f"the same with --name {folder.name} --resume"
    print(f"writing {folder}; to continue after a stop, {again}")
    missing = [c for i, c in enumerate(wanted) if c not in [*finished, *wanted[:i]]]
    bar = tqdm(initial=len(wanted) - len(missing), total=len(wanted), unit="training", disable=None)

    def log(cell: Cell, figures: dict[str, Any]) -> None:
        epochs.append({"cell": cell, **figures})
        runs.write_lines(folder / EPOCHS, epochs)
        shown = [f"{k} {v:.3g}" for k, v in figures.items() if isinstance(v, float)]
        bar.set_postfix_str(f"{' '.join(map(str, cell.values()))}: {', '.join(shown)}")

    jobs = min(jobs, len(missing)) or 1
    pool = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    given = max(1, torch.get_num_threads() // jobs), log if jobs == 1 else None
    failed = []
    with bar:
        for record, logged, error in pool(delayed(outcome)(train, c, *given) for c in missing):
            if error is not None:
                failed.append(error)
                continue
            for figures in logged:
                log(record["cell"], figures)
            done.append(record)
            runs.write_lines(folder / RESULTS, done)
            bar.update()
            if bar.disable:  # no terminal
                what = " ".join(map(str, record["cell"].values()))
                print(f"trained {what} in {record['seconds']:g} s", flush=True)
    if failed:
        raise failed[0]
    return [next(record for record in done if record["cell"] == cell) for cell in wanted]


def outcome(
    train: Train, cell: Cell, threads: int, log: Callable[[Cell, dict[str, Any]], None] | None
) -> tuple[Record, list[dict[str, Any]], Exception | None]:
    """Train a cell; give its record, with its seconds, and the epochs that are not logged yet.

    In a process of its own it has no `log`, and an error is given to who collects, who raises it
    when the other trainings are kept.
    """
    torch.set_num_threads(threads)
    epochs: list[dict[str, Any]] = []
    start = time.perf_counter()
    try:
        record = {"cell": cell, **train(cell, partial(log, cell) if log else epochs.append)}
    except Exception as error:
        if log:
            raise
        return {}, epochs, error
    record.setdefault("seconds", round(time.perf_counter() - start, 1))
    return record, epochs, None


class Latest:
    """Keeps what `make` gave for the latest arguments; in another process it is made there."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make, self._found = make, None

    def __call__(self, *args: Any) -> Any:
        if self._found is None or self._found[0] != args:
            self._found = args, self._make(*args)
        return self._found[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._make,)

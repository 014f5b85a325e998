"""The command: settings, workers, report. Exit code 1 where anything is not right."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

import normswap
from recipes.common.errors import RecipeError
from recipes.common.runs import write_text

from . import report, store
from .one import sweep_model
from .prepare import GIB, Limits
from .runner import Died, Task, run_tasks
from .smallest import smallest_members
from .sources import choose, names_of

SMOKE = ["test_resnet", "test_efficientnet", "test_vit"]


def main(argv: list[str]) -> int:
    """Sweep; give 0, 1 where a result is not right, 2 for a usage error, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return run(options, shlex.join(["python", "-m", "tests.sweep", *argv]))
    except (RecipeError, normswap.NormswapError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; every result is saved: add --resume to continue", file=sys.stderr)
        return 130


def run(options: argparse.Namespace, command: str) -> int:
    """Do what the command does; give its exit code."""
    settings = resolve(options)
    memory = options.memory_gb * GIB / options.workers
    folder: Path = options.out
    names = choose(names_of(settings["source"]), settings["filter"], settings["exclude"])
    done = store.open_sweep(folder, settings, options.resume, options.restart)
    if settings["smallest_per_family"]:
        names = smallest_members(names, options.workers, options.timeout, memory)
    methods = settings["methods"]
    limits = Limits(memory, settings["seed"], settings["structure"], settings["blocks"])
    tasks = []
    for name in names:
        left = tuple(m for m in methods if (name, m) not in done)
        if left:
            arguments = (settings["source"], name, limits)
            tasks.append(Task(name, left, sweep_model, arguments))
    total = len(names) * len(methods)
    records = [done[n, m] for n in names for m in methods if (n, m) in done]
    config = json.loads((folder / store.CONFIG).read_text(encoding="utf-8"))
    try:
        _sweep(tasks, records, total, folder, options, memory)
    finally:
        records.sort(key=lambda r: (r["model"], r["method"]))
        summary = report.summarise(records, total)
        data = report.to_json(summary, records, config, command)
        text = report.to_markdown(summary, records, config, command)
        write_text(folder / "report.json", json.dumps(data, indent=1) + "\n")
        write_text(folder / "report.md", text)
    print(text)
    print(f"written to {folder}/report.md and report.json")
    return 0 if report.is_right(summary) else 1


def _sweep(
    tasks: list[Task],
    records: list[dict[str, Any]],
    total: int,
    folder: Path,
    options: argparse.Namespace,
    memory: float,
) -> None:
    bad = sum(r["status"] not in report.FINE for r in records)
    pace = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=total, initial=len(records), unit="model", mininterval=pace) as bar:
        for task, part, result in run_tasks(tasks, options.workers, options.timeout, memory):
            if isinstance(result, Died):
                result = {"model": task.name, "method": part, "family": "", **vars(result)}
            store.append(folder, result)
            records.append(result)
            if result["status"] not in report.FINE:
                bad += 1
                why = result.get("problems") or result.get("doubts") or [result.get("error", "")]
                bar.write(f"{task.name} ({part}): {result['status']}: {'; '.join(why)[:200]}")
            bar.set_postfix_str(f"{bad} not right", refresh=False)
            bar.update()


def resolve(options: argparse.Namespace) -> dict[str, Any]:
    """Check the options and give those that decide the results.

    Raises:
        RecipeError: a value out of range, an unknown method, or options that exclude each other.
    """
    for name in ("workers", "timeout", "memory_gb"):
        if not getattr(options, name) > 0:
            flag = name.replace("_", "-")
            raise RecipeError(f"expected --{flag} above 0, got {getattr(options, name)}")
    if options.blocks < 0:
        raise RecipeError(f"expected --blocks of 0 or more, got {options.blocks}")
    if options.resume and options.restart:
        raise RecipeError("expected --resume or --restart, got both")
    for method in options.methods:
        normswap.get_method(method)
    if options.smallest_per_family and options.source != "timm":
        raise RecipeError("expected --smallest-per-family with --source timm, which has families")
    keep = options.filter
    if options.smoke:
        if keep or options.source != "timm":
            raise RecipeError("expected --smoke alone: it chooses its own few timm models")
        keep = SMOKE
    return {
        "source": options.source,
        "filter": keep,
        "exclude": options.exclude,
        "smallest_per_family": options.smallest_per_family,
        "methods": list(dict.fromkeys(options.methods)),
        "seed": options.seed,
        "structure": options.structure,
        "blocks": options.blocks,
    }


def _memory() -> float:
    """Give half of the machine's memory in GiB, 8 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB / 2
    except (AttributeError, ValueError, OSError):
        return 8.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    add = parser.add_argument
    add(
        "--source",
        default="timm",
        help="timm, torchvision, or package.module:function that yields (name, builder, example "
        "inputs) (default: timm)",
    )
    add("--filter", nargs="+", default=[], metavar="GLOB", help="only these models")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="not these models")
    add(
        "--smallest-per-family",
        action="store_true",
        help="only the member with the fewest parameters of each timm family that has norms",
    )
    add(
        "--structure",
        action="store_true",
        help="plan on the meta device only: minutes for all of timm, but no numbers",
    )
    add(
        "--blocks",
        type=int,
        default=0,
        help="keep so many of each run of equal blocks of a model, and build a few models smaller "
        "otherwise (default: all that fit)",
    )
    add("--methods", nargs="+", default=["cn"], help=", ".join(normswap.methods()))
    add("--workers", type=int, default=1, help="processes of one thread each (default: 1)")
    add("--memory-gb", type=float, default=_memory(), help="for all workers (default: half of all)")
    add("--timeout", type=float, default=900, help="seconds for a model and method (default: 900)")
    add("--seed", type=int, default=0, help="of the weights (default: 0)")
    add("--out", type=Path, default=Path("runs/sweep"), help="folder of the sweep (runs/sweep)")
    add("--resume", action="store_true", help="continue a sweep that was stopped")
    add("--restart", action="store_true", help="delete the sweep's results and begin anew")
    add("--smoke", action="store_true", help="three tiny models, to see that all works")
    return parser

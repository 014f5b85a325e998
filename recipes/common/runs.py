"""The folder of a run: settings, metrics and a checkpoint that a kill cannot spoil.

    runs/NAME/config.json       every setting, and the versions it ran with
    runs/NAME/report.txt        the final tables, with the command
    runs/NAME/results.jsonl     of a grid: one line a finished training, and
    runs/NAME/epochs.jsonl      one line an epoch, results.png, and table.json: see `reports`
    runs/NAME/metrics.jsonl     of `finetune`: one line an epoch, and
    runs/NAME/checkpoint.pt     models, optimizers, history: all a resumed run needs
    runs/NAME/model.safetensors the trained model's state dict, when the run is finished

Each file is written beside its place and moved there whole. The checkpoint is one file that also
holds the history, and metrics.jsonl is written from that history: no two files can disagree.
"""

import argparse
import importlib
import json
import os
import pickle
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

import normswap

from .errors import RecipeError, check
from .options import Parser
from .training import Arm

FORMAT = "normswap-recipe-2"
CHECKPOINT, CONFIG, METRICS = "checkpoint.pt", "config.json", "metrics.jsonl"
# What has no say in the figures of a run, and what a resumed one may have more or less of.
NOT_SETTINGS = ("out", "name", "resume", "device")
FREE = ("methods", "seeds", "workers", "jobs")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on leaving without an error it becomes `path` at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def reading(path: Path, way_out: str) -> Iterator[None]:
    """Say of a file that is damaged which it is and what to do."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"cannot read {path}: {error!r}; {way_out}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; none where there is no file."""
    with reading(path, "delete it to run all again"):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]


def add_options(parser: Parser) -> None:
    parser.share("name", "resume", "smoke", out=Path("runs"), device="auto")


def command(recipe: str, argv: list[str]) -> int:
    """Run a recipe; give 0, 2 for something the user can fix, 130 when interrupted."""
    module = importlib.import_module(f"recipes.{recipe}")
    parser = Parser(recipe, module.__doc__)
    try:
        module.add_options(parser)
        module.run(parse(parser, argv))
    except (RecipeError, normswap.NormswapError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, for --resume", file=sys.stderr)
        return 130
    return 0


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Read the command line; what it leaves out of a run to be resumed is as it was there."""
    options = parser.parse_args(argv)
    if getattr(options, "resume", False):
        check(options.name, "expected --name with --resume, to know which run to continue")
        saved = read_config(options.out / options.name)
        parser.set_defaults(**{k: v for k, v in saved.items() if k in vars(options)})
        options = parser.parse_args(argv)
    return options


def settings_of(options: argparse.Namespace, recipe: str) -> dict[str, Any]:
    settings = {k: v for k, v in vars(options).items() if k not in NOT_SETTINGS}
    found: dict[str, Any] = json.loads(json.dumps({"recipe": recipe, **settings}, default=str))
    return found


def folder_of(
    options: argparse.Namespace, recipe: str, stem: str, free: Sequence[str] = FREE
) -> Path:
    """Give the folder of a new run, or of one to be resumed; nothing is written yet."""
    numbered = (stem if n == 1 else f"{stem}-{n}" for n in count(1))
    name = options.name or next(name for name in numbered if not (options.out / name).exists())
    folder: Path = options.out / name
    if not options.resume:
        way_out = "add --resume to continue it, or choose another --name"
        check(not folder.exists(), f"expected a new run, but {folder} exists; {way_out}")
        return folder
    before, now = read_config(folder), settings_of(options, recipe)
    for key in sorted((before.keys() | now) - set(free)):
        was, wanted = before.get(key), now.get(key)
        expected = f"expected --{key.replace('_', '-')} to be {was!r}, as in the run to resume"
        way_out = "leave it out, or start a new run with another --name"
        check(was == wanted, f"{expected}, got {wanted!r}; {way_out}")
    return folder


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a run and what it runs with; the command is that of a start."""
    given = [argument for argument in sys.argv[1:] if argument != "--resume"]
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu": cpu_name(),
        "command": shlex.join(["python", "-m", "recipes", *given]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "versions": versions}
    write_text(folder / CONFIG, json.dumps(record, indent=2) + "\n")


def cpu_name() -> str:
    """Name the processor: its model where Linux says it, else what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def read_config(folder: Path, part: str = "settings") -> dict[str, Any]:
    """Read the settings of a run, or the versions it ran with."""
    path = folder / CONFIG
    way_out = f"found no {CONFIG}; leave out --resume to start it"
    check(path.exists(), f"expected a run to resume at {folder}, {way_out}")
    with reading(path, "leave out --resume, and start it again under another --name"):
        return dict(json.loads(path.read_text(encoding="utf-8"))[part])


def save_checkpoint(folder: Path, arms: list[Arm], history: list[dict[str, Any]]) -> None:
    states = {a.name: (a.model.state_dict(), a.optimizer.state_dict()) for a in arms}
    with atomic(folder / CHECKPOINT) as temporary:
        torch.save({"format": FORMAT, "history": history, "states": states}, temporary)
    write_lines(folder / METRICS, history)


def load_checkpoint(folder: Path, arms: list[Arm]) -> list[dict[str, Any]]:
    """Restore models and optimizers; give the history so far."""
    path = folder / CHECKPOINT
    if not path.exists():  # killed within the first epoch: there is nothing to lose yet
        return []
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RecipeError(f"cannot read the checkpoint {path}: {error}") from error
    ours = isinstance(saved, dict) and saved.get("format") == FORMAT
    check(ours, f"expected a checkpoint of format {FORMAT} at {path}, got another")
    for arm in arms:
        model, optimizer = saved["states"][arm.name]
        try:
            arm.model.load_state_dict(model)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise RecipeError(f"{path} does not fit the model {arm.name}: {reason}") from error
        arm.optimizer.load_state_dict(optimizer)
    return saved["history"]


def save_model(folder: Path, model: nn.Module) -> None:
    # Copies, since safetensors refuses tensors that share memory (a norm under two names).
    state = {
        k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for k, v in model.state_dict().items()
    }
    with atomic(folder / "model.safetensors") as temporary:
        save_file(state, temporary)

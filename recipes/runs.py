"""The folder of a run: settings, metrics and a checkpoint that a kill cannot spoil.

    runs/NAME/config.json              every setting, and the versions it ran with
    runs/NAME/metrics.jsonl            one line an epoch
    runs/NAME/curves.png
    runs/NAME/report.txt               the final tables, and the summary of the trained model
    runs/NAME/checkpoint.safetensors   models, optimizers, history: all a resumed run needs
    runs/NAME/model.safetensors        the trained model's state dict, when the run is finished

Each file is written beside its place and moved there whole. The checkpoint is one file that also
holds the history, and metrics.jsonl is written from that history: no two files can disagree.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import RecipeError
from .training import Arm

FORMAT = "normswap-recipe-1"
CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on leaving without an error it becomes `path` at once."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def free_name(out: Path, stem: str) -> str:
    """Give `stem`, or `stem-2`, `stem-3`, ..., the first that is no run in `out` yet."""
    name, number = stem, 1
    while (out / name).exists():
        number += 1
        name = f"{stem}-{number}"
    return name


def check_new(folder: Path) -> None:
    """Refuse a folder that is already there."""
    if folder.exists():
        raise RecipeError(
            f"expected a new run, but {folder} exists; add --resume to continue it, or choose "
            "another --name"
        )


def create(folder: Path, settings: dict[str, Any], versions: dict[str, str]) -> None:
    """Make the folder of a new run and record its settings."""
    folder.mkdir(parents=True)
    write_config(folder, settings, versions)


def write_config(folder: Path, settings: dict[str, Any], versions: dict[str, str]) -> None:
    """Record the settings of a run."""
    record = {"settings": settings, "versions": versions}
    write_text(folder / CONFIG, json.dumps(record, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Record what the run ran with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Read the settings of a run that is to be resumed.

    Raises:
        RecipeError: if there is no such run.
    """
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError as error:
        raise RecipeError(
            f"expected a run to resume at {folder}, found no {CONFIG}; leave out --resume to "
            "start it"
        ) from error
    except (ValueError, KeyError) as error:
        raise RecipeError(f"cannot read the settings in {folder / CONFIG}: {error!r}") from error


def save_checkpoint(folder: Path, arms: list[Arm], history: list[dict[str, Any]]) -> None:
    """Write the state after the last epoch of `history`, then the metrics."""
    tensors: dict[str, Tensor] = {}
    optimizers = {}
    for arm in arms:
        for name, value in arm.model.state_dict().items():
            tensors[f"{arm.name}/model/{name}"] = value
        state = arm.optimizer.state_dict()
        scalars: dict[str, dict[str, Any]] = {}
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{arm.name}/optimizer/{index}/{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        optimizers[arm.name] = {"groups": state["param_groups"], "scalars": scalars}
    metadata = {
        "format": FORMAT,
        "history": json.dumps(history),
        "optimizers": json.dumps(optimizers),
    }
    with atomic(folder / CHECKPOINT) as temporary:
        # Copies, since safetensors refuses tensors that share memory (a norm under two names).
        save_file({k: _own(v) for k, v in tensors.items()}, temporary, metadata)
    write_metrics(folder, history)


def load_checkpoint(folder: Path, arms: list[Arm]) -> list[dict[str, Any]]:
    """Restore models and optimizers; give the history so far.

    Raises:
        RecipeError: if the file is damaged or belongs to other models.
    """
    path = folder / CHECKPOINT
    if not path.exists():  # killed within the first epoch: there is nothing to lose yet
        return []
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise RecipeError(f"cannot read the checkpoint {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise RecipeError(
            f"expected a checkpoint of format {FORMAT} at {path}, got {metadata.get('format')!r}"
        )
    optimizers = json.loads(metadata["optimizers"])
    for arm in arms:
        prefix = f"{arm.name}/model/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            arm.model.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise RecipeError(f"{path} does not fit the model {arm.name}: {reason}") from error
        arm.optimizer.load_state_dict(_optimizer_state(arm.name, tensors, optimizers[arm.name]))
    return json.loads(metadata["history"])


def save_model(folder: Path, arm: Arm) -> Path:
    """Write the state dict of the trained model alone."""
    path = folder / "model.safetensors"
    with atomic(path) as temporary:
        save_file({k: _own(v) for k, v in arm.model.state_dict().items()}, temporary)
    return path


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write one JSON line an epoch."""
    write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in history))


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _optimizer_state(
    name: str, tensors: dict[str, Tensor], saved: dict[str, Any]
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in saved["scalars"].items()}
    prefix = f"{name}/optimizer/"
    for full, value in tensors.items():
        if full.startswith(prefix):
            index, _, key = full.removeprefix(prefix).partition("/")
            state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": saved["groups"]}

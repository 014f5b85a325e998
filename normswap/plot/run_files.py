"""What the command line draws from: the files of a run or of a save, a file of tensors."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from torch import Tensor

from normswap.errors import NormswapError
from normswap.functional.mixture_start import bounded_log_prior
from normswap.functional.moments import Moments, gaussian_divergences
from normswap.methods.registry import get_method, methods
from normswap.plot.densities import Components
from normswap.saving.folder import DESCRIPTION, read_folder
from normswap.util.extras import need

METRICS = "metrics.jsonl"
CONFIG = "config.json"
TENSORS = "model.safetensors"
STEPS = ("epoch", "step", "iteration")


def read_curves(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the arguments of `curves` for a run's metrics.jsonl: a record a line.

    A record of the fine-tuning recipe gives loss and mean accuracy over the trained domains for
    each model; any other gives a panel for each of its numbers, over epoch or step if it has one.

    Raises:
        NormswapError: no such file, or lines that are no such records.
    """
    path = Path(folder) / METRICS if Path(folder).is_dir() else Path(folder)
    try:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    except OSError as error:
        raise NormswapError(f"expected a run with {METRICS} at {folder}: {error}") from error
    except ValueError as error:
        raise NormswapError(f"{path} is not one JSON record a line: {error}") from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise NormswapError(f"expected records, one a line, in {path}, got {len(records)}")
    found = next((name for name in STEPS if name in records[0]), None)
    x = None if found is None else [record.get(found) for record in records]
    try:
        if all("arms" in record for record in records):
            panels, log = _recipe_panels(records, _settings(path.parent).get("held_out"))
        else:
            panels, log = _panels(records), []
    except (KeyError, TypeError, AttributeError) as error:
        raise NormswapError(f"{path} holds other records than a run writes: {error!r}") from error
    where = {"x": x, "xlabel": found or "record", "title": path.absolute().parent.name}
    return {"panels": panels, "log": log, **where}


def _recipe_panels(
    records: list[dict[str, Any]], held_out: str | None
) -> tuple[dict[str, dict[str, list[float | None]]], list[str]]:
    loss, accuracy = "training loss", "test accuracy, mean of trained domains, %"
    panels: dict[str, dict[str, list[float | None]]] = {loss: {}, accuracy: {}}
    for arm in records[0]["arms"]:
        series = [record["arms"][arm] for record in records]
        panels[loss][arm] = [entry["loss"] for entry in series]
        kinds = sorted(series[0]["accuracy"])  # known before unknown
        for kind in kinds:
            name = f"{arm}, label {kind}" if len(kinds) > 1 else arm
            panels[accuracy][name] = [
                mean(v for domain, v in entry["accuracy"][kind].items() if domain != held_out)
                for entry in series
            ]
    positive = all(entry["loss"] > 0 for r in records for entry in r["arms"].values())
    return panels, [loss] if positive else []


def _panels(records: list[dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    numbers = dict.fromkeys(
        key
        for record in records
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in STEPS
    )
    return {key: {key: [record.get(key) for record in records]} for key in numbers}


def read_tensors(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of the one in a run's folder, by name.

    Raises:
        NormswapError: no such file, or a damaged one.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        named = [file for file in found if file.name == TENSORS] or found
        if len(named) != 1:
            raise NormswapError(
                f"expected {TENSORS}, or one safetensors file, in {path}, found "
                f"{', '.join(file.name for file in found) or 'none'}"
            )
        (path,) = named
    error_of_library = need("safetensors", "plot", "reading tensors").SafetensorError
    try:
        tensors: dict[str, Tensor] = need("safetensors.torch", "plot", "reading").load_file(path)
    except (OSError, error_of_library) as error:
        raise NormswapError(f"cannot read tensors from {path}: {error}") from error
    return tensors


def components_in(tensors: Mapping[str, Tensor]) -> dict[str, Components]:
    """Return the statistics of each layer of CN, CN-X or ACN among a model's tensors, by layer.

    They are told by name and shape, (K, C): of ACN those that values are assigned by.
    """
    found: dict[str, Components] = {}
    for name in tensors:
        layer, _, last = name.rpartition(".")
        prefix = f"{layer}." if layer else ""
        if last not in ("running_mean", "mu") or tensors[name].dim() != 2 or layer in found:
            continue
        learned = prefix + "mu" in tensors
        names = ("mu", "log_sigma") if learned else ("running_mean", "running_var")
        get = {key: tensors.get(prefix + key) for key in (*names, "priors", "prior_logits")}
        center, spread, priors, logits = (None if t is None else t.double() for t in get.values())
        if center is None or spread is None or (priors is None and logits is None):
            continue
        sigma = spread.exp() if learned else spread.clamp(min=1e-12).sqrt()
        if logits is not None:
            weight = bounded_log_prior(logits).exp()
        elif priors is not None:
            weight = (priors / priors.sum())[:, None]  # the sum is not one after add_context
        found[layer] = Components(weight.expand_as(center), center, sigma)
    return found


def divergences_in(
    tensors: Mapping[str, Tensor], order: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return the divergences of each layer, (K,), of the components that values are normalised by.

    Args:
        tensors: of a converted model.
        order: names of its modules in their order; by default layers are sorted by name, numbers
            by size.

    Raises:
        NormswapError: no layer with statistics of contexts.
    """
    rows: dict[str, Tensor] = {}
    for layer, parts in components_in(tensors).items():
        prefix = f"{layer}." if layer else ""
        moments = Moments(parts.mean, parts.sigma.square())
        if prefix + "running_mean" in tensors and prefix + "running_var" in tensors:
            both = (tensors[prefix + name].double() for name in ("running_mean", "running_var"))
            moments = Moments(*both)
        rows[layer or "(root)"] = gaussian_divergences(moments, parts.weight).mean(1)
    if not rows:
        raise NormswapError(
            "found no layer of CN, CN-X or ACN with statistics of contexts among these tensors"
        )
    place = {name: k for k, name in enumerate(order or ())}
    names = sorted(rows, key=lambda name: (place.get(name, len(place)), _natural(name)))
    return {name: rows[name] for name in names}


class Source(NamedTuple):
    """What a folder of a run or of `normswap.save`, or a safetensors file, holds.

    Attributes:
        tensors: by name.
        title: says what it is of.
        names: of the contexts, where they are known.
        order: of the layers, where it is known.
        model: name of the timm model that was trained, if the settings tell.
    """

    tensors: dict[str, Tensor]
    title: str
    names: list[str] | None
    order: list[str] | None = None
    model: str | None = None


def read_source(source: str | os.PathLike[str]) -> Source:
    """Return what the command line draws from.

    Raises:
        CheckpointError: a file of `normswap.save` that is missing, cut short, changed, or newer.
        NormswapError: other files that are missing or damaged, or safetensors is missing.
    """
    path = Path(source)
    if not (path / DESCRIPTION).is_file():
        model = _settings(path).get("model")
        model = model if isinstance(model, str) else None
        title = path.absolute().name + (": divergence by layer" if model else "")
        return Source(read_tensors(path), title, _context_names(path), model=model)
    content, tensors = read_folder(path)
    method = content["method"]
    labelled = method not in methods() or get_method(method).needs_context
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in content["layers"]))
    title = f"{content['base']['class']}, {method}: divergence by layer"
    return Source(tensors, title, list(content["contexts"]) if labelled else None, layers)


def _context_names(folder: Path) -> list[str] | None:
    """Return the names of the contexts of a run, as its metrics have them."""
    path = folder / METRICS
    if not path.is_file():
        return None
    try:
        first = json.loads(path.read_text("utf-8").partition("\n")[0] or "{}")
        arms = [arm.get("accuracy", {}) for arm in first.get("arms", {}).values()]
        names = [list(accuracy["known"]) for accuracy in arms if "known" in accuracy]
    except (ValueError, AttributeError, TypeError) as error:
        raise NormswapError(f"{path} holds other records than a run writes: {error!r}") from error
    return names[-1] if names else None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NormswapError(f"cannot read the settings in {path}: {error!r}") from error
    return settings if isinstance(settings, dict) else {}


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]

"""``normswap plot KIND``: pictures from the files of a run, or of a model's schedule."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from normswap import api, plot
from normswap.cli.sources import add_model, build_model, chosen_model
from normswap.errors import NormswapError
from normswap.plot import run_files


def add_plot(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` returned."""
    parser = commands.add_parser("plot", help="draw a run, or where a model's CrossNorm fires")
    kinds = parser.add_subparsers(required=True, metavar="KIND")

    def add(name: str, draw: Any, text: str, source: str = "") -> argparse.ArgumentParser:
        kind: argparse.ArgumentParser = kinds.add_parser(name, help=text)
        if source:
            kind.add_argument("source", metavar="RUN", help=source)
        out = Path(f"{name}.png")
        kind.add_argument("--out", type=Path, default=out, help=f"file to write ({out})")
        kind.set_defaults(run=partial(_write, draw))
        return kind

    saved = "folder of a run or of normswap.save, or a safetensors file"
    text = "loss and accuracy of a run by epoch"
    add("curves", _curves, text, "folder of a run with metrics.jsonl, or such a file")

    text = "how far the contexts' statistics are apart, layer by layer"
    divergence = add("divergence", _divergence, text, saved)
    divergence.add_argument("--names", type=lambda text: text.split(","), help="of the contexts")

    text = "components of a layer; over activations from Python, normswap.plot.densities"
    densities = add("densities", _densities, text, saved)
    densities.add_argument("--layer", required=True, help="its name in the model")
    densities.add_argument("--channels", type=int, default=6, help="how many (6)")

    firing = add("firing", _firing, "where CrossNorm would fire in the next forwards")
    add_model(firing)
    firing.add_argument("--method", default="crossnorm", help="crossnorm, cnsn")
    firing.add_argument("--placement", help="where the layers go")
    firing.add_argument("--forwards", type=int, default=100, help="how many to draw (100)")
    firing.add_argument("--seed", type=int, default=0, help="of the draws (0)")


def _write(draw: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> str:
    draw(options)
    return f"wrote {options.out}"


def _curves(options: argparse.Namespace) -> Any:
    return plot.curves(**run_files.read_curves(options.source), path=options.out)


def _divergence(options: argparse.Namespace) -> Any:
    source = run_files.read_source(options.source)
    order = _order(source.model) if source.model else source.order
    rows = run_files.divergences_in(source.tensors, order)
    count, names = len(next(iter(rows.values()))), source.names
    if names is None or len(names) != count:
        names = None if source.order is None else [f"component {k}" for k in range(count)]
    names = options.names or names
    return plot.divergence(rows, names=names, title=source.title, path=options.out)


def _order(name: str) -> list[str] | None:
    """Return the names of a timm model's modules; None where timm or the model is missing."""
    try:
        model = build_model(f"timm:{name}", "meta")
    except NormswapError:
        return None
    return [module for module, _ in model.named_modules()]


def _densities(options: argparse.Namespace) -> Any:
    source = run_files.read_source(options.source)
    found = run_files.components_in(source.tensors)
    if options.layer not in found:
        named = ", ".join(list(found)[:8]) or "none"
        raise NormswapError(
            f"expected --layer of a layer with components, got {options.layer!r}; they are: {named}"
        )
    parts, names = found[options.layer], tuple(source.names or ())
    if len(names) == len(parts.mean):
        parts = parts._replace(names=names)
    return plot.densities(parts, None, options.layer, channels=options.channels, path=options.out)


def _firing(options: argparse.Namespace) -> Any:
    given = {"placement": options.placement, "verify": False, "inplace": True}
    model = api.convert(chosen_model(options, "meta"), options.method, **given)
    return plot.firing(model, forwards=options.forwards, seed=options.seed, path=options.out)

"""``normswap plot KIND``: pictures from the files of a run, or of a model's schedule."""

import argparse
from pathlib import Path
from typing import Any

from normswap import api, plot
from normswap.cli.sources import add_model, build_model, chosen_model
from normswap.errors import NormswapError, UnknownNameError
from normswap.plot import run_files
from normswap.plot.saved_model import read_saved


def add_plot(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` returned."""
    parser = commands.add_parser("plot", help="draw a run, or where a model's CrossNorm fires")
    kinds = parser.add_subparsers(required=True, metavar="KIND")

    curves = kinds.add_parser("curves", help="loss and accuracy of a run by epoch")
    curves.add_argument(
        "source", metavar="RUN", help="folder of a run with metrics.jsonl, or such a file"
    )
    _finish(curves, "curves", _curves)

    divergence = kinds.add_parser(
        "divergence", help="how far the contexts' statistics are apart, layer by layer"
    )
    divergence.add_argument(
        "source", metavar="RUN", help="folder of a run or of normswap.save, or a safetensors file"
    )
    divergence.add_argument("--names", type=lambda text: text.split(","), help="of the contexts")
    _finish(divergence, "divergence", _divergence)

    densities = kinds.add_parser(
        "densities",
        help="components of a layer; over activations from Python, normswap.plot.densities",
    )
    densities.add_argument(
        "source", metavar="RUN", help="folder of a run or of normswap.save, or a safetensors file"
    )
    densities.add_argument("--layer", required=True, help="its name in the model")
    densities.add_argument("--channels", type=int, default=6, help="how many (6)")
    _finish(densities, "densities", _densities)

    firing = kinds.add_parser("firing", help="where CrossNorm would fire in the next forwards")
    add_model(firing)
    firing.add_argument("--method", default="crossnorm", help="crossnorm, cnsn")
    firing.add_argument("--placement", help="where the layers go")
    firing.add_argument("--forwards", type=int, default=100, help="how many to draw (100)")
    firing.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    _finish(firing, "firing", _firing)


def _finish(parser: argparse.ArgumentParser, name: str, run: Any) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(f"{name}.png"), help=f"file to write ({name}.png)"
    )
    parser.set_defaults(run=run)


def _curves(options: argparse.Namespace) -> str:
    plot.curves(**run_files.read_curves(options.source), path=options.out)
    return f"wrote {options.out}"


def _divergence(options: argparse.Namespace) -> str:
    saved = read_saved(options.source)
    if saved is not None:
        tensors, order, names, title = saved
        rows = run_files.divergences_in(tensors, order)
        count = len(next(iter(rows.values())))
        names = names or [f"component {k}" for k in range(count)]
    else:
        order = None
        title = Path(options.source).absolute().name
        name = run_files.model_of(options.source) if Path(options.source).is_dir() else None
        if name is not None:
            title = f"{title}: divergence by layer"
            order = _order(name)
        rows = run_files.divergences_in(run_files.read_tensors(options.source), order)
        names = run_files.context_names(options.source, len(next(iter(rows.values()))))
    names = options.names or names
    plot.divergence(rows, names=names, title=title, path=options.out)
    return f"wrote {options.out}"


def _order(name: str) -> list[str] | None:
    """Return the names of a timm model's modules; None where timm or the model is missing."""
    try:
        model = build_model(f"timm:{name}", "meta")
    except UnknownNameError:
        return None
    return [module for module, _ in model.named_modules()]


def _densities(options: argparse.Namespace) -> str:
    saved = read_saved(options.source)
    tensors = run_files.read_tensors(options.source) if saved is None else saved.tensors
    found = run_files.components_in(tensors)
    if options.layer not in found:
        known = ", ".join(list(found)[:8]) or "none"
        raise NormswapError(
            f"expected --layer of a layer with components, got {options.layer!r}; they are: {known}"
        )
    parts = found[options.layer]
    if saved is None:
        names = run_files.context_names(options.source, len(parts.mean))
    else:
        names = saved.names
    parts = parts._replace(names=tuple(names or ()))
    plot.densities(parts, None, options.layer, channels=options.channels, path=options.out)
    return f"wrote {options.out}"


def _firing(options: argparse.Namespace) -> str:
    model = api.convert(
        chosen_model(options, "meta"),
        options.method,
        placement=options.placement,
        verify=False,
        inplace=True,
    )
    plot.firing(model, forwards=options.forwards, seed=options.seed, path=options.out)
    return f"wrote {options.out}"

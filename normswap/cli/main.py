"""The command line: inspect a model, list the methods, verify or show a conversion, draw."""

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from normswap import api
from normswap._version import __version__
from normswap.cli.plot import add_plot
from normswap.cli.sources import add_model, chosen_model
from normswap.errors import AdviceWarning, NormswapError
from normswap.methods.registry import get_method, methods
from normswap.report import Report
from normswap.saving.folder import DESCRIPTION, find_folder, read_description
from normswap.util.arguments import listed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        print(options.run(options))
    except NormswapError as error:
        print(f"normswap: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="normswap", description=__doc__)
    parser.add_argument("--version", action="version", version=f"normswap {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("methods", help="list the methods")
    listing.set_defaults(run=_methods)

    inspect = commands.add_parser(
        "inspect", help="show what a conversion would replace; no weights, no forward"
    )
    _add_conversion(inspect)
    inspect.add_argument("--rows", type=int, help="show at most this many norms")
    inspect.add_argument(
        "--format", choices=["text", "markdown", "json"], default="text", help="default: text"
    )
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify", help="convert a model with random weights and compare its outputs"
    )
    _add_conversion(verify)
    verify.add_argument("--seed", type=int, default=0, help="of the weights; default: 0")
    verify.set_defaults(run=_verify)

    show = commands.add_parser("show", help="show what a saved conversion is; needs no model")
    show.add_argument("folder", help="that normswap.save wrote, or user/name on the hub")
    show.add_argument("--revision", help="branch, tag or commit on the hub")
    show.add_argument("--subfolder", help="where the conversion lies below the folder")
    show.set_defaults(run=_show)

    add_plot(commands)
    return parser


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--method", default="cn-x", help="default: cn-x")
    parser.add_argument(
        "--contexts", type=_contexts, default=None, help="a count, or names: photo,sketch"
    )
    parser.add_argument("--select", help="glob of the norms to replace")
    parser.add_argument("--exclude", help="glob of the norms to leave alone")


def _contexts(text: str) -> int | list[str]:
    return int(text) if text.isdecimal() else text.split(",")


def _conversion(options: argparse.Namespace) -> dict[str, Any]:
    chosen = ("method", "contexts", "select", "exclude")
    return {name: getattr(options, name) for name in chosen}


def _methods(options: argparse.Namespace) -> str:
    found = [get_method(name) for name in methods()]
    rows = [[m.name, "yes" if m.needs_context else "no", m.title] for m in found]
    return tabulate(rows, headers=["method", "labels", "what it is"], tablefmt="simple")


def _inspect(options: argparse.Namespace) -> str:
    report: Report = api.plan(chosen_model(options, "meta"), **_conversion(options))
    if options.format == "json":
        return json.dumps(report.to_dict(), indent=2)
    shown = report.markdown if options.format == "markdown" else report.text
    return shown(options.rows)


def _verify(options: argparse.Namespace) -> str:
    torch.manual_seed(options.seed)
    model = chosen_model(options, "cpu")
    randomise_statistics(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)  # its statistics were not trained
        converted = api.convert(model, **_conversion(options))
    return str(api.summary(converted).heading())


def randomise_statistics(model: nn.Module) -> None:
    """Give every tensor of the norms a random value, so that no error hides behind 0 and 1."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        if tensor.is_floating_point() and hasattr(owner, "running_mean"):
            with torch.no_grad():
                positive = name.endswith(("weight", "running_var"))
                tensor.uniform_(0.5, 1.5) if positive else tensor.normal_(0, 0.2)


def _show(options: argparse.Namespace) -> str:
    folder = find_folder(options.folder, options.revision, options.subfolder)
    content = read_description(folder)
    base, file, name = content["base"], content["file"], content["method"]
    registered = name in methods()
    settings = [f"{key}={value}" for key, value in content["options"].items()]
    classes = Counter(norm["class"] for norm in base["norms"].values())
    size = (folder / DESCRIPTION).stat().st_size + file["bytes"]
    missing = "" if (folder / file["name"]).is_file() else f"; {file['name']} is missing"
    rows = [
        ("base", f"{base['class']}, {len(base['tensors'])} tensors besides the layers"),
        ("method", ", ".join([name, *settings]) + ("" if registered else " (not registered here)")),
        ("placement", content["placement"] or "the method's own"),
        *(_context_rows(content) if not registered or get_method(name).needs_context else ()),
        ("replaced", ", ".join(f"{n} {cls}" for cls, n in classes.items()) or "no norm"),
        *([] if classes else [("given a layer", f"{len(content['sites'])} place(s)")]),
        ("tensors", f"{len(content['layers'])} of layers, {len(content['others'])} others"),
        ("size", f"{size:,} bytes{missing}"),
        ("saved by", f"normswap {content['normswap']}, format {content['format']}"),
        ("read by", f"normswap {__version__}"),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _context_rows(content: dict[str, Any]) -> list[tuple[str, str]]:
    names, unknown = content["contexts"], content["unknown"]
    return [
        ("contexts", f"{len(names)}: {listed(names)}"),
        ("unknown labels", names[unknown] if isinstance(unknown, int) else unknown),
    ]

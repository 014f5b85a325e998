"""The command line: inspect a model, list the methods, verify or show a conversion, draw."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from normswap import api
from normswap._version import __version__
from normswap.cli.plot import add_plot
from normswap.cli.show import add_show
from normswap.cli.sources import add_model, chosen_model
from normswap.errors import NormswapError
from normswap.methods.base import get_method, methods
from normswap.report import Report


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

    add_show(commands)
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
    rows = []
    for name in methods():
        method = get_method(name)
        rows.append([name, "yes" if method.needs_context else "no", method.title])
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
    return str(api.summary(api.convert(model, **_conversion(options))).heading())


def randomise_statistics(model: nn.Module) -> None:
    """Give every tensor of the norms a random value, so that no error hides behind 0 and 1."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        if tensor.is_floating_point() and hasattr(owner, "running_mean"):
            with torch.no_grad():
                positive = name.endswith(("weight", "running_var"))
                tensor.uniform_(0.5, 1.5) if positive else tensor.normal_(0, 0.2)

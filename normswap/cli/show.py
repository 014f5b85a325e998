"""``normswap show DIR``: what a saved conversion is, read from its description alone."""

import argparse
from collections import Counter
from typing import Any

from tabulate import tabulate

from normswap._version import __version__
from normswap.methods.base import get_method, methods
from normswap.saving.folder import DESCRIPTION, read_description
from normswap.saving.hub import find_folder
from normswap.util.arguments import listed


def add_show(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` returned."""
    parser = commands.add_parser("show", help="show what a saved conversion is; needs no model")
    parser.add_argument("folder", help="that normswap.save wrote, or user/name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> str:
    folder = find_folder(options.folder, options.revision)
    content = read_description(folder)
    base, file, name = content["base"], content["file"], content["method"]
    known = name in methods()
    settings = [f"{key}={value}" for key, value in content["options"].items()]
    classes = Counter(norm["class"] for norm in base["norms"].values())
    size = (folder / DESCRIPTION).stat().st_size + file["bytes"]
    missing = "" if (folder / file["name"]).is_file() else f"; {file['name']} is missing"
    rows = [
        ("base", f"{base['class']}, {len(base['tensors'])} tensors besides the layers"),
        ("method", ", ".join([name, *settings]) + ("" if known else " (not registered here)")),
        ("placement", content["placement"] or "the method's own"),
        *(_contexts(content) if not known or get_method(name).needs_context else ()),
        ("replaced", ", ".join(f"{n} {cls}" for cls, n in classes.items()) or "no norm"),
        *([] if classes else [("given a layer", f"{len(content['sites'])} place(s)")]),
        ("tensors", f"{len(content['layers'])} of layers, {len(content['others'])} others"),
        ("size", f"{size:,} bytes{missing}"),
        ("saved by", f"normswap {content['normswap']}, format {content['format']}"),
        ("read by", f"normswap {__version__}"),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _contexts(content: dict[str, Any]) -> list[tuple[str, str]]:
    names, unknown = content["contexts"], content["unknown"]
    return [
        ("contexts", f"{len(names)}: {listed(names)}"),
        ("unknown labels", names[unknown] if isinstance(unknown, int) else unknown),
    ]

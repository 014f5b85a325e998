"""The folder of a sweep: its settings, and one line for each result, whole after any kill.

OUT/config.json      settings and versions; a resumed sweep must agree with them
OUT/results.jsonl    one line for each model and method, written as it is known
OUT/report.md, report.json
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import normswap
from recipes.common.errors import RecipeError
from recipes.common.runs import write_text

CONFIG, RESULTS = "config.json", "results.jsonl"


def versions() -> dict[str, str]:
    """Name what the results depend on; the code of this project by its content."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    digest = hashlib.sha256()
    package = Path(normswap.__file__).parent
    for root in (package, Path(__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    found["normswap and sweep"] = f"sources {digest.hexdigest()[:12]}"
    return found


def open_sweep(
    folder: Path, settings: dict[str, Any], resume: bool, restart: bool
) -> dict[tuple[str, str], dict[str, Any]]:
    """Start a sweep's folder, or take up what it has.

    Returns:
        (model, method) -> result, of what is done already.

    Raises:
        RecipeError: a folder that is there already without being told what to do with it, or of
            other settings or versions.
    """
    record = {"settings": settings, "versions": versions()}
    config = folder / CONFIG
    if config.exists() and not restart:
        if not resume:
            raise RecipeError(
                f"expected a new sweep, but {folder} holds one; add --resume to continue it, "
                "--restart to begin anew, or choose another --out"
            )
        _compare(folder, record)
        return read_results(folder)
    if resume and not restart:
        raise RecipeError(
            f"expected a sweep to resume at {folder}, found no {CONFIG}; leave out --resume"
        )
    if folder.exists() and not config.exists() and any(folder.iterdir()):
        raise RecipeError(f"expected {folder} to be empty or a sweep's; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).unlink(missing_ok=True)
    write_text(config, json.dumps(record, indent=2) + "\n")
    return {}


def _compare(folder: Path, record: dict[str, Any]) -> None:
    try:
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        pairs = [(part, saved[part], record[part]) for part in ("settings", "versions")]
    except (ValueError, KeyError) as error:
        raise RecipeError(f"cannot read {folder / CONFIG}: {error!r}; use --restart") from error
    for part, old, new in pairs:
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                raise RecipeError(
                    f"expected the {part} of the sweep at {folder} ({name}: {old.get(name)!r}), "
                    f"got {new.get(name)!r}; results of both would mix: use --restart, or "
                    "another --out"
                )


def read_results(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read what is done; a last line cut off by a kill is taken away.

    Raises:
        RecipeError: another line that cannot be read.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    results = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            results[record["model"], record["method"]] = record
        except (ValueError, KeyError) as error:
            raise RecipeError(
                f"cannot read line {number} of {path}: {error!r}; use --restart"
            ) from error
    return results


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a result; it is on disk when this returns."""
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())

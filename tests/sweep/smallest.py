"""The smallest member of each family of timm that has batch or instance norms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.common.errors import RecipeError

from .build import build_on_meta, count
from .runner import Died, Task, run_tasks
from .sources import candidate, families

# What a scan of every architecture of one version of timm found: it takes minutes. Written by
# `python -m tests.sweep.smallest`; another version is scanned when it is asked for.
KNOWN = Path(__file__).with_name("smallest.json")


def smallest_members(names: list[str], workers: int, timeout: float, memory: float) -> list[str]:
    """Choose among names the one with the fewest parameters in each family with norms.

    Raises:
        RecipeError: an architecture that cannot be measured, or no family left.
    """
    import timm

    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    everything = set(names) >= set(timm.list_models())
    if everything and known["timm"] == timm.__version__:
        return sorted(known["families"].values())
    sizes = scan(names, workers, timeout, memory)
    chosen = _choose(sizes)
    if not chosen:
        raise RecipeError("expected a family with norms, got none; loosen --filter and --exclude")
    return sorted(chosen.values())


def _choose(sizes: dict[str, dict[str, int]]) -> dict[str, str]:
    chosen = {}
    for family, members in families().items():
        with_norms = [m for m in members if sizes.get(m, {}).get("norms")]
        if with_norms:
            chosen[family] = min(with_norms, key=lambda m: (sizes[m]["parameters"], m))
    return chosen


def scan(
    names: list[str], workers: int, timeout: float, memory: float
) -> dict[str, dict[str, int]]:
    """Count parameters and norms of timm's architectures, built on the meta device.

    Raises:
        RecipeError: an architecture that cannot be built.
    """
    sizes: dict[str, dict[str, int]] = {}
    tasks = [Task(name, ("size",), measure, (name,)) for name in names]
    for task, _, result in run_tasks(tasks, workers, timeout, memory):
        if isinstance(result, Died) or "error" in result:
            error = result.error if isinstance(result, Died) else result["error"]
            raise RecipeError(f"cannot count the parameters of {task.name}: {error}")
        sizes[task.name] = result
    return sizes


def measure(name: str, _: list[str]) -> Iterator[dict[str, Any]]:
    """Count the parameters and norms of one architecture."""
    try:
        yield count(build_on_meta(candidate("timm", name).build))
    except Exception as error:
        yield {"error": repr(error)}


if __name__ == "__main__":
    import timm

    found = _choose(scan(timm.list_models(), 1, 600, float("inf")))
    record = {"timm": timm.__version__, "families": found}
    KNOWN.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

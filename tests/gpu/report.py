"""What a run has found so far, as JSON and as tables in Markdown."""

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.gpu.journal import BAD, FAILED, PASSED, Journal

Step = dict[str, Any]


class Report:
    """Writes `report.json` and `report.md` into a folder, anew after every step."""

    def __init__(self, out: Path, environment: dict[str, str]) -> None:
        self.out, self.environment = out, environment
        self.parts: dict[str, list[Journal]] = {}
        self.refused: dict[str, str] = {}
        self.begin = time.monotonic()
        self._lock = threading.Lock()  # the processes of a part are each watched by a thread

    def write(self) -> None:
        with self._lock:
            self._write()

    def _steps(self) -> dict[str, list[Step]]:
        return {
            name: [step for journal in journals for step in journal.steps()]
            for name, journals in self.parts.items()
        }

    def _write(self) -> None:
        seconds = round(time.monotonic() - self.begin, 1)
        parts = self._steps()
        whole = {
            "environment": self.environment,
            "seconds": seconds,
            "refused": self.refused,
            "parts": parts,
        }
        _replace(self.out / "report.json", json.dumps(whole, indent=1))
        lines = ["# normswap on a device", ""]
        lines += [f"- {name}: {value}" for name, value in self.environment.items()]
        lines += [f"- after {seconds} s", ""]
        lines += [f"**Not run: {name}**: {why}\n" for name, why in self.refused.items()]
        for name, steps in parts.items():
            counts = Counter(step["outcome"] for step in steps)
            said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            lines += [f"## {name}: {said or 'nothing yet'}", ""]
            lines += _results(steps) + _reasons(steps)
        _replace(self.out / "report.md", "\n".join(lines))

    def has_failed(self) -> bool:
        """Return whether anything failed, crashed, hung, or could not be started."""
        steps = [step for steps in self._steps().values() for step in steps]
        cases = [case for step in steps for case in _cases(step)]
        return (
            bool(self.refused)
            or any(step["outcome"] in BAD for step in steps)
            or any("why" in case for case in cases)
        )


def _cases(step: Step) -> list[dict[str, Any]]:
    measures = step.get("result", {}).values()
    return [case for cases in measures for case in cases.values()]


def _results(steps: list[Step]) -> list[str]:
    """Return tables of what was measured: the first case as it is, the others as ratios to it."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for step in steps:
        for measure, cases in step.get("result", {}).items():
            first = next(iter(cases.values()))
            row = [f"{step['step']}: {measure}", *(_cell(c, first) for c in cases.values())]
            tables.setdefault(tuple(cases), []).append(row)
    lines = []
    for names, rows in tables.items():
        lines += [*_table(["", *names], rows), ""]
    return lines


def _cell(case: dict[str, Any], first: dict[str, Any]) -> str:
    if "why" in case:
        return "FAILED"
    values = [case[key] for key in ("median", "low", "high") if key in case]
    if case is not first and "median" in first and first["median"]:
        values = [value / first["median"] for value in values]
        texts = [f"{value:.2f}" for value in values]
    else:
        texts = [f"{value:.4g}" for value in values]
    return texts[0] if len(texts) == 1 else f"{texts[0]} ({texts[1]}-{texts[2]})"


def _reasons(steps: list[Step]) -> list[str]:
    """Return a table of what did not pass, what was skipped for one reason in one row."""
    rows, others = [], Counter[tuple[str, str]]()
    for step in steps:
        if step["outcome"] in BAD:
            rows.append([step["step"], step["outcome"], step["why"]])
        elif step["outcome"] != PASSED:
            others[step["outcome"], step.get("why") or "the time was up"] += 1
        for measure, cases in step.get("result", {}).items():
            for name, case in cases.items():
                if "why" in case:
                    rows.append([f"{step['step']}: {measure}: {name}", FAILED, case["why"]])
    for (outcome, why), count in others.items():
        rows.append([f"{count} steps", outcome, why])
    return [*_table(["step", "outcome", "why"], rows), ""] if rows else []


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _replace(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)

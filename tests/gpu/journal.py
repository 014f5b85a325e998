"""What a process has done, a line of JSON a step: if it dies, the rest still tells."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, CRASHED, HUNG = "passed", "failed", "skipped", "crashed", "hung"
NOT_RUN = "not run"
BAD = (FAILED, CRASHED, HUNG)


@dataclass(frozen=True)
class Journal:
    """A file of lines: the plan, then a start and an end for each step."""

    path: Path

    def plan(self, names: list[str]) -> None:
        """Name every step, those that ran before included."""
        self._write(plan=names)

    def start(self, name: str) -> None:
        self._write(start=name)

    def end(self, name: str, outcome: str, why: str = "", **more: Any) -> None:
        """Say how a step ended; why in one line."""
        line = " ".join(why.split())
        self._write(end=name, outcome=outcome, why=line[:300], **more)

    def _write(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _entries(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A process killed while it wrote leaves half a line.
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def ended(self) -> dict[str, dict[str, Any]]:
        """Return the last end of each step."""
        return {e["end"]: e for e in self._entries() if "end" in e}

    def planned(self) -> list[str] | None:
        """Return the steps of the last plan, None before there is one."""
        plans = [e["plan"] for e in self._entries() if "plan" in e]
        return plans[-1] if plans else None

    def running(self) -> str | None:
        """Return the step that was started last, if it has not ended."""
        starts = [e["start"] for e in self._entries() if "start" in e]
        return starts[-1] if starts and starts[-1] not in self.ended() else None

    def steps(self) -> list[dict[str, Any]]:
        """Return what is known of each step, in the order of the plan."""
        ended, planned = self.ended(), self.planned() or []
        names = [*(name for name in ended if name not in planned), *planned]
        return [{"step": n, **ended.get(n, {"end": n, "outcome": NOT_RUN})} for n in names]

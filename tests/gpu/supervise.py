"""Run processes that keep a `Journal`, and start them anew where a step ended or hung them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.gpu.journal import CRASHED, HUNG, NOT_RUN, Journal

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """Steps that one command runs, in a process of its own.

    Attributes:
        name: of the part, and of its files.
        command: reads and keeps the journal whose path is put behind it.
        share: of the time left when it starts that it may take.
        patience: seconds after which a step counts as hung.
        environment: variables that it sets.
        splits: whether several processes can take a share each, of `--share INDEX COUNT`.
    """

    name: str
    command: list[str]
    share: float
    patience: float
    environment: dict[str, str] = field(default_factory=dict)
    splits: bool = False

    def shares(self, processes: int) -> list["Part"]:
        """Return the part of each process."""
        if not self.splits or processes == 1:
            return [self]
        each = [["--share", str(i), str(processes)] for i in range(processes)]
        return [replace(self, command=[*self.command, *share]) for share in each]


def run_part(part: Part, journal: Journal, deadline: float, changed: Callable[[], None]) -> None:
    """Run a part until it is done or its time is up; call `changed` after every step."""
    log = journal.path.with_suffix(".log")
    until = time.monotonic() + part.share * (deadline - time.monotonic())
    while True:
        ended = len(journal.ended())
        code = _run(part, journal, log, until, changed)
        if code is None:
            return
        running = journal.running()
        if running is not None:
            journal.end(running, CRASHED, f"exit code {code}: {_last_line(log)}", text=_tail(log))
        left = [s for s in journal.steps() if s["outcome"] == NOT_RUN]
        if journal.planned() is None or (left and len(journal.ended()) == ended):
            journal.end(f"{part.name}: to start", CRASHED, _last_line(log), text=_tail(log))
            left = []
        changed()
        if not left:
            return


def _run(
    part: Part, journal: Journal, log: Path, until: float, changed: Callable[[], None]
) -> int | None:
    """Run the command once; return its exit code, None where the time was up."""
    # A suite around this one is not to change how the tests run here.
    outer = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "COV_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**outer, "PYTHONPATH": path, **part.environment}
    command = [*part.command, "--journal", str(journal.path)]
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    seen, since = 0, time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            size = journal.path.stat().st_size if journal.path.exists() else 0
            if size != seen:
                seen, since = size, time.monotonic()
                changed()
            now, running = time.monotonic(), journal.running()
            if now > until:
                if running is not None:
                    journal.end(running, NOT_RUN, "the time was up while it ran")
                return None
            if running is not None and now - since > part.patience:
                journal.end(running, HUNG, f"no end after {part.patience:.0f} s", text=_tail(log))
                break
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-8000:] if log.exists() else ""


def _last_line(log: Path) -> str:
    lines = _tail(log).split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")

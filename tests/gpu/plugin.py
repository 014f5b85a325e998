"""A plugin of pytest that keeps a `Journal`: `pytest -p tests.gpu.plugin --journal FILE`.

`--share 2 8` has this process run the third of eight shares of the tests.
"""

from pathlib import Path

import pytest

from tests.gpu.journal import FAILED, PASSED, SKIPPED, Journal
from tests.gpu.measures import leave_if_poisoned


def pytest_addoption(parser):
    parser.addoption("--journal", type=Path, required=True, help="where the lines go")
    parser.addoption("--share", type=int, nargs=2, default=(0, 1), metavar=("INDEX", "COUNT"))


def pytest_configure(config):
    journal = Journal(config.getoption("--journal"))
    config.pluginmanager.register(Writer(journal, *config.getoption("--share")))


def reason_of(report) -> str:
    """Return why a test failed or was skipped."""
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else str(report.longrepr).strip().splitlines()[-1]


class Writer:
    def __init__(self, journal: Journal, index: int, count: int) -> None:
        self.journal, self.index, self.count, self.reports = journal, index, count, []

    def pytest_collectreport(self, report):
        if report.failed:
            self.journal.end(report.nodeid, FAILED, reason_of(report), text=report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        """Leave out what other processes do, or an earlier one did."""
        items[:] = items[self.index :: self.count]
        self.journal.plan([item.nodeid for item in items])
        ended = self.journal.ended()
        items[:] = [item for item in items if item.nodeid not in ended]

    def pytest_runtest_logstart(self, nodeid):
        self.reports = []
        self.journal.start(nodeid)

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid):
        seconds = round(sum(r.duration for r in self.reports), 3)
        failed = [r for r in self.reports if r.failed]
        skipped = [r for r in self.reports if r.skipped]
        for report in [*failed, *skipped][:1]:
            outcome = FAILED if failed else SKIPPED
            text = report.longreprtext if failed else ""
            self.journal.end(nodeid, outcome, reason_of(report), text=text, seconds=seconds)
        if not failed and not skipped:
            self.journal.end(nodeid, PASSED, seconds=seconds)
        if failed:
            leave_if_poisoned()

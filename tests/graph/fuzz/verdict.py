"""What became of a program."""

import re
from dataclasses import dataclass, field

WAYS_OUT = re.compile(
    r"exclude=|context=|contexts=|use_context|trace=False|inplace=|select=|normswap\.\w+|"
    r"unknown=|verify=|call the|leave it out|turn "
)


@dataclass(frozen=True)
class Failure:
    """A kind, without numbers and so the same for programs that fail alike, and all the detail."""

    kind: str
    detail: str


@dataclass
class Verdict:
    """What became of a program.

    Attributes:
        failures: at most one of each way to convert it.
        refusals: errors on purpose, which name a way out.
        invalid: why the original itself cannot run it; "" where it can.
        traced, scoped: number of traced containers, and reasons of the others, by name.
    """

    failures: list[Failure] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    invalid: str = ""
    traced: int = 0
    scoped: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """One of "wrong", "refused", "invalid", "right"."""
        given = {"wrong": self.failures, "refused": self.refusals, "invalid": self.invalid}
        return next((name for name, value in given.items() if value), "right")

    @property
    def detail(self) -> str:
        """Everything that went wrong."""
        return "\n".join(f"{f.kind}\n{f.detail}" for f in self.failures)


def make_failure(mode: str, stage: str, detail: str) -> Failure:
    """Return a failure; its kind says where it was raised, if an error of ours was."""
    lines = detail.strip().splitlines()
    ours = [line.split("/normswap/")[-1] for line in lines if "/normswap/normswap/" in line]
    short = re.sub(r"<[^>]*>|'[^']*'|\d+(\.\d+)?(e-?\d+)?", "#", lines[0])[:70]
    where = f" at {ours[-1].split(',')[0]}" if ours else ""
    return Failure(f"{mode} {stage}: {short}{where}", detail)
